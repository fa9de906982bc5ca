"""Speculative decoding across a move of the boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp.llama_speculative import LlamaDraftModel


class StepLimitedDraft(LlamaDraftModel):
    """A draft model that guesses no further than the next step reaches.

    `llama_cpp.Llama` samples every guessed token from the logits of one decode, so a guess must not cross into a
    second one.
    """

    def __init__(self, draft_model: LlamaDraftModel, step_after: Callable[[int], int]) -> None:
        """`step_after(n_cached)` = tokens that the next step can take."""
        self.draft_model = draft_model
        self._step_after = step_after

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        # All but the last of the tokens are cached; that one is decoded together with the guesses.
        room = self._step_after(len(input_ids) - 1) - 1
        return np.asarray(self.draft_model(input_ids, **kwargs))[:room]
