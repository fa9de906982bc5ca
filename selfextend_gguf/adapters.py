"""LoRA adapters, loaded here because llama_cpp takes a null pointer for an adapter."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from typing import Any

import llama_cpp
import llama_cpp._internals as internals

from selfextend_gguf._native import last_error, note_log_errors
from selfextend_gguf.errors import EngineError, ModelFileError
from selfextend_gguf.model_info import check_is_gguf


def adapters_of(
    lora_path: str | None = None, lora_scale: float = 1.0, adapters: Mapping[str, float] | None = None, **_: Any
) -> dict[str, float]:
    """The scales of all adapters among the arguments of our `Llama`, by their paths."""
    return ({lora_path: lora_scale} if lora_path else {}) | dict(adapters or {})


def load_adapter(model: internals.LlamaModel, path: str) -> Any:
    """The llama_adapter_lora of a file; free it before the model. Raises ModelFileError."""
    check_is_gguf(path)
    note_log_errors(True)
    try:
        adapter = llama_cpp.llama_adapter_lora_init(model.model, os.fsencode(path))
    finally:
        note_log_errors(False)
    if not adapter:  # a pointer object, and never None
        reason = last_error() or "llama.cpp does not say why"
        raise ModelFileError(f"{path} is no LoRA adapter for this model: {reason}")
    return adapter


def set_adapters(context: internals.LlamaContext, adapters: Sequence[tuple[Any, float]]) -> None:
    """Let a context use adapters, each with its scale. Raises EngineError."""
    pointers = (llama_cpp.llama_adapter_lora_p_ctypes * len(adapters))(*(adapter for adapter, _ in adapters))
    scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
    if llama_cpp.llama_set_adapters_lora(context.ctx, pointers, len(adapters), scales) != 0:
        raise EngineError("llama.cpp could not set the LoRA adapters")
