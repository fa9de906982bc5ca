"""Arguments of `llama_cpp.Llama`, checked before they go to C, which would end the process or take another number."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import llama_cpp

from selfextend_gguf.checks import (
    Check,
    callable_,
    check_all,
    optional,
    path,
    real,
    real_number,
    seed,
    shown,
    text,
    truth,
    whole,
    whole_number,
)
from selfextend_gguf.devices import chosen
from selfextend_gguf.errors import ConfigError, IgnoredArgumentWarning
from selfextend_gguf.kv_cache import cache_type
from selfextend_gguf.schedule import LONGEST

#: Of older versions of `llama_cpp.Llama`, which takes anything now and ignores it.
_LEGACY = {"f16_kv", "low_vram", "mul_mat_q", "n_gqa", "n_parts", "rms_norm_eps"}
_INT32 = 2**31 - 1
_MOST_THREADS = 512  # GGML_MAX_N_THREADS
_LONGEST_OVERRIDE = 127  # bytes of a key or a text, with its end 128


def _tensor_split(name: str, value: Any) -> list[float]:
    if isinstance(value, str | bytes) or not hasattr(value, "__len__"):
        raise ConfigError(f"{name} must be a list of numbers, not {shown(value)}")
    if len(value) > llama_cpp.LLAMA_MAX_DEVICES:
        raise ConfigError(
            f"{name} has {len(value)} parts; llama.cpp knows {llama_cpp.LLAMA_MAX_DEVICES} devices at most"
        )
    return [real_number(f"{name}[{i}]", part, 0) for i, part in enumerate(value)]


def _overrides(name: str, value: Any) -> dict[str, bool | int | float | str]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a dictionary, not {shown(value)}")
    checked: dict[str, bool | int | float | str] = {}
    for key, override in value.items():
        _override_text(f"a key of {name}", key)
        where = f"{name}[{key!r}]"
        if isinstance(override, str):
            checked[key] = _override_text(where, override)
        elif isinstance(override, bool):
            checked[key] = override
        elif isinstance(override, int):
            checked[key] = whole_number(where, override, -(2**63), 2**63 - 1)
        elif isinstance(override, float):
            checked[key] = real_number(where, override)
        else:
            raise ConfigError(f"{where} must be a truth value, a number or a text, not {shown(override)}")
    return checked


def _override_text(name: str, value: Any) -> str:
    if len(text(name, value).encode()) > _LONGEST_OVERRIDE or "\0" in value:
        raise ConfigError(f"{name} must have at most {_LONGEST_OVERRIDE} bytes, none of them 0, not {shown(value)}")
    return str(value)


def _devices(name: str, value: Any) -> list[str]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ConfigError(f"{name} must be a list of names of devices, not {shown(value)}")
    names = [text(f"{name}[{i}]", part) for i, part in enumerate(value)]
    chosen(names)
    return names


def _adapters(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a dictionary, not {shown(value)}")
    return {path(f"a key of {name}", file): real_number(f"{name}[{file!r}]", scale) for file, scale in value.items()}


def _numa(name: str, value: Any) -> bool | int:
    return value if isinstance(value, bool) else whole_number(name, value, 0, llama_cpp.GGML_NUMA_STRATEGY_MIRROR)


def _tokenizer(name: str, value: Any) -> Any:
    for method in ("tokenize", "detokenize"):
        callable_(f"{name}.{method}", getattr(value, method, None))
    return value


_THREADS = optional(whole(0, _MOST_THREADS))

#: Of `llama_cpp.Llama.__init__`.
CHECKS: dict[str, Check] = {
    "model_path": path,
    "n_gpu_layers": whole(-1, _INT32),
    "devices": optional(_devices),
    "split_mode": whole(llama_cpp.LLAMA_SPLIT_MODE_NONE, llama_cpp.LLAMA_SPLIT_MODE_TENSOR),
    "main_gpu": whole(-1, _INT32),
    "tensor_split": optional(_tensor_split),
    "vocab_only": truth,
    "use_mmap": truth,
    "use_mlock": truth,
    "kv_overrides": optional(_overrides),
    "seed": optional(seed),
    "n_ctx": whole(0, LONGEST),
    "n_batch": whole(1, LONGEST),
    "n_ubatch": whole(0, LONGEST),
    "n_threads": _THREADS,
    "n_threads_batch": _THREADS,
    "rope_scaling_type": optional(
        whole(llama_cpp.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED, llama_cpp.LLAMA_ROPE_SCALING_TYPE_MAX_VALUE)
    ),
    "pooling_type": whole(llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED, llama_cpp.LLAMA_POOLING_TYPE_RANK),
    "attention_type": whole(llama_cpp.LLAMA_ATTENTION_TYPE_UNSPECIFIED, llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL),
    "rope_freq_base": real(0),
    "rope_freq_scale": real(0),
    "yarn_ext_factor": real(),
    "yarn_attn_factor": real(),
    "yarn_beta_fast": real(),
    "yarn_beta_slow": real(),
    "yarn_orig_ctx": whole(0, LONGEST),
    "logits_all": truth,
    "embedding": truth,
    "offload_kqv": truth,
    "op_offload": optional(truth),
    "swa_full": optional(truth),
    "no_perf": truth,
    "last_n_tokens_size": whole(0, LONGEST),
    "lora_base": optional(path),
    "lora_scale": real(),
    "lora_path": optional(path),
    "adapters": optional(_adapters),
    "flash_attn": optional(truth),
    "numa": _numa,
    "chat_format": optional(text),
    "chat_handler": optional(callable_),
    "draft_model": optional(callable_),
    "tokenizer": optional(_tokenizer),
    "type_k": optional(cache_type),
    "type_v": optional(cache_type),
    "spm_infill": truth,
    "verbose": truth,
}


def check_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `llama_cpp.Llama` as it can take them. Raises ConfigError, UnknownArgumentError.

    Those that older versions had, and programs still give, are left out, with IgnoredArgumentWarning."""
    legacy = sorted(_LEGACY & arguments.keys())
    if legacy:
        warnings.warn(f"llama.cpp has no {', '.join(legacy)} any more: ignored", IgnoredArgumentWarning, stacklevel=4)
    return check_all(CHECKS, {name: value for name, value in arguments.items() if name not in _LEGACY})
