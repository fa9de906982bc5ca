"""The study on published models: every way to read a text of some trained contexts. Writes docs/real-models.md.

    python -m selfextend_gguf.studies.real_models MODEL.gguf --text book.txt manual.txt --pretend 1024 --kept kept.jsonl

With --pretend a model is read as if it were trained on so many tokens only. Plain reading of the same file, which was
trained on more, is then what the others should equal. Without it fresh windows are the measure.

Each text holds keys. It is read once, which gives its perplexity, that of the keys left out; then the keys are asked
for one after the other, each time going back to the end of the text. Results are kept as they come: a second call goes
on.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.hidden_keys import Key, KeyText, hide, told
from selfextend_gguf.evaluation.kept import Kept
from selfextend_gguf.evaluation.perplexity import perplexity_ratio
from selfextend_gguf.evaluation.plots import plot_curves
from selfextend_gguf.evaluation.readers import METHODS, Losses, open_reader
from selfextend_gguf.evaluation.retrieval import wilson_interval
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.tokenizer import Tokenizer

CITIES = (
    *("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Nairobi", "Quito", "Riga", "Hanoi"),
    *("Tunis", "Bergen", "Havana", "Bogota", "Dakar", "Seoul", "Malta", "Perth", "Bern", "Accra"),
    *("Athens", "Boston", "Delhi", "Geneva", "Istanbul", "Jakarta", "Kabul", "London", "Madrid", "Naples"),
    *("Osaka", "Prague", "Reykjavik", "Sydney", "Tehran", "Vienna", "Warsaw", "Zagreb", "Chicago", "Toronto"),
)
FACT = "\n\nThe secret number of {city} is {number}.\n\n"
QUESTION = "\n\nThe secret number of {city} is"
ANSWER_TOKENS = 8
ROOM = 64  # tokens of the longest question and its answer
SELF_EXTEND = "selfextend"


def key_text(tokenizer: Tokenizer, text: Sequence[int], n_tokens: int, n_keys: int) -> KeyText:
    """The beginning of `text` with a secret number of each of `n_keys` cities."""
    rng = np.random.default_rng(n_tokens)
    numbers = [str(number) for number in rng.choice(90000, n_keys, replace=False) + 10000]
    keys = [
        Key(FACT.format(city=city, number=number), QUESTION.format(city=city), number)
        for city, number in zip(CITIES[:n_keys], numbers, strict=True)
    ]
    return hide(tokenizer, text, n_tokens, keys)


@dataclass(frozen=True)
class Setting:
    """What is read, all methods alike; `pretend` = 0: as trained."""

    model: Path
    pretend: int
    n_tokens: int
    text: Path
    cache_type: str = "f16"
    n_keys: int = len(CITIES)

    def overrides(self, architecture: str) -> dict[str, int]:
        return {f"{architecture}.context_length": self.pretend} if self.pretend else {}

    def what(self, method: str) -> dict[str, object]:
        """What a result depends on."""
        return {
            "model": self.model.name,
            "bytes": self.model.stat().st_size,
            "pretend": self.pretend,
            "n_tokens": self.n_tokens,
            "text": self.text.name,
            "checksum": zlib.crc32(self.text.read_bytes()),
            "cache_type": self.cache_type,
            "n_keys": self.n_keys,
            "method": method,
        }


@dataclass(frozen=True)
class Reading:
    """What one method made of a text."""

    losses: Losses  # nats, of the tokens beyond the (pretended) trained context that are no key's
    by_position: Losses  # (n_tokens - 1,) of all, nan where they are a key's
    found: list[bool]


def read(setting: Setting, method: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Losses and answers, as JSON can hold them; None if the method does not reach so far."""
    with ModelInfo(setting.model) as info:
        overrides = setting.overrides(info.architecture)
        tokens = info.tokenizer.tokens(setting.text.read_text(encoding="utf-8-sig"))
        text = key_text(info.tokenizer, tokens, setting.n_tokens, setting.n_keys)
        began = time.monotonic()
        try:
            reader = open_reader(
                method,
                str(setting.model),
                setting.n_tokens + ROOM,
                kv_overrides=overrides,
                **arguments,
                type_k=KV_TYPES[setting.cache_type],
                type_v=KV_TYPES[setting.cache_type],
            )
        except ConfigError:
            return None
        try:
            losses = reader.losses(text.tokens)
            seconds = time.monotonic() - began
            answers = told(reader, info.tokenizer, text, ANSWER_TOKENS)
        finally:
            reader.close()
    return {
        "losses": [round(float(loss), 5) for loss in losses],
        "is_text": "".join(str(int(flag)) for flag in text.is_text[1:]),
        "answers": answers,
        "wanted": text.answers,
        "seconds": round(seconds, 1),
    }


