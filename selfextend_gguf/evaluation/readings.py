"""Readings of texts that are kept as they come, and begun only where they fit a time budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import llama_cpp
import numpy as np

from selfextend_gguf.evaluation.kept import Kept
from selfextend_gguf.evaluation.readers import Losses, open_reader

_NO_MATTER = ("n_threads", "n_threads_batch", "verbose")  # to what is measured


class Readings:
    """Losses of texts read by one model."""

    def __init__(
        self,
        model_path: str,
        *,
        kept: Kept | None = None,
        seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        **arguments: Any,
    ) -> None:
        """`kept`: where results are and go; `seconds`: the budget from now on, None for none; `arguments`: of both
        `Llama` classes."""
        self._model_path, self._arguments = model_path, arguments
        self._kept = Kept(None) if kept is None else kept
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds
        self._spent: dict[str, tuple[float, int]] = {}  # seconds and tokens by method

    @property
    def seconds_left(self) -> float | None:
        """Of the budget; None without one."""
        return None if self._end is None else self._end - self._clock()

    def losses(self, method: str, text: Sequence[int], parameters: dict[str, Any] | None = None) -> Losses | None:
        """Losses (n - 1,) of `text` (n tokens), read by one of `readers.METHODS` or before.

        None: not begun, because at the speed so far it would not end within the budget. The first reading, which has no
        speed to go by, is begun while there is time.
        """
        what = self._what(method, text, parameters)
        if not self._kept.has(what) and not self._fits(method, len(text)):
            return None
        return np.array(self._kept.measured(what, lambda: self._read(method, text, parameters).tolist()))

    def _what(self, method: str, text: Sequence[int], parameters: dict[str, Any] | None) -> dict[str, Any]:
        """All that losses depend on."""
        path = Path(self._model_path)
        return {
            "model": [path.name, path.stat().st_size],
            "llama.cpp": llama_cpp.__version__,
            "arguments": {name: value for name, value in self._arguments.items() if name not in _NO_MATTER},
            "method": method,
            "parameters": parameters or {},
            "length": len(text),
            "text": crc32(np.asarray(text, np.int32).tobytes()),
        }

    def _fits(self, method: str, n_tokens: int) -> bool:
        left = self.seconds_left
        if left is None:
            return True
        # Of the same method if it has read, as a window reads each token several times.
        spent = [self._spent[method]] if method in self._spent else list(self._spent.values())
        seconds, tokens = sum(s for s, _ in spent), sum(n for _, n in spent)
        return left > (seconds / tokens * n_tokens if tokens else 0)

    def _read(self, method: str, text: Sequence[int], parameters: dict[str, Any] | None) -> Losses:
        began = self._clock()
        reader = open_reader(method, self._model_path, len(text), parameters=parameters, **self._arguments)
        try:
            losses = reader.losses(text)
        finally:
            reader.close()
        seconds, tokens = self._spent.get(method, (0.0, 0))
        self._spent[method] = seconds + self._clock() - began, tokens + len(text)
        return losses
