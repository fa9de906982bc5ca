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
from collections.abc import Sequence
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


def read(setting: Setting, method: str, n_threads: int) -> dict[str, Any] | None:
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
                n_threads=n_threads,
                n_threads_batch=n_threads,
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
  to the latest trained context, `loop` is llama.cpp's own Self-Extend.
"""


def measure_of(setting: Setting) -> str:
    return "plain" if setting.pretend else "window"


def table(readings: dict[str, list[Reading]], measure: str) -> str:
    """One line a method that has read the texts; all texts in a row."""
    rows = ["| method | perplexity | against Self-Extend | keys |", "|---|---:|---:|---:|"]

    def losses(method: str) -> Losses:
        return np.concatenate([r.losses for r in readings[method]])

    for method in sorted(readings, key=lambda m: (m != measure, float(losses(m).mean()))):
        found = [key for r in readings[method] for key in r.found]
        low, high = wilson_interval(float(np.mean(found)), len(found))
        keys = f"{sum(found)} of {len(found)} ({low:.2f} to {high:.2f})"
        ratio = "(measure)" if method == measure else str(perplexity_ratio(losses(method), losses(measure)))
        against = "" if method == SELF_EXTEND else str(perplexity_ratio(losses(method), losses(SELF_EXTEND)))
        rows.append(f"| {method} | {ratio} | {against} | {keys} |")
    return "\n".join(rows)


def draw(readings: dict[str, list[Reading]], measure: str, file: Path, title: str) -> None:
    """Perplexity in relation to the measure by position, in 16 parts of the text; what is far off is left out."""

    def curve(method: str) -> tuple[list[float], list[float]]:
        ratios = np.stack(
            [mine.by_position - its.by_position for mine, its in zip(readings[method], readings[measure], strict=True)]
        )
        parts = np.array_split(np.arange(ratios.shape[1]), 16)
        points = [(float(part.mean()), math.exp(float(np.nanmean(ratios[:, part])))) for part in parts]
        shown = [(x, y) for x, y in points if y < 1.3]
        return [x for x, _ in shown], [y for _, y in shown]

    methods = [method for method in readings if method != measure]
    plot_curves({m: curve(m) for m in methods}, file, title, "position in the text (tokens)", f"ratio to {measure}")


def name_of(setting: Setting, n_ctx_train: int) -> str:
    trained = f"as if trained on {setting.pretend}" if setting.pretend else f"trained on {n_ctx_train}"
    cache = "" if setting.cache_type == "f16" else f", {setting.cache_type} cache"
    return f"{setting.model.stem}, {trained}: {setting.n_tokens} tokens{cache}"


def document(
    kept: Kept, groups: Sequence[Sequence[Setting]], methods: Sequence[str], out: Path, *, machine: str, command: str
) -> str:
    """The text of real-models.md, of what was measured; its pictures are drawn."""
    parts = [HEAD.format(machine=f" on {machine}" if machine else "", command=command, n_keys=groups[0][0].n_keys)]
    for group in groups:
        first = group[0]
        with ModelInfo(first.model) as info:
            n_ctx_train = first.pretend or info.n_ctx_train
        measure = measure_of(first)
        done = [s for s in group if all(kept.has(s.what(m)) for m in (measure, SELF_EXTEND))]
        if not done:
            continue
        readings, partly = {}, []
        for method in dict.fromkeys([measure, SELF_EXTEND, *methods]):
            results = [kept.get(s.what(method)) for s in done]
            if all(results):
                readings[method] = [reading(result, n_ctx_train) for result in results]
            else:
                partly.append(method)
        name = name_of(first, n_ctx_train)
        picture = f"{first.model.stem}-{first.pretend or n_ctx_train}-{first.n_tokens}-{first.cache_type}.png"
        parts += [f"## {name}", "", f"Texts: {', '.join(s.text.name for s in done)}.", "", table(readings, measure), ""]
        if partly:
            parts += [f"Not measured, or out of reach: {', '.join(partly)}.", ""]
        draw(readings, measure, out / picture, name)
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
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of real-models.md and its pictures")
    parser.add_argument("--machine", default="", help="what it was measured on, for the document")
    parser.add_argument("--write-only", action="store_true", help="measure nothing, write what is kept")
    args = parser.parse_args(argv)
    kept = Kept(args.kept)
    groups = []
    for model in args.models:
        for pretend in args.pretend:
            with ModelInfo(model) as info:
                n_ctx_train = pretend or info.n_ctx_train
            for times in args.times:
                for cache_type in args.cache_type:
                    n = times * n_ctx_train
                    groups.append([Setting(model, pretend, n, text, cache_type, args.keys) for text in args.text])
    for group in [] if args.write_only else groups:
        for setting in group:
            # What the others are compared with comes first, so that an interrupted study has something to say.
            for method in dict.fromkeys([measure_of(setting), SELF_EXTEND, *args.methods]):
                what = setting.what(method)
                is_new = not kept.has(what)
                result = kept.measured(what, partial(read, setting, method, args.threads))
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
    command = " ".join([*(model.name for model in args.models), *names, "--kept", args.kept.name])
    text = document(kept, groups, args.methods, args.out, machine=args.machine, command=command)
    (args.out / "real-models.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
