"""Functions of ggml, which llama_cpp does not bind."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as c_api


def function(name: str, result: object, *arguments: object) -> Any:
    """A function of the ggml that llama.cpp is linked to, with the types of its result and its arguments."""
    found = c_api._lib[name]
    found.restype, found.argtypes = result, arguments
    return found


_name = function("ggml_type_name", ctypes.c_char_p, ctypes.c_int)
_block = function("ggml_blck_size", ctypes.c_int64, ctypes.c_int)
_size = function("ggml_type_size", ctypes.c_size_t, ctypes.c_int)


def type_name(ggml_type: int) -> str:
    """ggml's name of one of its types, e.g. "q8_0"."""
    name: bytes = _name(ggml_type)
    return name.decode()


def block_of(ggml_type: int) -> tuple[int, int]:
    """Elements of a block of a type, and its bytes."""
    return _block(ggml_type), _size(ggml_type)
