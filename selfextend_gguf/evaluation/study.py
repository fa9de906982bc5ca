"""The full study on the tiny models: every schedule and what llama.cpp offers, at all lengths. Writes docs/results.md.

    python -m selfextend_gguf.evaluation.study --text tests/data/heldout.txt --out docs

Keys: one in a text up to 16 trained contexts; beyond, where reading takes long, three in one text, one in each third
of it, asked for one after the other, each time going back to the end of the text.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfextend_gguf.config import SCHEDULES
from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.perplexity import Estimate, perplexity, perplexity_ratio, stretches
from selfextend_gguf.evaluation.plots import plot_curves
from selfextend_gguf.evaluation.readers import METHODS, Losses, Reader, open_reader
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import TINY_MODELS
from selfextend_gguf.tiny.data import FACT, KEY_NAMES, QUESTION, random_value

TIMES = (1, 2, 4, 8, 16, 32, 64)  # text lengths in trained contexts
# Beyond these, reading takes too long for what it tells: of other methods than Self-Extend, which have failed by then,
# and of other schedules than the default.
LONGEST_OF_OTHERS, LONGEST_OF_SCHEDULES = 16, 32
KEYS_IN_TEXTS = ((8, 1), (2, 3))  # (texts, keys in each) a method and length: up to LONGEST_OF_OTHERS, and beyond
TOKENS_FOR_PERPLEXITY = 8192  # at least, if that many are in two stretches of the length


@dataclass(frozen=True)
class KeyText:
    """A text with hidden keys, and a question and its answer for each of them."""

    prompt: bytes
    questions: list[bytes]
    answers: list[bytes]


def key_text(rng: np.random.Generator, text: str, n_bytes: int, n_keys: int, depth: float) -> KeyText:
    """A stretch of ASCII `text` with a fact at `depth` (0..1) of each of `n_keys` equal parts; prompt and any question
    take `n_bytes`."""
    names = rng.choice(KEY_NAMES, n_keys, replace=False)
    facts = [(str(name), random_value(rng)) for name in names]
    lines = [FACT.format(name=name, value=value) + "\n" for name, value in facts]
    questions = ["\n" + QUESTION.format(name=name) for name, _ in facts]
    room = n_bytes - sum(map(len, lines)) - max(map(len, questions))
    start = int(rng.integers(0, len(text) - room))
    parts, part = [], room // n_keys
    for i, line in enumerate(lines):
        stretch = text[start + i * part : start + (i + 1) * part]
        place = stretch.rfind(" ", 0, int(depth * part) + 1) + 1  # at a word boundary
        parts += [stretch[:place], line, stretch[place:]]
    return KeyText("".join(parts).encode(), [q.encode() for q in questions], [v.encode() for _, v in facts])


def keys_found(reader: Reader, texts: Sequence[KeyText]) -> float:
    """Fraction of the keys that greedy decoding answers exactly."""
    found = []
    for t in texts:
        answers = reader.answers(list(t.prompt), [list(q) for q in t.questions], len(t.answers[0]))
        found += [bytes(got) == wanted for got, wanted in zip(answers, t.answers, strict=True)]
    return float(np.mean(found))


@dataclass(frozen=True)
class Row:
    """One method at one length."""

    method: str
    times: int
    perplexity: Estimate
    ratio: Estimate  # to the same tokens read in fresh windows
    found: float
    losses: Losses


def measure(model: str, text: str, method: str, n_ctx_train: int, times: int, reference: Losses | None) -> Row:
    """Perplexity of the second halves of held-out texts and keys found, at `times` the trained context. `reference`:
    the losses of the fresh windows on the same tokens."""
    n_tokens = n_ctx_train * times
    n_texts, n_keys = KEYS_IN_TEXTS[times > LONGEST_OF_OTHERS]
    rng = np.random.default_rng(times)
    key_texts = [key_text(rng, text, n_tokens, n_keys, i / n_texts) for i in range(n_texts)]
    parts = stretches(list(text.encode()), n_tokens, max(1, TOKENS_FOR_PERPLEXITY // n_tokens))
    reader = open_reader(method, model, n_tokens + 16)
    try:
        losses = np.stack([reader.losses(part) for part in parts])
        found = keys_found(reader, key_texts)
    finally:
        reader.close()
    late = losses[:, n_tokens // 2 :].ravel()
    ratio = perplexity_ratio(late, late if reference is None else reference)
    return Row(method, times, perplexity(late), ratio, found, losses)


def is_measured(method: str, times: int) -> bool:
    """Whether a method is read at that many trained contexts."""
    if method in ("window", SCHEDULES[0]):
        return True
    return times <= (LONGEST_OF_SCHEDULES if method in SCHEDULES else LONGEST_OF_OTHERS)


def study(model: str, text: str, methods: Sequence[str], times: Sequence[int]) -> list[Row]:
    """All rows; methods that do not reach a length have none there. The first method is the reference of the ratios."""
    with ModelInfo(model) as info:
        n_ctx_train = info.n_ctx_train
    rows: list[Row] = []
    for n in times:
        reference = None
        for method in methods:
            if not is_measured(method, n):
                continue
            began = time.monotonic()
            try:
                row = measure(model, text, method, n_ctx_train, n, reference)
            except ConfigError:
                continue
            if reference is None:
                reference = row.losses[:, n * n_ctx_train // 2 :].ravel()
            rows.append(row)
            seconds = time.monotonic() - began
            print(f"{n:>3}x {method:<13} {row.ratio!s:>16} {row.found:.2f} {seconds:.1f} s", flush=True)
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

Written by `python -m selfextend_gguf.evaluation.study --text tests/data/heldout.txt --out docs`{machine}.

The bundled models (Q8_0, bytes as tokens) on held-out text, at 1 to 64 trained contexts. Each cell is
*perplexity ratio / keys found*:

- the perplexity of the second halves of texts of the length (several, 8192 tokens in all, or one longer text), in
  relation to the same tokens read in fresh windows of half to one trained context (`window`): the text's own
  difficulty;
- the fraction of keys that greedy decoding answers exactly: up to {others} trained contexts {short[0]} texts with
  one key each, at depths from 0 % to 88 %; beyond, {long[0]} texts with {long[1]} keys each.

Self-Extend's schedules take their automatic parameters. `linear`, `ntk` and `yarn` are llama.cpp's RoPE scaling,
each stretched to the length of the text; `loop` is llama.cpp's own Self-Extend (`--grp-attn-n`); `plain` is llama.cpp
as it is. An empty cell: not measured, or the method does not reach that far.
"""


