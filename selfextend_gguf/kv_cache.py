"""What a KV cache may consist of, how large it is, how it is read, and what rewriting does to it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import llama_cpp

from selfextend_gguf.checks import shown, whole_number
from selfextend_gguf.errors import ConfigError, KeyPrecisionWarning, UnsupportedModelError
from selfextend_gguf.ggml import block_of, type_name
from selfextend_gguf.schedule import SelfExtendConfig

# Names as llama.cpp's -ctk and -ctv take them. llama_cpp does not name bf16, number 30 of ggml.
KV_TYPES: dict[str, int] = {
    "f32": llama_cpp.GGML_TYPE_F32,
    "f16": llama_cpp.GGML_TYPE_F16,
    "bf16": 30,
    "q8_0": llama_cpp.GGML_TYPE_Q8_0,
    "q5_1": llama_cpp.GGML_TYPE_Q5_1,
    "q5_0": llama_cpp.GGML_TYPE_Q5_0,
    "q4_1": llama_cpp.GGML_TYPE_Q4_1,
    "q4_0": llama_cpp.GGML_TYPE_Q4_0,
}

# iq4_nl has blocks of 32 like the named ones; types of other shapes end the process where rows are cut into heads.
_CACHE_TYPES = {**KV_TYPES, "iq4_nl": llama_cpp.GGML_TYPE_IQ4_NL}

# How often a key can be rewritten until the error of the logits has about doubled, by measurement: docs/kv-cache.md.
# Types of 16 and more bits are not named: 50 rewrites did not hurt them.
SAFE_REWRITES = {"q8_0": 50, "q5_1": 10, "q5_0": 10, "q4_1": 10, "q4_0": 10}

_SMALL_STEP = 256  # tokens

# Their values reach the cache in another shape than llama.cpp's flash attention expects, which ends the process.
_WITHOUT_FLASH_ATTENTION = frozenset({"plm"})


def cache_type(name: str, value: Any) -> int:
    """A type of ggml that a cache can have. Raises ConfigError for others: ggml reads beyond its table for them."""
    number = whole_number(name, value)
    if number not in _CACHE_TYPES.values():
        known = ", ".join(f"{kind} = {number}" for kind, number in _CACHE_TYPES.items())
        raise ConfigError(f"{name} must be a type that a cache can have ({known}), not {shown(number)}")
    return number


def is_quantised(ggml_type: int | None) -> bool:
    """Is it a type of blocks with a common scale? None is llama.cpp's default, f16."""
    return ggml_type not in (None, KV_TYPES["f32"], KV_TYPES["f16"], KV_TYPES["bf16"])


