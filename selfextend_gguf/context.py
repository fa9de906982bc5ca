"""The seam: what `llama_cpp.Llama` sees in place of its context when a text may outgrow the trained one."""

from __future__ import annotations

from typing import Any

import llama_cpp
import llama_cpp._internals as internals

from selfextend_gguf._native import Engine
from selfextend_gguf.config import SelfExtendConfig
from selfextend_gguf.errors import SelfExtendError


class SelfExtendContext:
    """Stands in for llama_cpp's LlamaContext: applies the schedule before each decode and follows each removal.

    Everything else is the wrapped context's.
    """

    def __init__(self, context: internals.LlamaContext, engine: Engine, config: SelfExtendConfig) -> None:
        self._context = context
        self._engine = engine
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def decode(self, batch: internals.LlamaBatch) -> None:
        """Decode a batch within one step of the schedule; see `schedule_step`."""
        self._engine.apply_schedule(self._config, self._engine.n_tokens + batch.n_tokens())
        self._engine.decode(batch.batch)

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
        removed = self._context.kv_cache_seq_rm(seq_id, p0, p1)
        if removed:
            self._engine.truncate(p0)
        return removed

    def kv_cache_clear(self) -> None:
        """Remove all tokens."""
        self._context.kv_cache_clear()
        self._engine.truncate(0)

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise SelfExtendError(
            "Self-Extend keeps one sequence whose cells it positions itself: "
            "shifting, copying or keeping sequences is not possible"
        )

    kv_cache_seq_shift = kv_cache_seq_cp = kv_cache_seq_keep = _refuse
