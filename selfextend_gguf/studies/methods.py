"""The full study on the tiny models: every schedule and what llama.cpp offers, at all lengths. Writes docs/results.md.

    python -m selfextend_gguf.studies.methods --text tests/data/heldout.txt --kept kept.jsonl

Texts hold keys. Each is read once, which gives its perplexity; then its keys are asked for one after the other, each
time going back to the end of the text. Results are kept as they come: a second call goes on.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.kept import Kept, made_by
from selfextend_gguf.evaluation.perplexity import Estimate, perplexity_ratio, second_half
from selfextend_gguf.evaluation.plots import plot_curves
from selfextend_gguf.evaluation.readers import METHODS, Losses, Reader, open_reader
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import TINY_MODELS
from selfextend_gguf.schedule import SCHEDULES
from selfextend_gguf.tiny.keys import FACT, KEY_NAMES, QUESTION, random_value

REFERENCE = "window"
TIMES = (1, 2, 4, 8, 16, 32, 64)  # text lengths in trained contexts
LONGEST_OF_OTHERS = 16  # beyond, methods other than Self-Extend are not read: they have failed by then


def texts_and_keys(times: int) -> tuple[int, int]:
    """How many texts of that many trained contexts are read, and keys are hidden in each. Fewer where reading takes
    long."""
    return (8, 1) if times <= LONGEST_OF_OTHERS else (max(1, 64 // times), 3)


@dataclass(frozen=True)
class KeyText:
    """A text with hidden keys, and a question and its answer for each of them."""

    prompt: bytes
    questions: list[bytes]
    answers: list[bytes]


def key_text(rng: np.random.Generator, text: str, n_bytes: int, n_keys: int, depth: float) -> KeyText:
    """The beginning of ASCII `text` with a fact at `depth` (0..1) of each of `n_keys` equal parts; prompt and any
    question take `n_bytes`."""
    names = rng.choice(KEY_NAMES, n_keys, replace=False)
    facts = [(str(name), random_value(rng)) for name in names]
    lines = [FACT.format(name=name, value=value) + "\n" for name, value in facts]
    questions = ["\n" + QUESTION.format(name=name) for name, _ in facts]
    part = (n_bytes - sum(map(len, lines)) - max(map(len, questions))) // n_keys
    parts = []
    for i, line in enumerate(lines):
        stretch = text[i * part : (i + 1) * part]
        place = stretch.rfind(" ", 0, int(depth * part) + 1) + 1  # at a word boundary
        parts += [stretch[:place], line, stretch[place:]]
    return KeyText("".join(parts).encode(), [q.encode() for q in questions], [v.encode() for _, v in facts])


def key_texts(text: str, n_tokens: int, n_texts: int, n_keys: int) -> list[KeyText]:
    """Texts from evenly spread parts of `text`, with keys at depths that differ."""
    rng = np.random.default_rng(n_texts)
    starts = np.linspace(0, len(text) - n_tokens, n_texts).astype(int)
    return [key_text(rng, text[start:], n_tokens, n_keys, i / n_texts) for i, start in enumerate(starts)]


def keys_found(reader: Reader, t: KeyText) -> list[bool]:
    """Which of the keys greedy decoding answers exactly."""
    answers = reader.answers(list(t.prompt), [list(q) for q in t.questions], len(t.answers[0]))
    return [bytes(got) == wanted for got, wanted in zip(answers, t.answers, strict=True)]


@dataclass(frozen=True)
class Reading:
    """What one method made of the texts of a length."""

    losses: Losses  # of the second halves, all texts in a row
    found: list[bool]  # keys

    def to_json(self) -> dict[str, Any]:
        return {"losses": np.round(self.losses, 5).tolist(), "found": self.found}

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> Reading:
        return cls(np.array(content["losses"]), content["found"])


@dataclass(frozen=True)
class Row:
    """One method at one length."""

    method: str
    times: int
    ratio: Estimate  # of the perplexity to that of the same tokens read in fresh windows
    found: float  # fraction of the keys


def read(model: str, text: str, method: str, n_ctx_train: int, times: int) -> Reading | None:
    """Read the texts of `times` trained contexts by a method, on one thread; None if it does not reach so far."""
    n_tokens = n_ctx_train * times
    try:
        reader = open_reader(method, model, n_tokens + 16, n_threads=1, n_threads_batch=1)
    except ConfigError:
        return None
    losses, found = [], []
    try:
        for t in key_texts(text, n_tokens, *texts_and_keys(times)):
            losses.append(second_half(reader.losses(list(t.prompt))))
            found += keys_found(reader, t)
    finally:
        reader.close()
    return Reading(np.concatenate(losses), found)


def is_measured(method: str, times: int) -> bool:
    """Whether a method is read at that many trained contexts."""
    return method in (REFERENCE, *SCHEDULES) or times <= LONGEST_OF_OTHERS


def _content(reading: Reading | None) -> dict[str, Any] | None:
    return None if reading is None else reading.to_json()


def study(pool: Executor, kept: Kept, model: str, text: str, methods: Sequence[str], times: Sequence[int]) -> list[Row]:
    """All rows; methods that do not reach a length have none there."""
    with ModelInfo(model) as info:
        n_ctx_train = info.n_ctx_train
    cells = [(n, method) for n in times for method in methods if is_measured(method, n)]
    of_model = made_by(model) | {"text": zlib.crc32(text.encode())}
    whats = {(n, m): of_model | {"method": m, "times": n, "texts and keys": texts_and_keys(n)} for n, m in cells}
    begun = {
        pool.submit(read, model, text, method, n_ctx_train, n): whats[n, method]
        for n, method in sorted(cells, key=lambda cell: -cell[0])  # the longest first: no core waits at the end
        if not kept.has(whats[n, method])
    }
    for done in as_completed(begun):
        kept.measured(begun[done], partial(_content, done.result()))
        print(f"{begun[done]['times']:>3}x {begun[done]['method']}", flush=True)
    rows = []
    for n, method in cells:
        its, reference = kept.get(whats[n, method]), kept.get(whats[n, REFERENCE])
        if its is None or reference is None:
            continue
        reading, reference = Reading.of_json(its), Reading.of_json(reference)
        rows.append(Row(method, n, perplexity_ratio(reading.losses, reference.losses), float(np.mean(reading.found))))
    return rows


def table(rows: Sequence[Row], methods: Sequence[str], times: Sequence[int]) -> str:
    """Perplexity in relation to fresh windows and keys found, one line a method."""
    by = {(r.method, r.times): r for r in rows}
    lines = ["| method | " + " | ".join(f"{n}x" for n in times) + " |", "|---|" + "---:|" * len(times)]
    for method in methods:
        cells = [by.get((method, n)) for n in times]
        lines.append(
            f"| {method} | "
            + " | ".join("" if r is None else f"{r.ratio.value:.3f} / {r.found:.2f}" for r in cells)
            + " |"
        )
    return "\n".join(lines)


HEAD = """# Results