def kv_cache_bytes(metadata: Mapping[str, str], n_ctx: int, type_k: int, type_v: int) -> int:
    """Size of a KV cache of `n_ctx` tokens, in bytes; `type_k` and `type_v` are ggml types. Raises ConfigError."""
    type_k, type_v = cache_type("type_k", type_k), cache_type("type_v", type_v)
    arch = metadata["general.architecture"]
    head_k, head_v = _head_sizes(metadata)
    heads = per_layer(metadata, f"{arch}.attention.head_count_kv", _n_head(metadata))
    heads = heads * int(metadata.get(f"{arch}.block_count", 0)) if len(heads) == 1 else heads

    def row(elements: int, ggml_type: int) -> int:
        block, size = block_of(ggml_type)
        return -(-elements // block) * size

    return n_ctx * sum(row(h * head_k, type_k) + row(h * head_v, type_v) for h in heads if h > 0)


def _n_head(metadata: Mapping[str, str]) -> int:
    """Query heads of the first layer, at least 1."""
    return max(1, per_layer(metadata, f"{metadata['general.architecture']}.attention.head_count", 1)[0])


def _head_sizes(metadata: Mapping[str, str]) -> tuple[int, int]:
    """Elements of a head of the cached keys, and of the cached values."""
    arch = metadata["general.architecture"]
    usual = int(metadata.get(f"{arch}.embedding_length", 0)) // _n_head(metadata)
    head_k, head_v = (int(metadata.get(f"{arch}.attention.{name}_length", usual)) for name in ("key", "value"))
    # Latent attention: values are part of the cached keys.
    return head_k, 0 if f"{arch}.attention.key_length_mla" in metadata else head_v


def per_layer(metadata: Mapping[str, str], key: str, default: int) -> list[int]:
    """A number of a model's metadata that may differ from layer to layer: one for all, or one for each."""
    value = json.loads(metadata.get(key, str(default)))
    return [int(v) for v in value] if isinstance(value, list) else [int(value)]


def flash_attention_type(
    metadata: Mapping[str, str], type_k: int, type_v: int, longest_step: int, *, wanted: bool | None, on_cpu: bool
) -> int:
    """llama.cpp's `flash_attn_type` for a context of these caches, read in steps of up to `longest_step` tokens.

    `wanted` None: llama.cpp chooses, where its choice is a good one. Raises UnsupportedModelError and ConfigError for
    caches that llama.cpp would read wrongly, or end the process over.
    """
    _check_blocks(metadata, "key", type_k)
    _check_blocks(metadata, "value", type_v)
    arch = metadata["general.architecture"]
    if arch in _WITHOUT_FLASH_ATTENTION and (wanted or is_quantised(type_v)):
        raise UnsupportedModelError(
            f"llama.cpp has no flash attention for {arch} models"
            + ("" if wanted else f", and {type_name(type_v)} values need it: take values of f16, bf16 or f32")
        )
    if wanted:
        return llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    if (
        wanted is None
        and arch not in _WITHOUT_FLASH_ATTENTION
        and _flash_attention_helps(type_k, type_v, longest_step, on_cpu=on_cpu)
    ):
        return llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
    return llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED


def _check_blocks(metadata: Mapping[str, str], name: str, ggml_type: int) -> None:
    """Raise ConfigError where blocks would cross the ends of heads: without flash attention llama.cpp reads such keys
    wrongly, and keeps no such row."""
    head = _head_sizes(metadata)[name == "value"]
    block, _ = block_of(ggml_type)
    if head % block:
        raise ConfigError(
            f"{type_name(ggml_type)} {name}s come in blocks of {block} elements, and a head of this model has {head}: "
            f"take {name}s of f16, bf16 or f32"
        )


def _flash_attention_helps(type_k: int, type_v: int, longest_step: int, *, on_cpu: bool) -> bool:
    if is_quantised(type_v):
        return True  # quantised values exist with flash attention only
    # llama.cpp's flash attention rounds f32 keys and values to f16 first: not for those who asked for f32.
    # On the CPU it needs many queries at once: steps of 64 take 1.4 times as long with it as without.
    return KV_TYPES["f32"] not in (type_k, type_v) and not (on_cpu and longest_step < _SMALL_STEP)


def warn_of_rounding(config: SelfExtendConfig, type_k: int, *, n_layers: int, has_frame: bool) -> None:
    """Warn (KeyPrecisionWarning) when keys of `n_layers` layers will be rewritten more often than their type stands.

    With a frame each key is rewritten a few times only, unless the schedule regroups.
    """
    name = type_name(type_k)
    moved, times = "with schedule " + config.schedule + " rewrites keys", config.n_regroupings
    if not has_frame:
        moved, times = "rewrites the keys of this model, which has sliding-window layers,", config.n_moves
    if n_layers > 0 and times > SAFE_REWRITES.get(name, times):
        warnings.warn(
            f"reading {config.n_ctx} tokens {moved} up to {times} times; "
            f"{name} keys lose precision after {SAFE_REWRITES[name]}: use q8_0 or f16 keys",
            KeyPrecisionWarning,
            stacklevel=3,
        )
