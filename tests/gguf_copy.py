"""Changed copies of GGUF files.

The keys are copied as bytes, but for some numbers: the gguf package takes 20 s to read the 262,144 tokens of Gemma's
vocabulary. Of a file, little-endian:

    "GGUF"           u32 version   u64 tensors      u64 keys
    keys times:      string key    u32 type         value
    tensors times:   string name   u32 dimensions   u64 size of each   u32 type   u64 offset in the data
    data, which begins at a multiple of 32 bytes, as each tensor in it does

A string is its u64 length and its bytes, an array its u32 type, its u64 length and its values.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.quants import dequantize

_ALIGNMENT = 32
_SIZES = {int(kind): np.dtype(scalar).itemsize for kind, scalar in GGUFReader.gguf_scalar_to_np.items()}


def write_copy(path: Path, source: Path, **numbers: int) -> None:
    """A copy with other numbers (u32) for the keys of these last parts: `context_length` is `llama.context_length`."""
    data = bytearray(source.read_bytes())
    _set_numbers(data, numbers)
    path.write_bytes(data)


def write_f32(
    path: Path, source: Path, keeps: Callable[[str], bool], as_it_is: str | None = None, **numbers: int
) -> None:
    """Such a copy of the tensors whose names `keeps` accepts only, all in F32 but for the one named `as_it_is`."""
    data = source.read_bytes()
    at = _end_of_keys(data)
    head = bytearray(data[:at])
    _set_numbers(head, numbers)

    tensors: list[tuple[str, tuple[int, ...], int, int]] = []  # name, sizes, type, offset
    for _ in range(_unpack(data, 8, "<Q")):
        end = _end_of_value(data, at, GGUFValueType.STRING)
        name = data[at + 8 : end].decode()
        n_dims = _unpack(data, end, "<I")
        sizes = struct.unpack_from(f"<{n_dims}Q", data, end + 4)
        at = end + 4 + 8 * n_dims
        tensors.append((name, sizes, *struct.unpack_from("<IQ", data, at)))
        at += 12
    begin = _aligned(at)

    struct.pack_into("<Q", head, 8, sum(keeps(name) for name, *_ in tensors))
    content = bytearray()
    for name, sizes, kind, offset in filter(lambda tensor: keeps(tensor[0]), tensors):
        per_block, block_size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        n_bytes = math.prod(sizes) // per_block * block_size
        values = np.frombuffer(data, np.uint8, n_bytes, begin + offset)
        if name != as_it_is:
            values = dequantize(values.reshape(-1, sizes[0] // per_block * block_size), GGMLQuantizationType(kind))
            kind = GGMLQuantizationType.F32
        text = name.encode()
        head += struct.pack(f"<Q{len(text)}sI{len(sizes)}QIQ", len(text), text, len(sizes), *sizes, kind, len(content))
        content += values.tobytes()
        content += bytes(_aligned(len(content)) - len(content))
    path.write_bytes(head + bytes(_aligned(len(head)) - len(head)) + content)


def _unpack(data: bytes, at: int, what: str) -> int:
    return struct.unpack_from(what, data, at)[0]


def _aligned(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT


def _end_of_value(data: bytes, at: int, kind: int) -> int:
    if kind == GGUFValueType.STRING:
        return at + 8 + _unpack(data, at, "<Q")
    if kind == GGUFValueType.ARRAY:
        kind, n = struct.unpack_from("<IQ", data, at)
        at += 12
        if kind in _SIZES:
            return at + n * _SIZES[kind]
        for _ in range(n):
            at = _end_of_value(data, at, kind)
        return at
    return at + _SIZES[kind]


def _end_of_keys(data: bytes) -> int:
    at = 24
    for _ in range(_unpack(data, 16, "<Q")):
        at = _end_of_value(data, at, GGUFValueType.STRING)
        at = _end_of_value(data, at + 4, _unpack(data, at, "<I"))
    return at


def _set_numbers(data: bytearray, numbers: dict[str, int]) -> None:
    for name, number in numbers.items():
        key = f".{name}".encode() + struct.pack("<I", GGUFValueType.UINT32)
        struct.pack_into("<I", data, data.index(key) + len(key), number)
