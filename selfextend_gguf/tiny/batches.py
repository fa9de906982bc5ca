"""Training sequences for the tiny byte-level models.

Everything here is bytes in numpy arrays; nothing knows about PyTorch or llama.cpp.
A *batch* is a pair of `tokens` (n_rows, length + 1) int64 and `weights` (n_rows, length) float32: the loss
of predicting `tokens[:, 1:]` from `tokens[:, :-1]` is weighted by `weights`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from selfextend_gguf.tiny.keys import FACT, KEY_NAMES, QUESTION, cut_points, random_value

Text = npt.NDArray[np.uint8]
Batch = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


def read_text(path: str | Path) -> Text:
    """Bytes of a text file as a (n,) uint8 array."""
    return np.frombuffer(Path(path).read_bytes(), dtype=np.uint8)


def vocabulary_words(text: Text, shortest: int = 3, longest: int = 8) -> list[str]:
    """Lower-case words of `text`, sorted, each once."""
    words = {w for w in bytes(text).decode("utf-8", "ignore").split() if w.isascii() and w.isalpha() and w.islower()}
    return sorted(w for w in words if shortest <= len(w) <= longest)


def text_batch(rng: np.random.Generator, text: Text, n_rows: int, length: int) -> Batch:
    """Random windows of `text`."""
    starts = rng.integers(0, len(text) - length - 1, n_rows)
    tokens = np.stack([text[s : s + length + 1] for s in starts]).astype(np.int64)
    return tokens, np.ones((n_rows, length), np.float32)


def _random_chunk(rng: np.random.Generator, text: Text, size: int) -> Text:
    kind = rng.integers(4)
    if kind == 0:
        return rng.integers(ord("0"), ord("9") + 1, size).astype(np.uint8)
    if kind == 1:
        return rng.integers(ord("a"), ord("z") + 1, size).astype(np.uint8)
    if kind == 2:
        return rng.integers(32, 127, size).astype(np.uint8)
    start = rng.integers(0, len(text) - size)
    return text[start : start + size]


def copy_batch(rng: np.random.Generator, text: Text, n_rows: int, length: int) -> Batch:
    """Rows of one random chunk (6 to 40 symbols) repeated with fillers between; the repeats carry the loss."""
    tokens = np.zeros((n_rows, length + 1), np.int64)
    weights = np.full((n_rows, length), 0.1, np.float32)
    for row in range(n_rows):
        chunk = _random_chunk(rng, text, int(rng.integers(6, min(40, length // 3) + 1)))
        at, first = 0, True
        while at < length + 1:
            end = min(at + len(chunk), length + 1)
            tokens[row, at:end] = chunk[: end - at]
            # Nothing announces a repeat, so its first two symbols cannot be foreseen.
            if not first:
                weights[row, at + 1 : end - 1] = 1.0
            first, at = False, end
            filler = _random_chunk(rng, text, int(rng.integers(1, 16)))
            end = min(at + len(filler), length + 1)
            tokens[row, at:end] = filler[: end - at]
            at = end
    return tokens, weights


def partial_copy_batch(rng: np.random.Generator, text: Text, n_rows: int, length: int) -> Batch:
    """As `copy_batch`, but what is repeated are random parts of the chunk (8 to 40 symbols).

    Small alphabets and copies that start anywhere in the chunk make a single symbol ambiguous: what comes next
    must be found by matching several.
    """
    tokens = np.zeros((n_rows, length + 1), np.int64)
    weights = np.full((n_rows, length), 0.1, np.float32)
    for row in range(n_rows):
        size = int(rng.integers(8, 41))
        kind = rng.integers(4)
        if kind <= 1:
            chunk = rng.integers(ord("0"), ord("9") + 1, size).astype(np.uint8)
        elif kind == 2:
            chunk = rng.integers(ord("a"), ord("a") + int(rng.integers(4, 27)), size).astype(np.uint8)
        else:
            start = int(rng.integers(0, len(text) - size))
            chunk = text[start : start + size]
        part, at = chunk, 0
        while at <= length:
            end = min(at + len(part), length + 1)
            tokens[row, at:end] = part[: end - at]
            if at > 0:
                # Nothing announces a copy: its first three symbols cannot be foreseen.
                weights[row, at + 2 : max(at + 2, end - 1)] = 1.0
            filler = _random_chunk(rng, text, int(rng.integers(1, 16)))
            at, end = end, min(end + len(filler), length + 1)
            tokens[row, at:end] = filler[: end - at]
            at = end
            begin = int(rng.integers(0, size - 5))
            part = chunk[begin : begin + int(rng.integers(6, size - begin + 1))]
    return tokens, weights


def retrieval_batch(rng: np.random.Generator, text: Text, words: list[str], n_rows: int, length: int) -> Batch:
    """Rows of text with one to three facts hidden at any depth, then one to three questions about them.

    The answers' digits weigh 6, the facts' own digits 0 (nothing foretells them), everything else 1.
    """
    tokens = np.zeros((n_rows, length + 1), np.int64)
    weights = np.ones((n_rows, length + 1), np.float32)
    for row in range(n_rows):
        n_facts = int(rng.choice([1, 1, 2, 3]))
        names = [
            str(rng.choice(KEY_NAMES)) if rng.random() < 0.3 else words[int(rng.integers(len(words)))]
            for _ in range(n_facts)
        ]
        names = list(dict.fromkeys(names))
        digits = 5 if rng.random() < 0.7 else int(rng.integers(3, 8))
        facts = {name: random_value(rng, digits) for name in names}
        asked = [names[int(rng.integers(len(names)))] for _ in range(int(rng.choice([1, 1, 2])))]

        tail: list[tuple[bytes, float]] = []
        for name in asked:
            tail.append((bytes([int(rng.choice([10, 32]))]) + QUESTION.format(name=name).encode(), 1.0))
            tail.append((facts[name].encode(), 6.0))
            tail.append((b".", 2.0))
        tail_size = sum(len(part) for part, _ in tail)
        fact_size = sum(len(FACT.format(name=n, value=v)) + 2 for n, v in facts.items())
        # Half of the rows fill the context, the others end early and go on with text.
        room = max(0, length + 1 - tail_size - fact_size)
        if rng.random() < 0.5:
            room = int(rng.integers(0, room + 1))
        start = int(rng.integers(0, len(text) - length - 1))
        haystack = bytes(text[start : start + room])
        cuts = cut_points(haystack)
        places = sorted(((cuts[int(rng.integers(len(cuts)))], n) for n in facts), key=lambda p: p[0])

        parts: list[tuple[bytes, float]] = []
        done = 0
        for place, name in places:
            before, after = FACT.split("{value}")
            parts.append((haystack[done:place] + before.format(name=name).encode(), 1.0))
            parts.append((facts[name].encode(), 0.0))
            parts.append((after.encode() + bytes([int(rng.choice([10, 32]))]), 1.0))
            done = place
        parts.append((haystack[done:], 1.0))
        parts += tail
        rest = length + 1 - sum(len(p) for p, _ in parts)
        if rest > 0:
            start = int(rng.integers(0, len(text) - rest))
            parts.append((b"\n" + bytes(text[start : start + rest - 1]), 1.0))
        line = b"".join(p for p, _ in parts)[: length + 1]
        weight = np.concatenate([np.full(len(p), w, np.float32) for p, w in parts])[: length + 1]
        tokens[row] = np.frombuffer(line, np.uint8)
        weights[row] = weight
    return tokens, weights[:, 1:]
