"""Whether a model and a context fit the memory, before anything is loaded; and if not, what would fit."""

from __future__ import annotations

import contextlib
import sys
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfextend_gguf.adapters import adapters_of
from selfextend_gguf.devices import placement
from selfextend_gguf.errors import MemoryTightWarning, NotEnoughMemoryError
from selfextend_gguf.kv_cache import KV_TYPES, kv_cache_bytes, per_layer
from selfextend_gguf.machine_memory import memory
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.planning import CELL_MULTIPLE, whole_cells
from selfextend_gguf.stores.files import parts_of

_LARGEST_STEP = 512  # tokens llama.cpp computes at once (n_ubatch) unless told otherwise
_PAGE = 4096  # bytes


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
    n_ubatch: int = _LARGEST_STEP
    n_vocab: int = 0
    all_logits: bool = False  # llama.cpp gives those of all tokens of a batch: `logits_all`, embeddings
    keeps_logits: bool = False  # and they are kept for all of the context: `logits_all`

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

        n_step = min(self.n_batch, self.n_ubatch, self.n_ctx)
        scores = 2 if self.flash_attn else 4 * (largest("attention.head_count", 1) + 1)
        wide = max(4 * largest("feed_forward_length"), 2 * largest("embedding_length") + largest("vocab_size"))
        return n_step * (self.n_ctx * scores + 4 * wide)

    @property
    def logits(self) -> int:
        """Bytes of the logits of more than one token: llama.cpp's of a batch, and the kept ones."""
        n_batch = min(self.n_batch, self.n_ctx)
        n_rows = n_batch * self.all_logits + whole_cells(self.n_ctx) * self.keeps_logits
        return 4 * self.n_vocab * n_rows

    @property
    def batch(self) -> int:
        """Bytes of llama_cpp's batch: of each token a list as long as the context, of which the first page is used."""
        return min(self.n_batch, self.n_ctx) * min(4 * whole_cells(self.n_ctx), _PAGE)

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.allocated_beside

    @property
    def allocated_beside(self) -> int:
        """Bytes beside the weights, which must be memory."""
        return self.kv_cache + self.compute + self.logits + self.batch

    def __str__(self) -> str:
        logits = f", logits of all tokens {gib(self.logits)}" if self.logits else ""
        return (
            f"{self.n_ctx} tokens need {gib(self.total)} (weights {gib(self.weights)}, "
            f"KV cache {gib(self.kv_cache)}, computing {gib(self.compute + self.batch)}{logits})"
        )


def gib(n_bytes: int) -> str:
    """A size for people to read."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 // 10 else f"{n_bytes / 2**20:.1f} MiB"


def weights_bytes(path: Path) -> int:
    """Size of a model file, or of all parts of a split one."""
    return sum(part.stat().st_size for part in parts_of(path) if part.exists())


def demand_of(info: ModelInfo, n_ctx: int, n_batch: int, *, flash_attn: bool | None = None, **arguments: Any) -> Demand:
    """What `Llama` would ask for with these arguments; n_ctx 0 = the trained context."""
    type_k, type_v = (KV_TYPES["f16"] if t is None else t for t in map(arguments.get, ("type_k", "type_v")))
    n_ubatch = arguments.get("n_ubatch", _LARGEST_STEP)
    keeps_logits, embedding = bool(arguments.get("logits_all")), bool(arguments.get("embedding"))
    return Demand(
        metadata=info.metadata,
        weights=weights_bytes(info.path) + sum(Path(path).stat().st_size for path in adapters_of(**arguments)),
        n_ctx=n_ctx or info.n_ctx_train,
        n_batch=n_batch,
        type_k=type_k,
        type_v=type_v,
        flash_attn=flash_attn is not False and KV_TYPES["f32"] not in (type_k, type_v),
        is_mapped=arguments.get("use_mmap", True),
        n_ubatch=n_batch if embedding else n_ubatch or n_batch,
        n_vocab=info.model.n_vocab(),
        all_logits=keeps_logits or embedding,
        keeps_logits=keeps_logits,
    )


def check_allocation(n_bytes: int, what: str) -> None:
    """Raise NotEnoughMemoryError where the system would end the process once the memory is used."""
    available = memory().available
    if n_bytes > available:
        raise NotEnoughMemoryError(f"{what} takes {gib(n_bytes)} of memory, {gib(available)} are available")


def can_foresee(info: ModelInfo, arguments: Mapping[str, Any]) -> bool:
    """Whether `Demand` tells what these arguments of `Llama` take from the machine's memory."""
    on_device = placement(arguments.get("n_gpu_layers", 0), arguments.get("devices")) != "CPU"
    on_device = on_device and arguments.get("offload_kqv", True)
    if arguments.get("vocab_only") or (on_device and sys.platform != "darwin"):
        return False  # devices refuse by themselves, except where their memory is ours
    # With swa_full=False sliding-window layers keep a part only, which llama.cpp alone can tell.
    return bool(arguments.get("swa_full", True)) or not info.has_sliding_windows


def check_memory(demand: Demand) -> None:
    """Refuse what cannot fit: llama.cpp would be killed while it reads. Warn of what fits beside nothing else.

    Sizes in a form that is not known here are let through. Raises NotEnoughMemoryError, and warns with
    MemoryTightWarning; both name the options that would fit.
    """
    with contextlib.suppress(KeyError, IndexError, ValueError):
        _check_memory(demand)


def _check_memory(demand: Demand) -> None:
    machine = memory()
    if not _fits(demand):
        raise NotEnoughMemoryError(
            f"{demand}, {gib(machine.available)} of {gib(machine.total)} of memory are available: "
            f"{_advice(demand, _fits)}",
            largest_fitting(demand, _fits) or None,
        )
    if not _fits_easily(demand):
        warnings.warn(
            f"{demand}, {gib(machine.available)} of memory are available: weights will be read from disk again and "
            f"again, which is slow; {_advice(demand, _fits_easily)}",
            MemoryTightWarning,
            stacklevel=5,
        )


def _fits(demand: Demand) -> bool:
    machine = memory()
    needed_now = demand.allocated_beside if demand.is_mapped else demand.total
    return needed_now <= machine.available and demand.total <= machine.total


def _fits_easily(demand: Demand) -> bool:
    return demand.total <= memory().available


def largest_fitting(demand: Demand, fits: Callable[[Demand], bool] = _fits_easily) -> int:
    """The largest context of at most `demand.n_ctx` tokens that fits the memory beside nothing else; 0 if none does."""
    sizes = range(CELL_MULTIPLE, demand.n_ctx + 1, CELL_MULTIPLE)
    n_fitting = bisect_right(sizes, 0, key=lambda n: not fits(replace(demand, n_ctx=n)))
    return sizes[n_fitting - 1] if n_fitting else 0


def _advice(demand: Demand, fits: Callable[[Demand], bool]) -> str:
    """What would fit, as options of the commands and of `Llama`."""
    advice = []
    for name in ("q8_0", "q4_0"):
        smaller = replace(demand, type_k=KV_TYPES[name], type_v=KV_TYPES[name], flash_attn=True)
        if smaller.kv_cache < demand.kv_cache and fits(smaller):
            advice.append(f"-ctk {name} -ctv {name}")
            break
    fitting = largest_fitting(replace(demand, n_ctx=demand.n_ctx - 1), fits)
    if fitting:
        advice.append(f"--ctx {fitting}")
    if not advice:
        return "take a smaller model, or close other programs"
    return f"it would fit with {' or '.join(advice)} (type_k, type_v and n_ctx of Llama)"
