"""Weights of a GGUF file, as far as llama.cpp does not look at them before it uses them."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import llama_cpp

from selfextend_gguf.errors import ModelFileError
from selfextend_gguf.ggml import function, type_name
from selfextend_gguf.stores.files import parts_of

_VECTOR = re.compile(r"norm(_\w+)?\.weight|.*\.bias")  # what is multiplied or added element by element


def check_vectors(path: Path) -> None:
    """Raise ModelFileError where the weights of a norm, or a bias, are not in f32.

    llama.cpp can compute with nothing else there, and ends the process at the first token, on a thread from which no
    error comes back.
    """
    for part in parts_of(path):
        for name, kind in _types(part):
            if _VECTOR.search(name) and kind != llama_cpp.GGML_TYPE_F32:
                raise ModelFileError(
                    f"{part} has {name} in {type_name(kind).upper()}, of which llama.cpp takes F32 alone"
                )


class _Parameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


_open = function("gguf_init_from_file", ctypes.c_void_p, ctypes.c_char_p, _Parameters)
_close = function("gguf_free", None, ctypes.c_void_p)
_count = function("gguf_get_n_tensors", ctypes.c_int64, ctypes.c_void_p)
_name_of = function("gguf_get_tensor_name", ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64)
_type_of = function("gguf_get_tensor_type", ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)


def _types(path: Path) -> Iterator[tuple[str, int]]:
    """Names and types of the tensors in a file; none if llama.cpp cannot read it, which says why elsewhere."""
    file = _open(str(path).encode(), _Parameters(no_alloc=True, ctx=None))
    if not file:
        return
    try:
        for i in range(_count(file)):
            yield _name_of(file, i).decode("utf-8", "replace"), _type_of(file, i)
    finally:
        _close(file)
