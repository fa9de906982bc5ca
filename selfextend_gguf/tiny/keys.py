"""Keys hidden in texts, as the tiny models were trained to find them: a fact, and at the end the question about it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Names the evaluation and the demo use; training also draws names from the text's own words.
KEY_NAMES = [
    "oak",
    "elm",
    "ash",
    "fir",
    "yew",
    "pine",
    "palm",
    "cedar",
    "maple",
    "birch",
    "willow",
    "olive",
    "iron",
    "gold",
    "silver",
    "copper",
    "stone",
    "river",
    "north",
    "south",
    "east",
    "west",
    "red",
    "blue",
    "green",
    "white",
    "black",
    "brown",
    "tower",
    "garden",
    "bridge",
    "harbour",
    "window",
    "market",
]

FACT = "The {name} key is {value}."
QUESTION = "What is the {name} key? The {name} key is "


def random_value(rng: np.random.Generator, digits: int = 5) -> str:
    """A key of `digits` random digits."""
    return "".join(str(d) for d in rng.integers(0, 10, digits))


def cut_points(haystack: bytes) -> list[int]:
    """Byte offsets just behind a space or newline: where a fact may be put without breaking a word."""
    return [0] + [i + 1 for i, b in enumerate(haystack) if b in b" \n"]


@dataclass(frozen=True)
class KeyTask:
    """A text with one hidden fact and the question about it."""

    prompt: str
    fact: str
    answer: str
    depth: float  # 0 = start of the text, 1 = end


def key_task(rng: np.random.Generator, text: str, n_bytes: int, depth: float, digits: int = 5) -> KeyTask:
    """Hide a random key at `depth` (0..1) of a random stretch of ASCII `text`; prompt is `n_bytes` long at most.

    Raises ValueError when `n_bytes` has no room for the fact and the question.
    """
    name = str(rng.choice(KEY_NAMES))
    value = random_value(rng, digits)
    fact = FACT.format(name=name, value=value)
    question = "\n" + QUESTION.format(name=name)
    room = n_bytes - len(fact) - 1 - len(question)
    if room < 0:
        raise ValueError(f"{n_bytes} bytes have no room for a fact and its question ({len(fact) + len(question)})")
    if room > len(text):
        raise ValueError(f"the text has {len(text)} bytes, {room} are needed")
    start = int(rng.integers(0, len(text) - room + 1))
    haystack = text[start : start + room]
    # The nearest word boundary at or before the wanted depth.
    cuts = [c for c in cut_points(haystack.encode()) if c <= depth * room]
    place = cuts[-1]
    return KeyTask(f"{haystack[:place]}{fact}\n{haystack[place:]}{question}", fact, value, depth)
