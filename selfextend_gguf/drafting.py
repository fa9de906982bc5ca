"""Speculative decoding: guesses at what comes next, several tokens of which are evaluated in one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp.llama_speculative import LlamaDraftModel


class PromptLookup(LlamaDraftModel):
    """Guesses that a text goes on as it did where its latest tokens occurred before: prompt lookup decoding.

    A wrong guess costs nearly as much as reading its tokens, which on a CPU is much, so guesses follow what came true
    lately: they begin short and grow while they are right, and more tokens must match after each that was wrong.
    (`LlamaPromptLookupDecoding` of llama_cpp guesses ten tokens wherever the last one occurred: docs/sampling.md
    compares them.)
    """

    SHORTEST, LONGEST = 1, 16  #: tokens of a guess
    FEWEST, MOST = 3, 8  #: tokens that match where a guess comes from

    def __init__(self) -> None:
        self._n_guess, self._n_match = self.SHORTEST, self.FEWEST
        self._guess = np.zeros(0, np.intc)
        self._n_before = 0  # tokens before the guess

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        if len(self._guess):
            self._learn(input_ids[self._n_before :])
        begin = _after_latest_match(input_ids, self._n_match)
        self._guess = input_ids[begin : begin + self._n_guess].copy()
        self._n_before = len(input_ids)
        return self._guess

    def _learn(self, came: npt.NDArray[np.intc]) -> None:
        """From what came after the last guess's place."""
        guess = self._guess[: len(came)]
        wrong = np.flatnonzero(guess != came[: len(guess)])
        n_right = int(wrong[0]) if len(wrong) else len(guess)
        if n_right == 0:
            self._n_guess, self._n_match = self.SHORTEST, min(self._n_match + 1, self.MOST)
        elif n_right == len(self._guess):
            self._n_guess, self._n_match = min(2 * self._n_guess, self.LONGEST), self.FEWEST
        else:
            self._n_guess = max(n_right, self.SHORTEST)


def _after_latest_match(tokens: npt.NDArray[np.intc], n: int) -> int:
    """Where the text goes on after the latest other place of its last `n` tokens; its end if there is none."""
    n_places = len(tokens) - n  # of that many tokens, but for the last
    if n_places < 1:
        return len(tokens)
    matches = np.logical_and.reduce([tokens[i : i + n_places] == tokens[n_places + i] for i in range(n)])
    places = np.flatnonzero(matches)
    return int(places[-1]) + n if len(places) else len(tokens)


class StepLimitedDraft(LlamaDraftModel):
    """A draft model that guesses no further than the next step reaches.

    `llama_cpp.Llama` samples every guessed token from the logits of one decode, so a guess must not cross into a
    second one.
    """

    def __init__(self, draft_model: LlamaDraftModel, step_after: Callable[[int], int]) -> None:
        """`step_after(n_cached)` = tokens that the next step can take."""
        self.draft_model = draft_model
        self._step_after = step_after
        self.n_guessed = 0  #: tokens of the latest guess, which the next step evaluates after the last token

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        # All but the last of the tokens are cached; that one is decoded together with the guesses.
        room = self._step_after(len(input_ids) - 1) - 1
        guess = np.asarray(self.draft_model(input_ids, **kwargs))[:room]
        self.n_guessed = len(guess)
        return guess