def document(results: dict[str, list[Row]], methods: Sequence[str], times: Sequence[int], machine: str) -> str:
    parts = [HEAD.format(machine=machine, others=LONGEST_OF_OTHERS, short=KEYS_IN_TEXTS[0], long=KEYS_IN_TEXTS[1])]
    for name, rows in results.items():
        parts += [f"## {name}", "", table(rows, methods, times), ""]
        parts += [f"![perplexity]({name}-perplexity.png)", "", f"![keys found]({name}-keys.png)", ""]
    return "\n".join(parts)


def draw(name: str, rows: Sequence[Row], folder: Path) -> None:
    """Two pictures of a model's rows; the first leaves out what is far off."""
    methods = list(dict.fromkeys(r.method for r in rows if r.method != "window"))

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, type=Path, help="ASCII text the models were not trained on")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of results.md and its pictures")
    parser.add_argument("--times", type=int, nargs="+", default=TIMES, help="text lengths in trained contexts")
    parser.add_argument("--machine", default="", help="what it was measured on, for the document")
    args = parser.parse_args(argv)
    text = args.text.read_text(encoding="ascii")
    methods = ("window", *(m for m in METHODS if m != "window"))
    results = {}
    for model in TINY_MODELS:
        name = model.name.split(".")[0]
        print(name, flush=True)
        results[name] = study(str(model), text, methods, args.times)
        draw(name, results[name], args.out)
    machine = f", on {args.machine}" if args.machine else ""
    (args.out / "results.md").write_text(document(results, methods, args.times, machine), encoding="utf-8")


if __name__ == "__main__":
    main()
