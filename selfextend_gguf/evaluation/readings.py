"""Readings of texts that are kept as they come, and begun only where they fit a time budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np

from selfextend_gguf.evaluation.kept import Kept, made_by
from selfextend_gguf.evaluation.readers import Losses, Reader, open_reader, resolved
from selfextend_gguf.model_info import ModelInfo

_SLOWER = {"window", "loop"}  # methods: reads each token several times, reads few tokens at once
_NO_MATTER = ("n_threads", "n_threads_batch", "verbose")  # to what is measured


class Readings:
    """What one model makes of texts."""

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
        `Llama` classes. Raises ModelFileError."""
        self._model_path, self._arguments = model_path, arguments
        self._kept = Kept(None) if kept is None else kept
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds
        self._spent: dict[str, dict[int, float]] = {}  # most seconds, by method and tokens
        with ModelInfo(model_path, kv_overrides=arguments.get("kv_overrides")) as info:
            self.n_ctx_train = info.n_ctx_train

    @property
    def seconds_left(self) -> float | None:
        """Of the budget; None without one."""
        return None if self._end is None else self._end - self._clock()

    def check_reach(
        self, methods: Sequence[str], lengths: Sequence[int], parameters: dict[str, Any] | None = None
    ) -> None:
        """Raises ConfigError if one of the methods does not reach one of the lengths."""
        for n_tokens in lengths:
            for method in methods:
                resolved(method, self.n_ctx_train, n_tokens, parameters)

    def losses(self, method: str, text: Sequence[int], parameters: dict[str, Any] | None = None) -> Losses | None:
        """Losses (n - 1,) of `text` (n tokens), read by one of `readers.METHODS` or before; None as `measured`."""
        losses = self.measured(
            {"measure": "losses"}, lambda reader: reader.losses(text).tolist(), method, text, parameters=parameters
        )
        return None if losses is None else np.array(losses)

    def measured(
        self,
        what: Mapping[str, object],
        measure: Callable[[Reader], Any],
        method: str,
        text: Sequence[int],
        *,
        n_ctx: int | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> Any:
        """The result of `measure` on a reader of `text` in a context of `n_ctx` tokens [those of the text]: not None,
        and something that JSON can hold. `what` else it depends on is told apart from other results.

        None: not begun, because it might not end within the budget. The first reading, which has no speed to go by, is
        begun while there is time. Raises ConfigError where the method does not reach so far.
        """
        n_ctx = len(text) if n_ctx is None else n_ctx
        depends_on = {
            **what,
            **made_by(self._model_path),
            "arguments": {name: value for name, value in self._arguments.items() if name not in _NO_MATTER},
            "method": method,
            # Those that are used, not those that are given: another version may choose others.
            "parameters": resolved(method, self.n_ctx_train, n_ctx, parameters),
            "n_ctx": n_ctx,
            "text": [len(text), crc32(np.asarray(text, np.int32).tobytes())],
        }
        left = self.seconds_left
        if not self._kept.has(depends_on) and left is not None and left <= self.estimate(method, len(text)):
            return None
        seconds, result = self._kept.measured(depends_on, lambda: self._read(measure, method, n_ctx, parameters))
        spent = self._spent.setdefault(method, {})  # kept ones tell the speed as well
        spent[len(text)] = max(spent.get(len(text), 0), seconds)
        return result

    def estimate(self, method: str, n_tokens: int) -> float:
        """Seconds that a reading may take at most, by those so far; 0 if there was none yet."""
        alike = {method} if method in _SLOWER else self._spent.keys() - _SLOWER
        known = [spent for by in (alike & self._spent.keys() or self._spent) for spent in self._spent[by].items()]
        # A reading takes a*n + b*n*n seconds, the second for attention, with unknown shares. A longer one takes most if
        # all is attention, a shorter one if nothing is. Of these bounds the lowest is the nearest.
        ratios = [(n_tokens / n, seconds) for n, seconds in known]
        return min((seconds * ratio * max(ratio, 1) for ratio, seconds in ratios), default=0)

    def _read(
        self, measure: Callable[[Reader], Any], method: str, n_ctx: int, parameters: dict[str, Any] | None
    ) -> tuple[float, Any]:
        """Seconds that it took, and the result."""
        began = self._clock()
        reader = open_reader(method, self._model_path, n_ctx, parameters=parameters, **self._arguments)
        try:
            result = measure(reader)
        finally:
            reader.close()
        return self._clock() - began, result
