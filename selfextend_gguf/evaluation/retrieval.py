"""Retrieval over text length and depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import llama_cpp
import numpy as np

from selfextend_gguf.evaluation.tasks import TASKS, WITH_DEPTH, CountTokens, Task, Wish, recall

ANSWER_ROOM = 130  # tokens behind a prompt: no task's answer takes more than 128


@dataclass(frozen=True)
class Cell:
    """Mean recall of one length and depth, with a 95 % confidence interval."""

    n_tokens: int
    depth: float | None  # None: the task has no depth of its own
    n_trials: int
    score: float
    low: float
    high: float


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


def score(llm: llama_cpp.Llama, task: Task) -> float:
    """Recall of the greedy answer to a task."""
    return recall(greedy_answer(llm, task.prompt, task.max_tokens), task.answers)


def evaluate_grid(
    llm: llama_cpp.Llama,
    task: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    n_trials: int,
    *,
    count_tokens: CountTokens,
    seed: int = 0,
    digits: int = 5,
    text: str = "",
    on_progress: Callable[[int, float | None], None] = lambda n_tokens, depth: None,
) -> list[Cell]:
    """Score `n_trials` prompts of a task of TASKS at each length and depth.

    Args:
        lengths: Most tokens of a prompt; the context must have room for ANSWER_ROOM more.
        depths: 0 to 1; tasks with several things to find have none, and one cell a length.
        count_tokens: Number of tokens of a text.
        seed: The prompts follow from it.
        digits: Of a passkey.
        text: ASCII haystack of the task `native`.
        on_progress: Called before each cell.
    """
    cells = []
    for n_tokens in lengths:
        for number, depth in enumerate(depths if task in WITH_DEPTH else [None]):
            on_progress(n_tokens, depth)
            rng = np.random.default_rng([seed, n_tokens, number])
            scores = []
            for _ in range(n_trials):
                wish = Wish(n_tokens, count_tokens, 0.0 if depth is None else depth, digits, text)
                scores.append(score(llm, TASKS[task](rng, wish)))
            mean = float(np.mean(scores))
            cells.append(Cell(n_tokens, depth, n_trials, mean, *wilson_interval(mean, n_trials)))
    return cells
