"""Prompts that ask for something hidden in a long text: passkeys, and RULER's synthetic tasks that need no download.

`longlm` is the passkey prompt of LongLM (the code of arXiv 2401.01325), `llama.cpp` that of llama.cpp's
examples/passkey, `native` one that the bundled tiny models understand. The others follow RULER (arXiv 2404.06654):
its needles, templates, answer prefixes, numbers of tokens to generate, and recall. What differs:

* RULER's length counts the tokens to generate too; here a `Wish` has that of the prompt alone.
* RULER draws keys from a package of English words. Here they come from the lists below, and no two needles share a key
  until all 10000 pairs are used; the keys asked for are never used again.
* `niah_multivalue` and `niah_multiquery` hide needles in essays, which would have to be downloaded. Here it is noise.
* `niah_single_1`, `niah_multikey_2` and `niah_multikey_3` have their needle at the wished depth, not a random one.
* `vt` comes without RULER's one-shot example.
* `fwe` has 2000 coded words, RULER one for every 50 tokens; words too rare to occur make no difference.
"""

from __future__ import annotations

import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.tiny.keys import KeyTask, key_task

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ADJECTIVES = """
amber ample ancient azure bitter blunt brave breezy brisk calm candid chilly clever coarse cosy crisp curly daring
dense dim dizzy dusty eager earnest elastic fabled faint fancy feeble fierce flat fluffy frozen gentle giant glad
glossy grand grumpy hasty hidden hollow humble icy idle jagged jolly keen lame lavish lean lively lonely loud lucky
mellow merry mild misty modest muddy narrow neat nimble noisy odd pale patient plain polite proud quick quiet rapid
rare ripe rough rusty salty shiny shy silent sleepy slim smooth solid sour steep stern sturdy subtle sunny sweet tame
tidy timid tiny vivid weary witty
""".split()  # noqa: SIM905  (a list literal would take a line a word)
_NOUNS = """
acorn anchor apron arrow axle badge bakery barrel basket beacon blanket bottle bucket button cabin camel candle canoe
carpet castle cellar chimney clock cobweb compass cradle curtain dagger desk dragon drum dune easel engine envelope
falcon feather ferry fiddle flask fossil funnel gallery garlic goblet hammer hamster harp hinge igloo island ivory
jacket jungle kettle kitten ladder lantern lemon lizard magnet marble meadow mirror mitten mosaic napkin needle nutmeg
onion otter oven paddle parrot pebble pepper piano pillow pirate quarry quilt rabbit raft ribbon saddle sailor shovel
sponge spoon statue teapot thimble ticket tractor trumpet tunnel umbrella violin wagon walnut
""".split()  # noqa: SIM905  (a list literal would take a line a word)

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
    shortest = 75 + wish.digits  # bytes of the longest fact and its question
    if len(wish.text) < shortest:
        raise ConfigError(f"the text is too short: {len(wish.text)} bytes, at least {shortest} are needed")

    def make(n_bytes: int) -> KeyTask:
        return key_task(np.random.default_rng(seed), wish.text, n_bytes, wish.depth, wish.digits)

    def build(n: int) -> str:
        return make(min(shortest + n, len(wish.text))).prompt

    answer = make(shortest).answer
    return Task(largest(build, wish), (answer,), wish.count_tokens(answer))


# ---- RULER: needles in a haystack ------------------------------------------------------------------------------------


def _words(rng: Rng) -> Iterator[str]:
    """Pairs of words without end; each pair once before any comes again."""
    while True:
        for pair in rng.permutation(len(_ADJECTIVES) * len(_NOUNS)).tolist():
            yield f"{_ADJECTIVES[pair // len(_NOUNS)]}-{_NOUNS[pair % len(_NOUNS)]}"


def _numbers(rng: Rng) -> Iterator[str]:
    while True:
        yield _number(rng, 7)


def _uuids(rng: Rng) -> Iterator[str]:
    while True:
        yield str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _random_words(rng: Rng, letters: str, length: int, n: int) -> list[str]:
    """n different words of random letters."""
    seen: dict[str, None] = {}
    while len(seen) < n:
        seen["".join(rng.choice(list(letters), length))] = None
    return list(seen)


def _hide(facts: Sequence[str], places: Sequence[float], fillers: Sequence[str]) -> list[str]:
    """The fillers with the facts among them, never two facts side by side.

    `places` ascend from 0 (start) to 1 (end), one a fact; there are at least len(facts) - 1 fillers.
    """
    lines = list(fillers)
    n_free = len(fillers) - (len(facts) - 1)  # the others keep the facts apart
    for i in reversed(range(len(facts))):
        lines.insert(round(places[i] * n_free) + i, facts[i])
    return lines


def _needles_in_haystack(
    rng: Rng,
    wish: Wish,
    *,
    keys_from: Callable[[Rng], Iterator[str]] = _words,
    values_from: Callable[[Rng], Iterator[str]] = _numbers,
    kind: str = "numbers",
    n_values: int = 1,
    n_queries: int = 1,
    distractors: bool = False,
) -> Task:
    """RULER's niah: needles at random places of noise, or among needles that nobody asks for (`distractors`)."""
    sentence = "One of the special magic {kind} for {key} is: {value}."
    some_keys, some_values = keys_from(rng), values_from(rng)
    keys = list(islice(some_keys, n_queries))
    values = list(islice(some_values, n_queries * n_values))
    needles = [sentence.format(kind=kind, key=keys[i // n_values], value=v) for i, v in enumerate(values)]
    needles = [needles[i] for i in rng.permutation(len(needles))]  # not in the order of the question
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
        n_fillers = n + len(needles) - 1
        while distractors and len(others) < n_fillers:
            name = next(k for k in some_keys if k not in keys)
            others.append(sentence.format(kind=kind, key=name, value=next(some_values)))
        lines = _hide(needles, places, others[:n_fillers] if distractors else [NOISE] * n_fillers)
        return f"{intro}\n" + "\n".join(lines) + f"\n{question}{prefix}"

    return Task(largest(build, wish), tuple(values), 128)


# ---- RULER: variable tracking, frequent words ------------------------------------------------------------------------


def variable_tracking(rng: Rng, wish: Wish) -> Task:
    """One chain of four hops, `VAR X1 = 12345`, `VAR X2 = VAR X1`, ..., spread over noise in order.

    As RULER joins them, a space stands between any two parts, a line ends behind noise, and hops end with a space.
    """
    names = _random_words(rng, string.ascii_uppercase, 5, 5)
    value = _number(rng, 5)
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
    places = sorted(rng.random(len(chain)).tolist())

    def build(n: int) -> str:
        parts = _hide(chain, places, [f"{NOISE}\n"] * (n + len(chain) - 1))
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            + " ".join(parts)
            + f"\nQuestion: Find all variables that are assigned the value {value} in the text above. "
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"5 variables are assigned the value {value}, they are: "
        )

    return Task(largest(build, wish), tuple(names), 30)


def frequent_words(rng: Rng, wish: Wish) -> Task:
    """Coded words of six letters with Zipf frequencies (alpha 2); rank 1 is `...`, ranks 2 to 4 are asked for."""
    vocabulary = ["...", *_random_words(rng, string.ascii_lowercase, 6, 1999)]
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
        rng, wish, keys_from=_uuids, values_from=_uuids, kind="uuids", distractors=True
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
