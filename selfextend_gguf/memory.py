"""Whether a model and a context fit the memory, before anything is loaded; and if not, what would fit."""

from __future__ import annotations

import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from selfextend_gguf.config import CELL_MULTIPLE, whole_cells
from selfextend_gguf.errors import MemoryTightWarning, NotEnoughMemoryError
from selfextend_gguf.kv_cache import KV_TYPES, kv_cache_bytes, per_layer

_LARGEST_STEP = 512  # tokens llama.cpp computes at once (n_ubatch)


@dataclass(frozen=True)
class Demand:
    """What a context of a model asks for."""

    metadata: Mapping[str, str]
    weights: int  # bytes
    n_ctx: int
    n_batch: int
    type_k: int  # ggml types
    type_v: int
    flash_attn: bool
    is_mapped: bool  # weights stay in their file, which the system may drop from memory and read again

    @property
    def kv_cache(self) -> int:
        """Bytes of the KV cache."""
        return kv_cache_bytes(self.metadata, whole_cells(self.n_ctx), self.type_k, self.type_v)

    @property
    def compute(self) -> int:
        """Bytes of llama.cpp's compute buffer, about: attention scores of all heads (without flash attention), the
        mask, and the largest activations of one step."""
        arch = self.metadata["general.architecture"]

        def largest(key: str, default: int = 0) -> int:
            return max(per_layer(self.metadata, f"{arch}.{key}", default))

        n_step = min(self.n_batch, _LARGEST_STEP, self.n_ctx)
        scores = 2 if self.flash_attn else 4 * (largest("attention.head_count", 1) + 1)
        wide = max(4 * largest("feed_forward_length"), 2 * largest("embedding_length") + largest("vocab_size"))
        return n_step * (self.n_ctx * scores + 4 * wide)

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.allocated_beside

    @property
    def allocated_beside(self) -> int:
        """Bytes beside the weights, which must be memory."""
        return self.kv_cache + self.compute

    def __str__(self) -> str:
        return (
            f"{self.n_ctx} tokens need {_gib(self.total)} (weights {_gib(self.weights)}, "
            f"KV cache {_gib(self.kv_cache)}, computing {_gib(self.compute)})"
        )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 // 10 else f"{n_bytes / 2**20:.1f} MiB"


def weights_bytes(path: Path) -> int:
    """Size of a model file, or of all parts of a split one."""
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    parts = path.parent.glob(f"{match[1]}-*-of-{match[2]}.gguf") if match else [path]
    return sum(part.stat().st_size for part in parts)


def check_memory(demand: Demand) -> None:
    """Refuse what cannot fit: llama.cpp would be killed while it reads. Warn of what fits beside nothing else.

    Raises NotEnoughMemoryError, and warns with MemoryTightWarning; both name the options that would fit.
    """
    memory = psutil.virtual_memory()

    def fits(d: Demand) -> bool:
        needed_now = d.allocated_beside if d.is_mapped else d.total
        return needed_now <= memory.available and d.total <= memory.total

    def fits_easily(d: Demand) -> bool:
        return d.total <= memory.available

    if not fits(demand):
        raise NotEnoughMemoryError(
            f"{demand}, {_gib(memory.available)} of {_gib(memory.total)} of memory are available: "
            f"{_advice(demand, fits)}"
        )
    if not fits_easily(demand):
        warnings.warn(
            f"{demand}, {_gib(memory.available)} of memory are available: weights will be read from disk again and "
            f"again, which is slow; {_advice(demand, fits_easily)}",
            MemoryTightWarning,
            stacklevel=4,
        )


def _advice(demand: Demand, fits: Callable[[Demand], bool]) -> str:
    """What would fit, as options of the commands and of `Llama`."""
    advice = []
    for name in ("q8_0", "q4_0"):
        smaller = replace(demand, type_k=KV_TYPES[name], type_v=KV_TYPES[name], flash_attn=True)
        if smaller.kv_cache < demand.kv_cache and fits(smaller):
            advice.append(f"-ctk {name} -ctv {name}")
            break
    sizes = range(CELL_MULTIPLE, demand.n_ctx, CELL_MULTIPLE)
    n_fitting = bisect_right(sizes, 0, key=lambda n: not fits(replace(demand, n_ctx=n)))
    if n_fitting:
        advice.append(f"--ctx {sizes[n_fitting - 1]}")
    if not advice:
        return "take a smaller model, or close other programs"
    return f"it would fit with {' or '.join(advice)} (type_k, type_v and n_ctx of Llama)"
