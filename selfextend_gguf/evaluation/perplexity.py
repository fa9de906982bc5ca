"""Perplexity by text length and by position, of several ways to read the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.readers import Losses
from selfextend_gguf.evaluation.readings import Readings


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        digits = 3 if self.value < 10 else 2 if self.value < 100 else 0
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


def perplexity(losses: Losses) -> Estimate:
    """exp of the mean loss (nats, shape (n,)), with the standard error of the mean carried over (delta method).

    Like llama.cpp's: losses of neighbouring tokens are taken as independent.
    """
    mean = exp(losses.mean())
    return Estimate(mean, mean * float(losses.std()) / sqrt(len(losses)))


def perplexity_ratio(losses: Losses, reference: Losses) -> Estimate:
    """Perplexity in relation to that of the same tokens read in another way, from paired losses: its standard error is
    that of the differences, which vary far less than the losses themselves."""
    ratio = exp((losses - reference).mean())
    return Estimate(ratio, ratio * float((losses - reference).std()) / sqrt(len(losses)))


def second_half(losses: Losses) -> Losses:
    """Losses (..., n) of the tokens that have at least as much text before them as after them."""
    return losses[..., losses.shape[-1] // 2 :]


@dataclass(frozen=True)
class LengthResult:
    """One method at one text length. Losses are those of the second halves of the texts."""

    method: str
    n_tokens: int
    perplexity: Estimate
    ratio: Estimate  # to the first method of the comparison
    losses: Losses  # (n_texts, n_tokens - 1) of whole texts, for plots


def stretches(tokens: Sequence[int], n_tokens: int, n_texts: int, bos: int | None = None) -> list[list[int]]:
    """Up to `n_texts` stretches of `n_tokens`, spread evenly and not overlapping. ConfigError if there is none.

    `bos`, if the vocabulary wants one, takes the place of the first token of each, as in llama.cpp's perplexity.
    """
    if n_tokens > len(tokens):
        raise ConfigError(f"the text has {len(tokens)} tokens, {n_tokens} were asked for")
    n_texts = min(n_texts, len(tokens) // n_tokens)
    starts = np.linspace(0, len(tokens) - n_tokens, n_texts).astype(int)
    texts = [list(tokens[start : start + n_tokens]) for start in starts]
    return texts if bos is None else [[bos, *text[1:]] for text in texts]


def compare(
    readings: Readings,
    tokens: Sequence[int],
    methods: Sequence[str],
    lengths: Sequence[int],
    *,
    n_texts: int = 1,
    bos: int | None = None,
    on_progress: Callable[[str, int], None] = lambda method, n_tokens: None,
    parameters: dict[str, Any] | None = None,
) -> Iterator[LengthResult]:
    """Read stretches of a text by each of `methods` (see `readers.METHODS`) at each length. After each reading comes
    its method's result at that length so far, in place of the one before.

    A method reads a stretch if the first one did, and both read those before it: where the budget of `readings` ends, a
    result is of fewer stretches, and there is none of what read nothing.

    Args:
        tokens: The whole text; ConfigError if a length is beyond it, or beyond the reach of a method.
        n_texts: Stretches a length.
        bos: The token that the vocabulary wants before each of them, if it wants one.
        on_progress: Called before each reading with the method and the length.
        parameters: Of Self-Extend.
    """
    texts = {n_tokens: stretches(tokens, n_tokens, n_texts, bos) for n_tokens in lengths}
    readings.check_reach(methods, lengths, parameters)
    for n_tokens in lengths:
        read: dict[str, list[Losses]] = {method: [] for method in methods}
        first = read[methods[0]]
        for number, text in enumerate(texts[n_tokens]):
            for method in methods:
                if len(read[method]) < number or (method != methods[0] and len(first) == number):
                    continue
                on_progress(method, n_tokens)
                losses = readings.losses(method, text, parameters)
                if losses is not None:
                    read[method].append(losses)
                    yield _result(method, n_tokens, np.stack(read[method]), np.stack(first[: number + 1]))


def _result(method: str, n_tokens: int, losses: Losses, reference: Losses) -> LengthResult:
    late = second_half(losses).ravel()
    ratio = perplexity_ratio(late, second_half(reference).ravel())
    return LengthResult(method, n_tokens, perplexity(late), ratio, losses)


def by_position(losses: Losses, n_bins: int = 40) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Perplexity against position: middles (n_bins,) of intervals of equal ratio, and the perplexity in each.

    `losses` (n_texts, n_tokens - 1). Intervals start at position 16, where there is some context.
    """
    edges = np.unique(np.geomspace(16, losses.shape[1], n_bins + 1).astype(int))
    middles = np.sqrt(edges[:-1] * edges[1:])
    return middles, np.array([exp(losses[:, a:b].mean()) for a, b in pairwise(edges)])