def reading(result: dict[str, Any], n_ctx_train: int) -> Reading:
    losses = np.array(result["losses"])
    is_text = np.array([flag == "1" for flag in result["is_text"]])
    found = [wanted in answer for answer, wanted in zip(result["answers"], result["wanted"], strict=True)]
    beyond = is_text & (np.arange(1, len(losses) + 1) >= n_ctx_train)
    return Reading(losses[beyond], np.where(is_text, losses, np.nan), found)


# ---- the document ----------------------------------------------------------------------------------------------

HEAD = """# Real models

Written{machine} by

```sh
python -m selfextend_gguf.studies.real_models {command}
```

Every method reads the same texts, with f16 keys and values unless said otherwise. What the command measures is kept:
called again, it goes on.

* *Perplexity* is that of the tokens beyond the trained context, in relation to the *measure*: for a model that is read
  as if it were trained on fewer tokens, plain reading of the same file, which was trained on more (1.000 would be
  perfect); else fresh windows of half to one trained context. Standard errors are those of paired losses.
* *Against Self-Extend* is the same in relation to the schedule `selfextend`, the default: above 1 it is worse.
* *Keys*: {n_keys} sentences with a secret number stand evenly in each text and are asked for one by one at its end.
  The measure's own count is what the model can do at best. Intervals hold 95 %.
* `linear`, `ntk` and `yarn` are llama.cpp's RoPE scaling, stretched to the length of the text; `window` is truncation
  to the latest trained context, `loop` is llama.cpp's own Self-Extend. The others are schedules (`schedules.md`).
"""

SUMMARY = """## Where each method wins

Perplexity in relation to the measure, and the share of the keys that was found. **Bold** is what no method beats by
more than its error: one standard error of the perplexity, the interval of the keys. Plain reading that is the measure
takes no part: of a model that was trained on so little it would not be to be had. The last column counts the bold ones,
of the columns in which the method was measured.
"""


def measure_of(setting: Setting) -> str:
    return "plain" if setting.pretend else "window"


@dataclass(frozen=True)
class Group:
    """What all methods made of the same texts, with the same model."""

    setting: Setting  # of the first text
    n_ctx_train: int
    texts: list[Path]
    readings: Mapping[str, list[Reading]]  # of each text, by method
    missing: list[str]  # methods that have not read all of them

    @property
    def measure(self) -> str:
        return measure_of(self.setting)

    @property
    def cache(self) -> str:
        return "" if self.setting.cache_type == "f16" else f", {self.setting.cache_type} cache"

    @property
    def name(self) -> str:
        trained = f"{'as if ' if self.setting.pretend else ''}trained on {self.n_ctx_train}"
        return f"{self.setting.model.stem}, {trained}: {self.setting.n_tokens} tokens{self.cache}"

    @property
    def short_name(self) -> str:
        return f"{self.setting.model.stem.split('-')[0]}, {self.n_ctx_train} to {self.setting.n_tokens}{self.cache}"

    def losses(self, method: str) -> Losses:
        return np.concatenate([reading.losses for reading in self.readings[method]])

    def found(self, method: str) -> list[bool]:
        return [key for reading in self.readings[method] for key in reading.found]


