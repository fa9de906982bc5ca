"""A read prompt as a file: tokens, key positions and the used part of the KV cache.

    llama.cpp's sequence state | tokens, int32 (n) | key positions, int32 (n) | header, JSON | footer

The state comes first because llama.cpp writes and reads it by itself, without a second copy in memory. The footer ends
with a magic number and holds a checksum of all before it, so a file that was cut or changed anywhere is noticed before
llama.cpp sees it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import llama_cpp
import numpy as np
import numpy.typing as npt

from selfextend_gguf._native import last_error, note_log_errors
from selfextend_gguf.atomic_file import new_file
from selfextend_gguf.errors import ForeignPromptCacheError, PromptCacheError

_FORMAT = 1
_FOOTER = struct.Struct("<III8s")  # tokens, bytes of the header, CRC-32 of all before the footer, magic
_MAGIC = b"SXPROMPT"
_LLAMA_MAGIC = llama_cpp.LLAMA_STATE_SEQ_MAGIC.to_bytes(4, "little")  # first bytes of a sequence state
_CHUNK = 1 << 20  # bytes
_SAMPLES, _SAMPLE = 64, 1 << 16  # of a model file: blocks, bytes in each


@dataclass(frozen=True, eq=False)
class SavedPrompt:
    """What a file says of itself; the cache contents stay in it."""

    tokens: npt.NDArray[np.int32]  # (n_tokens,)
    key_positions: npt.NDArray[np.int32]  # (n_tokens,)
    n_ctx: int  # of the context it was read in
    made_by: dict[str, Any]  # model and settings that the cache contents depend on

    @property
    def is_grouped(self) -> bool:
        """Whether keys share positions, so that a context within the trained one cannot use them."""
        return not np.array_equal(self.key_positions, np.arange(len(self.tokens)))

    def common_prefix(self, tokens: Sequence[int] | npt.NDArray[np.int32]) -> int:
        """How many of `tokens` from the first on are those of the file."""
        n = min(len(tokens), len(self.tokens))
        differs = np.flatnonzero(self.tokens[:n] != np.asarray(tokens[:n], np.int32))
        return int(differs[0]) if len(differs) else n


@dataclass(frozen=True, eq=False)
class CopiedPrompt:
    """The same with the cache contents, in memory."""

    saved: SavedPrompt
    content: npt.NDArray[np.uint8]

    @property
    def n_bytes(self) -> int:
        """Size of the cache contents."""
        return self.content.nbytes


def copy_sequence(context: llama_cpp.llama_context_p) -> npt.NDArray[np.uint8]:
    """Cache contents of sequence 0 of a llama_context. Raises PromptCacheError."""
    content = np.empty(llama_cpp.llama_state_seq_get_size(context, 0), np.uint8)
    pointer = content.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    if llama_cpp.llama_state_seq_get_data(context, pointer, content.nbytes, 0) != content.nbytes:
        raise PromptCacheError("llama.cpp cannot copy the KV cache")
    return content


def restore_sequence(context: llama_cpp.llama_context_p, content: npt.NDArray[np.uint8]) -> None:
    """Restore a copy into the empty sequence 0 of the same llama_context. Raises PromptCacheError."""
    pointer = content.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    if llama_cpp.llama_state_seq_set_data(context, pointer, content.nbytes, 0) != content.nbytes:
        raise PromptCacheError("llama.cpp cannot restore a copy of the KV cache")


def cache_settings(model_path: str, params: llama_cpp.llama_context_params, others: Any) -> dict[str, Any]:
    """Everything that the contents of a KV cache depend on, besides tokens and key positions.

    `others`: settings of the model that change its keys (adapters, overridden metadata), as JSON.
    """
    return {
        "format": _FORMAT,
        "llama_cpp_python": llama_cpp.__version__,
        "model": model_fingerprint(model_path, Path(model_path).stat().st_mtime_ns),
        "types": [params.type_k, params.type_v],
        "rope": [
            params.rope_scaling_type,
            params.rope_freq_base,
            params.rope_freq_scale,
            params.yarn_ext_factor,
            params.yarn_attn_factor,
            params.yarn_beta_fast,
            params.yarn_beta_slow,
            params.yarn_orig_ctx,
        ],
        "swa_full": bool(params.swa_full),
        "others": others,
    }


@lru_cache(maxsize=16)
def model_fingerprint(path: str, _mtime_ns: int) -> str:
    """Of a file's size and blocks all over it: enough to tell models apart, without reading gigabytes."""
    digest = hashlib.blake2b(digest_size=16)
    with Path(path).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(str(size).encode())
        for i in range(_SAMPLES):
            file.seek(i * max(0, size - _SAMPLE) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


# ---- writing ---------------------------------------------------------------------------------------------------


def write_prompt(path: Path, context: llama_cpp.llama_context_p, saved: SavedPrompt) -> None:
    """Write what sequence 0 of a llama_context holds. The file appears whole or not at all.

    Raises OSError (disk full, no permission, ...) and PromptCacheError; an older file stays as it is then.
    """
    if len(saved.tokens) == 0:
        raise PromptCacheError("nothing was evaluated that a prompt cache could hold")
    with new_file(path) as (file, name):
        note_log_errors(True)
        try:
            written = llama_cpp.llama_state_seq_save_file(context, os.fsencode(name), 0, None, 0)
        finally:
            note_log_errors(False)
        if written == 0 or written != file.seek(0, os.SEEK_END):
            _raise_if_disk_is_full(path)
            raise PromptCacheError(f"cannot write the prompt cache {path}: {last_error() or 'it is incomplete'}")
        header = json.dumps({"n_ctx": saved.n_ctx, **saved.made_by}).encode()
        file.write(saved.tokens.tobytes() + saved.key_positions.tobytes() + header)
        checksum, _ = _checksum(file, file.tell())
        file.seek(0, os.SEEK_END)
        file.write(_FOOTER.pack(len(saved.tokens), len(header), checksum, _MAGIC))


def _raise_if_disk_is_full(path: Path) -> None:
    """llama.cpp says nothing but that it could not write."""
    with tempfile.TemporaryFile(dir=path.parent) as file:
        file.write(bytes(_CHUNK))
        file.flush()


def _checksum(file: BinaryIO, n_bytes: int) -> tuple[int, int]:
    """CRC-32 of the first `n_bytes`, and how many there were."""
    file.seek(0)
    checksum = done = 0
    while done < n_bytes and (chunk := file.read(min(_CHUNK, n_bytes - done))):
        checksum = zlib.crc32(chunk, checksum)
        done += len(chunk)
    return checksum, done


# ---- reading ---------------------------------------------------------------------------------------------------


def read_prompt_header(path: Path) -> SavedPrompt:
    """What a file holds, without reading the cache contents. Raises OSError and PromptCacheError."""
    with path.open("rb") as file:
        return _read_header(path, file)[0]


def _read_header(path: Path, file: BinaryIO) -> tuple[SavedPrompt, int, int]:
    """The header, the bytes under the checksum, the checksum."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(_LLAMA_MAGIC)) != _LLAMA_MAGIC:
        raise ForeignPromptCacheError(f"{path} is no prompt cache")
    damaged = PromptCacheError(f"the prompt cache {path} is damaged or incomplete")
    if size < _FOOTER.size:
        raise damaged
    file.seek(-_FOOTER.size, os.SEEK_END)
    n_tokens, n_header, checksum, magic = _FOOTER.unpack(file.read(_FOOTER.size))
    n_content = size - _FOOTER.size
    begin = n_content - n_header - 8 * n_tokens
    if magic != _MAGIC or begin < 0:
        raise damaged
    file.seek(begin)
    arrays = np.frombuffer(file.read(8 * n_tokens), np.int32).reshape(2, n_tokens)
    try:
        made_by = json.loads(file.read(n_header))
        n_ctx = int(made_by.pop("n_ctx"))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise damaged from None
    return SavedPrompt(arrays[0], arrays[1], n_ctx, made_by), n_content, checksum


def load_prompt_into(
    path: Path, context: llama_cpp.llama_context_p, n_ctx: int, settings: dict[str, Any]
) -> SavedPrompt:
    """Restore a file into the empty sequence 0 of a llama_context of `n_ctx` tokens.

    Raises OSError, PromptCacheError if the file is damaged or too long, and ForeignPromptCacheError if it was made by
    another model, version or kind of cache. The context may hold anything then: clear it.
    """
    with path.open("rb") as file:
        saved, n_content, checksum = _read_header(path, file)
        for name, why in _MISMATCHES.items():
            if saved.made_by.get(name) != settings[name]:
                raise ForeignPromptCacheError(f"the prompt cache {path} was made {why}")
        if len(saved.tokens) > n_ctx:
            raise PromptCacheError(
                f"the prompt cache {path} holds {len(saved.tokens)} tokens, more than the context of {n_ctx}"
            )
        if _checksum(file, n_content) != (checksum, n_content):
            raise PromptCacheError(f"the prompt cache {path} is damaged: its checksum is wrong")
        note_log_errors(True)
        try:
            n_read = llama_cpp.llama_state_seq_load_file(
                context, os.fsencode(path), 0, (ctypes.c_int32 * 1)(), 1, ctypes.byref(ctypes.c_size_t())
            )
        finally:
            note_log_errors(False)
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise PromptCacheError(f"the prompt cache {path} was replaced by another program while it was read")
    if n_read == 0:
        raise PromptCacheError(f"llama.cpp cannot restore the prompt cache {path}: {last_error()}")
    return saved


_MISMATCHES = {
    "format": "by another version of selfextend_gguf",
    "llama_cpp_python": "with another version of llama-cpp-python",
    "model": "by another model file",
    "types": "with other types of cached keys or values",
    "rope": "with other RoPE settings",
    "swa_full": "with another setting of swa_full",
    "others": "with other adapters or overridden metadata",
}
