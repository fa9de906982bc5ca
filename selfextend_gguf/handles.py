"""llama_cpp's owners of native objects, made safe: after `close`, and for what C would not check.

llama_cpp keeps pointers to what it has freed, and writes tokens to wherever their number says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import llama_cpp
import llama_cpp._internals as internals
import numpy as np

from selfextend_gguf.checks import shown
from selfextend_gguf.errors import ClosedError, ConfigError, TextError


class Handle:
    """A pointer that its owner sets to None when it is closed; reading it then raises ClosedError.

    Whatever reaches a native object reads its handle, so nothing else has to ask whether it is still there.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self
        handle = vars(owner).get(self._name)
        if handle is None:
            raise ClosedError("the model is closed")
        return handle

    def __set__(self, owner: Any, handle: Any) -> None:
        vars(owner)[self._name] = handle


class Model(internals.LlamaModel):
    """A model; its vocabulary goes with it."""

    model = Handle()

    @property
    def vocab(self) -> llama_cpp.llama_vocab_p:
        """The llama_vocab."""
        return cast(llama_cpp.llama_vocab_p, llama_cpp.llama_model_get_vocab(self.model))

    @vocab.setter
    def vocab(self, _: Any) -> None:
        pass  # theirs is kept beyond the model's end

    def close(self) -> None:
        """Free the model, after its contexts."""
        internals.LlamaModel.close(self)


class Context(internals.LlamaContext):
    """A context; its memory goes with it."""

    ctx = Handle()

    @property
    def memory(self) -> llama_cpp.llama_memory_t | None:
        """The llama_memory; None for models that keep none."""
        return cast("llama_cpp.llama_memory_t | None", llama_cpp.llama_get_memory(self.ctx))

    @memory.setter
    def memory(self, _: Any) -> None:
        pass


class Batch(internals.LlamaBatch):
    """A batch; no token is written outside it."""

    batch = Handle()

    def set_batch(self, batch: Sequence[int], n_past: int, logits_all: bool) -> None:
        """Hold these tokens alone."""
        self._check_room(0, len(batch))
        super().set_batch(batch, n_past, logits_all)

    def add_sequence(self, batch: Sequence[int], seq_id: int, logits_all: bool) -> None:
        """Hold these tokens too."""
        self._check_room(self.n_tokens(), len(batch))
        super().add_sequence(batch, seq_id, logits_all)

    def _check_room(self, n_held: int, n_new: int) -> None:
        if n_new == 0:
            raise ConfigError("a text without tokens cannot be evaluated")
        if n_held + n_new > self._n_tokens:
            raise ConfigError(f"a batch holds at most {self._n_tokens} tokens, not {n_held + n_new}")


def ask_for_logits(batch: internals.LlamaBatch, n: int) -> None:
    """Of the last `n` tokens of a batch."""
    for i in range(batch.n_tokens() - n, batch.n_tokens()):
        batch.batch.logits[i] = True


_SAFE = {internals.LlamaModel: Model, internals.LlamaContext: Context, internals.LlamaBatch: Batch}


def make_safe(owner: Any) -> None:
    """Make an object that llama_cpp has made one of the classes above."""
    owner.__class__ = _SAFE.get(type(owner), type(owner))


def check_tokens(tokens: Any, n_vocab: int) -> list[int]:
    """Tokens as a list. Raises TextError for what is no list of tokens of a vocabulary of `n_vocab`."""
    try:
        array = np.asarray(tokens)
    except ValueError:
        array = np.empty(())
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TextError(f"tokens must be a list of whole numbers, not {shown(tokens)}")
    wrong = np.flatnonzero((array < 0) | (array >= n_vocab))
    if wrong.size:
        raise TextError(f"{array[wrong[0]]} is no token of the model (0 to {n_vocab - 1})")
    return [int(token) for token in array]
