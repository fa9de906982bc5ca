"""Keys hidden in a text that is read once: its perplexity without them, and which of them are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.readers import Reader
from selfextend_gguf.tiny.keys import FACT, KEY_NAMES, QUESTION, random_value
from selfextend_gguf.tokenizer import Tokenizer

_TOKENS_A_KEY = 128  # a shorter text holds fewer keys, or it would hold little else


class Key(NamedTuple):
    """A sentence to hide, and how it is asked for."""

    sentence: str
    question: str
    answer: str


@dataclass(frozen=True)
class Quiz:
    """A text to read once, and questions to ask at its end, one after the other."""

    tokens: list[int]
    questions: list[list[int]]
    #: For an answer; this many are enough for five digits, each a token of its own, and what may stand before them.
    answer_tokens: int = field(default=8, kw_only=True)

    @property
    def asked(self) -> dict[str, Any]:
        """What answers depend on besides the tokens of the text."""
        return {"questions": self.questions, "answer_tokens": self.answer_tokens}


@dataclass(frozen=True)
class KeyText(Quiz):
    """A text with hidden keys."""

    answers: list[str]
    is_text: npt.NDArray[np.bool_]  # (n_tokens,): not part of a key's sentence


def hide(tokenizer: Tokenizer, text: Sequence[int], n_tokens: int, keys: Sequence[Key]) -> KeyText:
    """The beginning of `text` with a key in the middle of each of as many equal parts as there are keys, `n_tokens` in
    all. ConfigError if the text is too short, or the keys leave no room for it."""
    sentences = [tokenizer.tokens(key.sentence, begins=False) for key in keys]
    n_text = n_tokens - sum(map(len, sentences))
    if not len(keys) < n_text <= len(text):
        raise ConfigError(f"{n_tokens} tokens with {len(keys)} keys need a text of {n_text}, not of {len(text)}")
    cuts = ((np.arange(len(keys)) + 0.5) / len(keys) * n_text).astype(int)
    tokens: list[int] = []
    is_text: list[bool] = []
    for begin, end, sentence in zip([0, *cuts], [*cuts, n_text], [*sentences, []], strict=True):
        tokens += [*text[begin:end], *sentence]
        is_text += [True] * (end - begin) + [False] * len(sentence)
    if tokenizer.bos is not None:
        tokens[0] = tokenizer.bos
    questions = [tokenizer.tokens(key.question, begins=False) for key in keys]
    return KeyText(tokens, questions, [key.answer for key in keys], np.array(is_text))


def filled(
    tokenizer: Tokenizer,
    text: Sequence[int],
    n_ctx: int,
    *,
    rng: np.random.Generator,
    most_keys: int = len(KEY_NAMES),
    digits: int = 5,
) -> KeyText:
    """The beginning of `text` with random keys that, with any question about them and its answer, fills a context of
    `n_ctx` tokens. ConfigError if `text` is too short, or `n_ctx` are too few for one key."""
    keys = []
    for name in rng.choice(KEY_NAMES, max(1, min(most_keys, n_ctx // _TOKENS_A_KEY)), replace=False):
        value = random_value(rng, digits)
        sentence, question = FACT.format(name=name, value=value), QUESTION.format(name=name)
        keys.append(Key(f"\n{sentence}\n", "\n" + question.rstrip(), value))
    longest = max(len(tokenizer.tokens(key.question, begins=False)) for key in keys)
    n_answer = digits + Quiz.answer_tokens - 5
    n_sentences = sum(len(tokenizer.tokens(key.sentence, begins=False)) for key in keys)
    n_tokens = n_ctx - longest - n_answer
    if n_tokens <= n_sentences + len(keys):
        raise ConfigError(f"{n_ctx} tokens have no room for a key, a question about it and an answer")
    return replace(hide(tokenizer, text, n_tokens, keys), answer_tokens=n_answer)


def told(reader: Reader, tokenizer: Tokenizer, quiz: Quiz, n_tokens: int | None = None) -> list[str]:
    """What greedy decoding answers to each question at the end of the text, in `n_tokens` [as the quiz says]."""
    answers = reader.answers(quiz.tokens, quiz.questions, quiz.answer_tokens if n_tokens is None else n_tokens)
    return [tokenizer.detokenize(answer).decode("utf-8", "replace") for answer in answers]


def found(text: KeyText, answers: Sequence[str]) -> list[bool]:
    """Which keys the answers hold."""
    return [wanted in answer for wanted, answer in zip(text.answers, answers, strict=True)]