def summary(groups: Sequence[Group]) -> str:
    """One line a method, one column a group; plain reading first, then the default, then those that win most."""
    cells: dict[str, list[str]] = {}
    wins: dict[str, list[tuple[bool, bool]]] = {}
    for number, group in enumerate(groups):
        rivals = [method for method in group.readings if not (group.setting.pretend and method == group.measure)]
        lowest = min((group.losses(method) for method in rivals), key=lambda losses: float(losses.mean()))
        most = max(float(np.mean(group.found(method))) for method in rivals)
        for method in group.readings:
            losses, found = group.losses(method), group.found(method)
            ratio, behind = perplexity_ratio(losses, group.losses(group.measure)), perplexity_ratio(losses, lowest)
            share = float(np.mean(found))
            words = [str(ratio).partition(" ")[0], f"{share:.0%}"]
            if method in rivals:
                is_unbeaten = (behind.value - behind.error <= 1, wilson_interval(share, len(found))[1] >= most)
                wins.setdefault(method, []).append(is_unbeaten)
                words = [f"**{word}**" if flag else word for word, flag in zip(words, is_unbeaten, strict=True)]
            cells.setdefault(method, [""] * len(groups))[number] = ", ".join(words)
    rows = [
        f"| method | {' | '.join(group.short_name for group in groups)} | wins |",
        f"|---|{'---|' * len(groups)}---|",
    ]
    for method in sorted(cells, key=lambda m: (m != "plain", m != SELF_EXTEND, -sum(map(sum, wins.get(m, []))))):
        perplexities, keys = (sum(flags) for flags in zip(*wins.get(method, [(False, False)]), strict=True))
        won = f"{perplexities} and {keys} of {len(wins[method])}" if method in wins else ""
        rows.append(f"| {method} | {' | '.join(cells[method])} | {won} |")
    return "\n".join(rows)


def table(group: Group) -> str:
    """One line a method that has read the texts; all texts in a row."""
    rows = ["| method | perplexity | against Self-Extend | keys |", "|---|---:|---:|---:|"]
    for method in sorted(group.readings, key=lambda m: (m != group.measure, float(group.losses(m).mean()))):
        losses, found = group.losses(method), group.found(method)
        low, high = wilson_interval(float(np.mean(found)), len(found))
        keys = f"{sum(found)} of {len(found)} ({low:.2f} to {high:.2f})"
        is_measure = method == group.measure
        ratio = "(measure)" if is_measure else str(perplexity_ratio(losses, group.losses(group.measure)))
        against = "" if method == SELF_EXTEND else str(perplexity_ratio(losses, group.losses(SELF_EXTEND)))
        rows.append(f"| {method} | {ratio} | {against} | {keys} |")
    return "\n".join(rows)


def draw(group: Group, file: Path) -> None:
    """Perplexity in relation to the measure by position, in 16 parts of the text; what is far off is left out."""
    measured = group.readings[group.measure]

    def curve(method: str) -> tuple[list[float], list[float]]:
        pairs = zip(group.readings[method], measured, strict=True)
        ratios = np.stack([mine.by_position - its.by_position for mine, its in pairs])
        parts = np.array_split(np.arange(ratios.shape[1]), 16)
        points = [(float(part.mean()), math.exp(float(np.nanmean(ratios[:, part])))) for part in parts]
        shown = [(x, y) for x, y in points if y < 1.3]
        return [x for x, _ in shown], [y for _, y in shown]

    curves = {method: curve(method) for method in group.readings if method != group.measure}
    plot_curves(curves, file, group.name, "position in the text (tokens)", f"ratio to {group.measure}")


def group_of(kept: Kept, settings: Sequence[Setting], methods: Sequence[str]) -> Group | None:
    """What was measured of settings that differ in the text alone; None without the measure and the default."""
    first = settings[0]
    with ModelInfo(first.model) as info:
        n_ctx_train = first.pretend or info.n_ctx_train
    done = [s for s in settings if all(kept.has(s.what(m)) for m in (measure_of(first), SELF_EXTEND))]
    if not done:
        return None
    readings: dict[str, list[Reading]] = {}
    missing = []
    for method in dict.fromkeys([measure_of(first), SELF_EXTEND, *methods]):
        results = [kept.get(s.what(method)) for s in done]
        if all(results):
            readings[method] = [reading(result, n_ctx_train) for result in results]
        else:
            missing.append(method)
    return Group(first, n_ctx_train, [s.text for s in done], readings, missing)


