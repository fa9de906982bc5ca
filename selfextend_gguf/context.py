"""The seam: what `llama_cpp.Llama` sees in place of its context when a text may outgrow the trained one."""

from __future__ import annotations

from typing import Any, NoReturn

import llama_cpp
import llama_cpp._internals as internals
import numpy as np
import numpy.typing as npt

from selfextend_gguf._native import Engine, schedule_positions, schedule_stage
from selfextend_gguf.errors import SelfExtendError
from selfextend_gguf.schedule import SelfExtendConfig


class SelfExtendContext:
    """Stands in for llama_cpp's LlamaContext: applies the schedule before each decode and follows each removal.

    Everything else is the wrapped context's.
    """

    def __init__(self, context: internals.LlamaContext, engine: Engine, config: SelfExtendConfig) -> None:
        self._context = context
        self._engine = engine
        self._config = config
        # Of the step decoded last, unless keys were declared to stand elsewhere since. It survives a rollback: the keys
        # that a stage moves are older than the neighbor window, so if one of them is gone the next stage is another.
        self._stage: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def decode(self, batch: internals.LlamaBatch) -> None:
        """Decode a batch within one step of the schedule; see `schedule_step`."""
        n_cached, n_total = self._engine.n_tokens, self._engine.n_tokens + batch.n_tokens()
        stage = schedule_stage(self._config, n_cached, n_total)  # plan
        if stage != self._stage:  # else no key moves, and generating should not look at every one
            self._stage = None
            self._engine.set_key_positions(schedule_positions(self._config, n_cached, n_total))  # apply
            self._stage = stage
        self._engine.decode(batch.batch)  # run

    def adopt_key_positions(self, positions: npt.NDArray[np.int32]) -> None:
        """Declare where the keys of a restored cache stand."""
        self._stage = None
        self._engine.adopt_key_positions(positions)

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """Remove tokens [p0, p1); only an end of the text can go (p1 = -1).

        False, and nothing removed, if the tokens before p0 would lack what sliding-window layers forgot already.
        """
        p0 = max(p0, 0)
        if 0 <= p1 < self._engine.n_tokens and p0 < p1:
            raise SelfExtendError(f"Self-Extend cannot remove tokens {p0} to {p1} from the middle of the cache")
        if 0 < p0 < self._engine.n_tokens:
            window = llama_cpp.llama_model_n_swa(self._context.model.model)
            oldest = llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(self._context.ctx), 0)
            if oldest > max(0, p0 - window + 1):
                return False
        removed: bool = self._context.kv_cache_seq_rm(seq_id, p0, p1)
        if removed:
            self._engine.truncate(p0)
        return removed

    def kv_cache_clear(self) -> None:
        """Remove all tokens."""
        self._context.kv_cache_clear()
        self._engine.truncate(0)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise SelfExtendError(
            "Self-Extend keeps one sequence whose cells it positions itself: "
            "shifting, copying or keeping sequences is not possible"
        )

    kv_cache_seq_shift = kv_cache_seq_cp = kv_cache_seq_keep = _refuse
