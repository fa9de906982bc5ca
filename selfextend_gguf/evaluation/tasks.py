"""Prompts that ask for something hidden in a long text: passkeys, and RULER's synthetic tasks that need no download.

`longlm` is the passkey prompt of LongLM (the code of arXiv 2401.01325), `llama.cpp` that of llama.cpp's
examples/passkey, `native` one that the bundled tiny models understand. The others follow RULER (arXiv 2404.06654):
its needles, recall, templates and answer prefixes. What differs: RULER draws
words from a package of English words and, for `niah_multivalue` and `niah_multiquery`, hides needles in essays that
would have to be downloaded; here words come from the lists below and the haystack is RULER's repeated noise. RULER's
one-shot example before `vt` is left out.
"""

from __future__ import annotations

import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.tiny.data import KeyTask, key_task

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ADJECTIVES = [
    "amber",
    "brave",
    "calm",
    "daring",
    "eager",
    "fabled",
    "gentle",
    "hollow",
    "icy",
    "jolly",
    "keen",
    "lively",
]
_NOUNS = ["anchor", "basket", "candle", "dragon", "engine", "falcon", "garden", "hammer", "island", "jacket", "kettle"]

Rng = np.random.Generator
CountTokens = Callable[[str], int]  # number of tokens of a text, as the model reads it


@dataclass(frozen=True)
class Task:
    """A prompt, the answers that count, and how many tokens the model may spend on them."""

    prompt: str
    answers: tuple[str, ...]
    max_tokens: int


@dataclass(frozen=True)
class Wish:
    """What a prompt shall be like."""

    n_tokens: int  # most tokens of the prompt
    count_tokens: CountTokens
    depth: float  # 0 = start, 1 = end; of no use to tasks with several needles
    digits: int = 5  # of a passkey
    text: str = ""  # ASCII haystack of `native`


def largest(build: Callable[[int], str], wish: Wish) -> str:
    """The prompt build(n) with the most filler n that stays within the budget. ConfigError if build(0) does not."""
    if wish.count_tokens(build(0)) > wish.n_tokens:
        raise ConfigError(f"{wish.n_tokens} tokens have no room for this task")
    low, high = 0, 1
    while wish.count_tokens(build(high)) <= wish.n_tokens:
        if build(high) == build(2 * high):
            raise ConfigError(f"the text is too short to fill {wish.n_tokens} tokens")
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if wish.count_tokens(build(middle)) <= wish.n_tokens else (low, middle)
    return build(low)


def _number(rng: Rng, digits: int) -> str:
    return str(rng.integers(1, 10)) + "".join(map(str, rng.integers(0, 10, digits - 1)))


# ---- passkeys ------------------------------------------------------------------------------------------------------


def longlm(rng: Rng, wish: Wish) -> Task:
    """LongLM's passkey: lines, the key at `depth` of the filler."""
    key = _number(rng, wish.digits)

    def build(n: int) -> str:
        before = round(wish.depth * n)
        lines = [
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
            "I will quiz you about the important information there.",
            *[NOISE] * before,
            f"The pass key is {key}. Remember it. {key} is the pass key.",
            *[NOISE] * (n - before),
        ]
        return "\n".join(lines) + "What is the pass key? The pass key is "

    return Task(largest(build, wish), (key,), wish.count_tokens(key))


def llama_cpp(rng: Rng, wish: Wish) -> Task:
    """llama.cpp's passkey: one line, a key of 1 to 50000, 16 tokens for the answer."""
    key = str(rng.integers(1, 50001))

    def build(n: int) -> str:
        before = round(wish.depth * n)
        fact = f" The pass key is {key}. Remember it. {key} is the pass key."
        return (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
            "I will quiz you about the important information there."
            + f" {NOISE}" * before
            + fact
            + f" {NOISE}" * (n - before)
            + " What is the pass key? The pass key is"
        )

    return Task(largest(build, wish), (key,), 16)


def native(rng: Rng, wish: Wish) -> Task:
    """`The oak key is 48213.` in a text, as the tiny models were trained: one byte is one token there."""
    seed = int(rng.integers(2**31))

    def build(n: int) -> str:
        return make(min(n + 200, len(wish.text))).prompt  # 200: of the fact and its question

    def make(n_bytes: int) -> KeyTask:
        return key_task(np.random.default_rng(seed), wish.text, n_bytes, wish.depth, wish.digits)

    answer = make(200).answer
    return Task(largest(build, wish), (answer,), wish.count_tokens(answer))


# ---- RULER: needles in a haystack ------------------------------------------------------------------------------------


def _words(rng: Rng) -> str:
    return f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}"


def _uuid(rng: Rng) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _seven_digits(rng: Rng) -> str:
    return _number(rng, 7)


def _distinct(draw: Callable[[Rng], str], rng: Rng, n: int) -> list[str]:
    """n different draws; words run out, and then get numbers."""
    seen: dict[str, None] = {}
    while len(seen) < n:
        word = draw(rng)
        seen[word if word not in seen else f"{word}-{len(seen)}"] = None
    return list(seen)


