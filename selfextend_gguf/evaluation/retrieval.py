"""Retrieval over text length and depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import llama_cpp
import numpy as np

from selfextend_gguf.evaluation.hidden_keys import Quiz, filled, told
from selfextend_gguf.evaluation.readings import Readings
from selfextend_gguf.evaluation.tasks import TASKS, WITH_DEPTH, Wish, recall
from selfextend_gguf.tokenizer import Tokenizer

PLAIN = "plain"  # of readers.METHODS: as every method reads within the trained context
Grades = list[tuple[float | None, float]]  # of an exam: depth and recall of each answer


@dataclass(frozen=True)
class Exam:
    """A quiz with what the answers should be."""

    quiz: Quiz
    references: list[tuple[str, ...]]  # a question: what its answer should hold
    depths: list[float | None]  # where it stands, 0 = start, 1 = end; None: nowhere in particular


@dataclass(frozen=True)
class Score:
    """Mean recall of so many answers, with a 95 % confidence interval."""

    n_trials: int
    score: float
    low: float
    high: float

    @classmethod
    def of(cls, recalls: Sequence[float]) -> Score:
        mean = float(np.mean(recalls))
        return cls(len(recalls), mean, *wilson_interval(mean, len(recalls)))


@dataclass(frozen=True)
class Retrieved:
    """One method at one text length."""

    method: str
    n_tokens: int
    n_texts: int
    score: Score
    by_depth: dict[float, Score]


def wilson_interval(score: float, n: int) -> tuple[float, float]:
    """95 % interval of a fraction of n trials (E. B. Wilson, 1927); for mean recalls of several answers it is wide."""
    z = 1.959964
    middle = (score + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(score * (1 - score) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def greedy_answer(llm: llama_cpp.Llama, prompt: str, max_tokens: int) -> str:
    """The likeliest continuation of a prompt, which is completed as it is, without chat template or special tokens."""
    tokens = llm.tokenize(prompt.encode(), special=False)
    answer: Any = llm.create_completion(tokens, max_tokens=max_tokens, temperature=0.0)
    return str(answer["choices"][0]["text"])


# ---- exams -----------------------------------------------------------------------------------------------------------


def key_exams(
    tokenizer: Tokenizer, n_tokens: int, *, text: str, n_texts: int, n_depths: int, digits: int, seed: int
) -> Iterator[Exam]:
    """Texts of `n_tokens`, questions and answers included, with many keys each, whose depths are rounded to the middles
    of `n_depths` equal parts. `text` is repeated where it is too short."""
    tokens = tokenizer.tokens(text)
    tokens = tokenizer.tokens("\n".join([text] * (1 + n_tokens // len(tokens))))
    for number in range(n_texts):
        rng = np.random.default_rng([seed, n_tokens, number])
        quiz = filled(tokenizer, tokens, n_tokens, rng=rng, digits=digits)
        n = len(quiz.answers)
        depths = [((2 * i + 1) * n_depths // (2 * n) + 0.5) / n_depths for i in range(n)]
        yield Exam(quiz, [(answer,) for answer in quiz.answers], [*depths])


def task_exams(
    tokenizer: Tokenizer,
    task: str,
    n_tokens: int,
    *,
    n_trials: int,
    depths: Sequence[float],
    digits: int,
    seed: int,
    text: str,
) -> Iterator[Exam]:
    """`n_trials` prompts of one of TASKS for each depth, if it is a task with depths; `n_tokens` with their answers.

    `text`: ASCII haystack of the task `native`. ConfigError if `n_tokens` have no room for the task.
    """

    def count(part: str) -> int:
        return len(tokenizer.tokens(part))

    for trial in range(n_trials):
        for number, depth in enumerate(depths if task in WITH_DEPTH else [None]):
            room = 0
            for _ in range(2):  # the first one says how long its answer may be
                rng = np.random.default_rng([seed, n_tokens, number, trial])
                made = TASKS[task](rng, Wish(n_tokens - room, count, depth or 0.0, digits, text))
                room = made.max_tokens
            *tokens, last = tokenizer.tokens(made.prompt)
            yield Exam(Quiz(tokens, [[last]], answer_tokens=room), [made.answers], [depth])


# ---- answers ---------------------------------------------------------------------------------------------------------


def methods_at(n_tokens: int, n_ctx_train: int, methods: Sequence[str]) -> Sequence[str]:
    """Those of `methods` that differ at a length: within the trained context all read as plain llama.cpp does."""
    return methods if n_tokens > n_ctx_train else (PLAIN,)


def retrieve(
    readings: Readings,
    exams: Callable[[int], Iterator[Exam]],
    methods: Sequence[str],
    lengths: Sequence[int],
    *,
    tokenizer: Tokenizer,
    on_progress: Callable[[str, int], None] = lambda method, n_tokens: None,
    parameters: dict[str, Any] | None = None,
) -> Iterator[Retrieved]:
    """Let each of `methods` (see `readers.METHODS`) take the exams of each length. After each exam comes its method's
    result at that length so far, in place of the one before; there is none of exams beyond the budget of `readings`.

    Args:
        exams: Those of a length in tokens, with answers.
        lengths: ConfigError if one is beyond the reach of a method.
        on_progress: Called before each reading with the method and the length.
        parameters: Of Self-Extend.
    """
    readings.check_reach(methods, lengths, parameters)
    for n_tokens in lengths:
        graded: dict[str, list[Grades]] = {m: [] for m in methods_at(n_tokens, readings.n_ctx_train, methods)}
        for number, exam in enumerate(exams(n_tokens)):
            if max(map(len, graded.values())) < number:
                break  # no time for any more
            for method, grades in graded.items():
                if len(grades) < number:  # each takes the same ones, from the first on
                    continue
                on_progress(method, n_tokens)
                quiz = exam.quiz
                answers = readings.measured(
                    {"measure": "answers", **quiz.asked},
                    partial(told, tokenizer=tokenizer, quiz=quiz),
                    method,
                    quiz.tokens,
                    n_ctx=n_tokens,
                    parameters=parameters,
                )
                if answers is not None:
                    grades.append(list(zip(exam.depths, map(recall, answers, exam.references), strict=True)))
                    yield _result(method, n_tokens, grades)


def _result(method: str, n_tokens: int, graded: Sequence[Grades]) -> Retrieved:
    grades = [grade for exam in graded for grade in exam]
    by_depth = {
        depth: Score.of([recalled for at, recalled in grades if at == depth])
        for depth in sorted({at for at, _ in grades if at is not None})
    }
    return Retrieved(method, n_tokens, len(graded), Score.of([recalled for _, recalled in grades]), by_depth)