Written by `python -m selfextend_gguf.studies.methods --text tests/data/heldout.txt --kept kept.jsonl`{machine}.

The bundled models (Q8_0, bytes as tokens) on held-out text, at 1 to 64 trained contexts. Keys are hidden in the texts:
up to {others} trained contexts one in each of 8 texts, at depths from 0 % to 88 %; beyond, where reading takes long,
three in each of two texts (32x) or in one (64x). Each cell is *perplexity ratio / keys found*:

- the perplexity of the second halves of the texts, in relation to the same tokens read in fresh windows of half to
  one trained context (`window`): the text's own difficulty;
- the fraction of keys that greedy decoding answers exactly, asked for at the end of the text.

Self-Extend's schedules take their automatic parameters. `linear`, `ntk` and `yarn` are llama.cpp's RoPE scaling,
each stretched to the length of the text; `loop` is llama.cpp's own Self-Extend (`--grp-attn-n`); `plain` is llama.cpp
as it is. An empty cell: not measured, or the method does not reach that far.
"""


def document(results: dict[str, list[Row]], methods: Sequence[str], times: Sequence[int], machine: str) -> str:
    parts = [HEAD.format(machine=machine, others=LONGEST_OF_OTHERS)]
    for name, rows in results.items():
        parts += [f"## {name}", "", table(rows, methods, times), ""]
        parts += [f"![perplexity]({name}-perplexity.png)", "", f"![keys found]({name}-keys.png)", ""]
    return "\n".join(parts)


def draw(name: str, rows: Sequence[Row], folder: Path) -> None:
    """Two pictures of a model's rows; the first leaves out what is far off."""
    methods = list(dict.fromkeys(r.method for r in rows if r.method != REFERENCE))

    def curve(method: str, value: Callable[[Row], float], limit: float) -> tuple[list[float], list[float]]:
        chosen = [r for r in rows if r.method == method and value(r) <= limit]
        return [r.times for r in chosen], [value(r) for r in chosen]

    x_label = "text length in trained contexts"
    plot_curves(
        {m: curve(m, lambda r: r.ratio.value, 2.0) for m in methods},
        folder / f"{name}-perplexity.png",
        f"{name}: perplexity in relation to fresh windows",
        x_label,
        "ratio (up to 2 is shown)",
    )
    plot_curves(
        {m: curve(m, lambda r: r.found, 1.0) for m in methods},
        folder / f"{name}-keys.png",
        f"{name}: keys found",
        x_label,
        "fraction",
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", required=True, type=Path, help="ASCII text the models were not trained on")
    parser.add_argument(
        "--kept", type=Path, required=True, help="file that keeps results; those in it are not repeated"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of results.md and its pictures")
    parser.add_argument("--times", type=int, nargs="+", default=TIMES, help="text lengths in trained contexts")
    parser.add_argument("--machine", default="", help="what it was measured on, for the document")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)  # now, and not after hours
    text = args.text.read_text(encoding="ascii")
    methods = (REFERENCE, *(m for m in METHODS if m != REFERENCE))
    kept, results = Kept(args.kept), {}
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for model in TINY_MODELS:
            name = model.name.split(".")[0]
            print(name, flush=True)
            results[name] = study(pool, kept, str(model), text, methods, args.times)
            draw(name, results[name], args.out)
    machine = f",\non {args.machine}" if args.machine else ""
    (args.out / "results.md").write_text(document(results, methods, args.times, machine), encoding="utf-8")


if __name__ == "__main__":
    main()