def _needles_in_haystack(
    rng: Rng,
    wish: Wish,
    *,
    key: Callable[[Rng], str] = _words,
    value: Callable[[Rng], str] = _seven_digits,
    kind: str = "numbers",
    n_values: int = 1,
    n_queries: int = 1,
    distractors: bool = False,
) -> Task:
    """RULER's niah: needles at random places of noise, or among needles that nobody asks for (`distractors`)."""
    sentence = "One of the special magic {kind} for {key} is: {value}."
    keys = _distinct(key, rng, n_queries)
    values = [[value(rng) for _ in range(n_values)] for _ in keys]
    needles = [sentence.format(kind=kind, key=k, value=v) for k, each in zip(keys, values, strict=True) for v in each]
    query = keys[0] if n_queries == 1 else ", ".join(keys[:-1]) + f", and {keys[-1]}"
    many = n_values * n_queries > 1
    if many:
        intro = (
            f"Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards."
        )
        question = f"What are all the special magic {kind} for {query} mentioned in the provided text?"
        prefix = f" The special magic {kind} for {query} mentioned in the provided text are"
    else:
        one = kind.removesuffix("s")
        intro = (
            f"A special magic {one} is hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {one} afterwards."
        )
        question = f"What is the special magic {one} for {query} mentioned in the provided text?"
        prefix = f" The special magic {one} for {query} mentioned in the provided text is"
    others: list[str] = []
    places = [wish.depth] if len(needles) == 1 else sorted(rng.random(len(needles)).tolist())

    def build(n: int) -> str:
        while distractors and len(others) < n:
            name = key(rng) + f"-{len(others)}" * (key is _words)  # words alone would run out
            others.append(sentence.format(kind=kind, key=name, value=value(rng)))
        lines = others[:n] if distractors else [NOISE] * n
        for needle, place in sorted(zip(needles, places, strict=True), key=lambda pair: -pair[1]):
            lines.insert(round(place * n), needle)
        return f"{intro}\n" + "\n".join(lines) + f"\n{question}{prefix}"

    return Task(largest(build, wish), tuple(v for each in values for v in each), 128)


# ---- RULER: variable tracking, frequent words ------------------------------------------------------------------------


def variable_tracking(rng: Rng, wish: Wish) -> Task:
    """One chain of four hops, `VAR X1 = 12345`, `VAR X2 = VAR X1`, ..., spread over noise in order."""
    letters = list(string.ascii_uppercase)
    names = _distinct(lambda r: "".join(r.choice(letters, 5)), rng, 5)
    value = _number(rng, 5)
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
    places = sorted(rng.random(len(chain)).tolist())

    def build(n: int) -> str:
        sentences = [f"{NOISE}\n"] * n
        for sentence, place in list(zip(chain, places, strict=True))[::-1]:
            sentences.insert(round(place * n), sentence)
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            + " ".join(sentences)
            + f"\nQuestion: Find all variables that are assigned the value {value} in the text above. "
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"5 variables are assigned the value {value}, they are: "
        )

    return Task(largest(build, wish), tuple(names), 30)


def frequent_words(rng: Rng, wish: Wish) -> Task:
    """Coded words of six letters with Zipf frequencies (alpha 2); rank 1 is `...`, ranks 2 to 4 are asked for."""
    letters = list(string.ascii_lowercase)
    vocabulary = ["...", *_distinct(lambda r: "".join(r.choice(letters, 6)), rng, 1999)]
    frequency = 1.0 / np.arange(1, len(vocabulary) + 1) ** 2.0
    frequency /= frequency.sum()
    seed = int(rng.integers(2**31))

    def build(n: int) -> str:
        # As often as the frequencies say, so that the ranks are certain, in random order.
        counts = (frequency * (n + 64)).astype(int)
        words = np.repeat(np.arange(len(vocabulary)), counts)
        np.random.default_rng(seed).shuffle(words)
        return (
            "Read the following coded text and track the frequency of each coded word. "
            "Find the three most frequently appeared coded words. "
            + " ".join(vocabulary[word] for word in words)
            + "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text? "
            "Answer: According to the coded text above, the three most frequently appeared words are:"
        )

    return Task(largest(build, wish), tuple(vocabulary[1:4]), 50)


TASKS: dict[str, Callable[[Rng, Wish], Task]] = {
    "longlm": longlm,
    "llama.cpp": llama_cpp,
    "native": native,
    "niah_single_1": lambda rng, wish: _needles_in_haystack(rng, wish),
    "niah_multikey_2": lambda rng, wish: _needles_in_haystack(rng, wish, distractors=True),
    "niah_multikey_3": lambda rng, wish: _needles_in_haystack(
        rng, wish, key=_uuid, value=_uuid, kind="uuids", distractors=True
    ),
    "niah_multivalue": lambda rng, wish: _needles_in_haystack(rng, wish, n_values=4),
    "niah_multiquery": lambda rng, wish: _needles_in_haystack(rng, wish, n_queries=4),
    "vt": variable_tracking,
    "fwe": frequent_words,
}
# Tasks whose prompts have one thing to find, at a depth of one's choice.
WITH_DEPTH = ("longlm", "llama.cpp", "native", "niah_single_1", "niah_multikey_2", "niah_multikey_3")


def recall(answer: str, references: Sequence[str]) -> float:
    """RULER's score: the fraction of references that occur in the answer, in any case of letters."""
    found = [reference.lower() in answer.lower() for reference in references]
    return sum(found) / len(found)
