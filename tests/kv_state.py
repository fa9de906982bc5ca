"""Keys inside a sequence state of llama.cpp (`llama_state_seq_get_data`): read them out, put others in.

A state holds one cache after the other; the first is the one of the global layers, behind it comes the cache of
sliding-window layers, if there is one. Integers are little-endian, sizes in bytes:

    u32 magic         i32 sequence
    u32 streams (1)   u32 cells
    cells times:      i32 position   u32 sequences   i32 sequence (as often as that)
    u32 transposed V  u32 layers
    layers times:     i32 type of K  u64 size of a row  rows of all cells
    ... values, other caches
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np


def _key_rows(state: bytes) -> Iterator[tuple[slice, int]]:
    """Where the keys of each layer lie, and the size of their rows."""
    _, _, n_streams, n_cells = struct.unpack_from("<IiII", state)
    if n_streams != 1:
        raise ValueError(f"a state of {n_streams} streams; only one is read here")
    at = 16
    for _ in range(n_cells):
        _, n_sequences = struct.unpack_from("<iI", state, at)
        at += 8 + 4 * n_sequences
    _, n_layers = struct.unpack_from("<II", state, at)
    at += 8
    for _ in range(n_layers):
        kind, row_size = struct.unpack_from("<iQ", state, at)
        if kind != 0:  # GGML_TYPE_F32
            raise ValueError(f"keys of type {kind}; only f32 caches are read here")
        at += 12
        yield slice(at, at + n_cells * row_size), row_size
        at += n_cells * row_size


def read_keys(state: bytes) -> list[np.ndarray]:
    """Keys of each layer of the first cache: float32 (n_cells, row)."""
    return [np.frombuffer(state[where], "<f4").reshape(-1, size // 4) for where, size in _key_rows(state)]


def write_keys(state: bytes, keys: Sequence[np.ndarray]) -> bytes:
    """The state with other keys of the same shapes; everything else stays."""
    changed = bytearray(state)
    for (where, _), rows in zip(_key_rows(state), keys, strict=True):
        changed[where] = rows.astype("<f4").tobytes()
    return bytes(changed)