def document(groups: Sequence[Group], out: Path, *, machine: str, command: str, n_keys: int) -> str:
    """The text of real-models.md; its pictures are drawn."""
    parts = [HEAD.format(machine=f" on {machine}" if machine else "", command=command, n_keys=n_keys)]
    if groups:
        parts += [SUMMARY, summary(groups), ""]
    for group in groups:
        setting = group.setting
        picture = f"{setting.model.stem}-{group.n_ctx_train}-{setting.n_tokens}-{setting.cache_type}.png"
        parts += [f"## {group.name}", "", f"Texts: {', '.join(text.name for text in group.texts)}.", ""]
        parts += [table(group), ""]
        if group.missing:
            parts += [f"Not measured, or out of reach: {', '.join(group.missing)}.", ""]
        draw(group, out / picture)
        parts += [f"![perplexity by position]({picture})", ""]
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="GGUF files")
    parser.add_argument("--text", nargs="+", required=True, type=Path, help="UTF-8 texts")
    parser.add_argument("--pretend", nargs="+", type=int, default=[0], help="trained contexts to pretend; 0 = its own")
    parser.add_argument("--times", nargs="+", type=int, default=[4], help="text lengths in trained contexts")
    parser.add_argument("--cache-type", nargs="+", choices=list(KV_TYPES), default=["f16"])
    parser.add_argument("--keys", type=int, choices=range(1, len(CITIES) + 1), default=len(CITIES), help="in each text")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--kept", type=Path, required=True, help="file that keeps results; those in it are not repeated"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of real-models.md and its pictures")
    parser.add_argument("--machine", default="", help="what it was measured on, for the document")
    parser.add_argument("--write-only", action="store_true", help="measure nothing, write what is kept")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)  # now, and not after hours
    kept = Kept(args.kept)
    arguments = {"n_threads": args.threads, "n_threads_batch": args.threads, "n_gpu_layers": args.n_gpu_layers}
    groups = []
    for model in args.models:
        for pretend in args.pretend:
            with ModelInfo(model) as info:
                n_ctx_train = pretend or info.n_ctx_train
            for times in args.times:
                for cache_type in args.cache_type:
                    n = times * n_ctx_train
                    groups.append([Setting(model, pretend, n, text, cache_type, args.keys) for text in args.text])
    for settings in [] if args.write_only else groups:
        for setting in settings:
            # What the others are compared with comes first, so that an interrupted study has something to say.
            for method in dict.fromkeys([measure_of(setting), SELF_EXTEND, *args.methods]):
                what = setting.what(method)
                is_new = not kept.has(what)
                result = kept.measured(what, partial(read, setting, method, arguments))
                if is_new:
                    seconds = "out of reach" if result is None else f"{result['seconds']} s"
                    print(setting.model.stem, setting.pretend, setting.n_tokens, setting.text.name, method, seconds)
                    sys.stdout.flush()
    names = [
        f"{flag} {' '.join(map(str, values))}"
        for flag, values in (
            ("--text", [text.name for text in args.text]),
            ("--pretend", args.pretend),
            ("--times", args.times),
            ("--cache-type", args.cache_type),
        )
    ]
    if args.keys != len(CITIES):
        names.append(f"--keys {args.keys}")
    if list(args.methods) != list(METHODS):
        names.append(f"--methods {' '.join(args.methods)}")
    command = " ".join([*(model.name for model in args.models), *names, "--kept", args.kept.name])
    found = (group_of(kept, settings, args.methods) for settings in groups)
    measured = [group for group in found if group is not None]
    text = document(measured, args.out, machine=args.machine, command=command, n_keys=args.keys)
    (args.out / "real-models.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
