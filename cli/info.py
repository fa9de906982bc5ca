"""`sx-gguf info`: what a model is and what Self-Extend will do with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from selfextend_gguf.devices import devices
from selfextend_gguf.errors import NotEnoughMemoryError
from selfextend_gguf.examine import examine, sensible_context
from selfextend_gguf.kv_cache import KV_TYPES, warn_of_rounding
from selfextend_gguf.memory import check_memory, demand_of, gib
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.planning import default_context, longest_context, plan_if_beyond

from .options import cache_type_options, context_option, model_argument, self_extend_options, verbose_option


@click.command()
@model_argument
@context_option
@self_extend_options
@cache_type_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON record.")
@verbose_option
def info(
    model: Path,
    ctx: int | None,
    cache_type_k: str,
    cache_type_v: str,
    as_json: bool,
    verbose: bool,
    **parameters: Any,
) -> None:
    """Show what a model is, and what Self-Extend does with it.

    Its context, RoPE and memory, and the parameters for a context.

    \b
    Example:
        sx-gguf info model.gguf --ctx 16384
    """
    with ModelInfo(model, verbose=verbose) as file:
        n_ctx = ctx or default_context(file.n_ctx_train, **parameters)
        facts = describe(file, n_ctx, parameters, cache_type_k, cache_type_v, verbose=verbose)
    if as_json:
        click.echo(json.dumps(facts))
        return
    kv = facts["kv_cache_bytes"]
    rows = {
        "Model": facts["model"],
        "Architecture": facts["architecture"],
        "Trained context": f"{facts['n_ctx_train']} tokens",
        "RoPE": facts["rope"],
        "Quantisation": facts["quantisation"],
        f"KV cache at {facts['n_ctx']} tokens": ", ".join(
            f"{size / 2**20:.1f} MiB ({kind})" for kind, size in kv.items()
        ),
        "Sensible context": sensible_words(facts["n_ctx_train"], **facts["sensible_context"]),
        "Arithmetic limit": f"{facts['longest_context']} tokens, not a promise",
        "Devices": devices_words(facts["devices"]),
        "Rewritten layers": f"{facts['rewritten_layers']} of {facts['layers']}",
        "Self-Extend": facts["explanation"],
    }
    for name, value in rows.items():
        click.echo(f"{name + ':':<32}{value}")


def devices_words(found: Sequence[Mapping[str, Any]]) -> str:
    """Where commands put the model unless told otherwise."""
    names = [f"{d['name']} ({d['description']}, {gib(d['free_bytes'])} free)" for d in found]
    return f"all layers on {', '.join(names)}" if names else "CPU; this build of llama.cpp has no GPU"


def sensible_words(n_ctx_train: int, n_ctx: int, group_size: int, n_bytes: int | None, is_all_memory: bool) -> str:
    """A `SensibleContext` in words."""
    words = [f"{n_ctx / n_ctx_train:.3g}x the trained one"]
    if group_size > 1:
        words.append(f"groups of {group_size}")
    if n_bytes is not None:
        words.append(f"{gib(n_bytes)} of memory" + ", which is all there is" * is_all_memory)
    return f"up to {n_ctx} tokens ({', '.join(words)})"


def describe(
    file: ModelInfo, n_ctx: int, parameters: dict[str, Any], name_k: str, name_v: str, *, verbose: bool
) -> dict[str, Any]:
    """All facts as a JSON-able record. Raises ConfigError as `plan` does."""
    types = {"type_k": KV_TYPES[name_k], "type_v": KV_TYPES[name_v]}
    config = plan_if_beyond(file.n_ctx_train, n_ctx, **parameters)
    found = examine(file.path, config, **types, verbose=verbose)
    extendable = found.reason is None
    if not found.has_context or (config is not None and not extendable):
        explanation = f"not possible: {found.reason}"
    elif memory := too_little_memory(file, n_ctx, **types):
        explanation = f"not possible: {memory}"
    elif config is None:
        explanation = f"not needed: {n_ctx} tokens fit the trained context"
    elif found.n_layers == 0:
        explanation = "not needed: layers with RoPE look back a window only, the others use no positions"
    else:
        explanation = str(config)
        warn_of_rounding(config, types["type_k"], n_layers=found.n_layers, has_frame=found.has_frame)
    asked = name_k if name_k == name_v else f"{name_k} keys, {name_v} values"
    kinds = {"f16": ("f16", "f16"), "q8_0": ("q8_0", "q8_0"), asked: (name_k, name_v)}
    return {
        "model": str(file.path),
        "architecture": file.architecture,
        "n_ctx_train": file.n_ctx_train,
        "rope": file.rope,
        "quantisation": file.quantisation,
        "n_ctx": n_ctx,
        "devices": [
            {"name": d.name, "description": d.description, "free_bytes": d.free, "bytes": d.total} for d in devices()
        ],
        "layers": file.n_layers,
        "rewritten_layers": found.n_layers,
        "kv_cache_bytes": {
            name: file.kv_cache_bytes(n_ctx, KV_TYPES[keys], KV_TYPES[values]) for name, (keys, values) in kinds.items()
        },
        "sensible_context": asdict(sensible_context(file, parameters if extendable else None, **types)),
        "longest_context": longest_context(file.n_ctx_train, **parameters) if extendable else file.n_ctx_train,
        "extendable": extendable,
        "self_extend": asdict(config) if config and extendable and found.n_layers else None,
        "explanation": explanation,
    }


def too_little_memory(file: ModelInfo, n_ctx: int, **types: int) -> str | None:
    """Why `n_ctx` tokens do not fit the memory, None if they do."""
    try:
        check_memory(demand_of(file, n_ctx, 512, flash_attn=None, **types))
    except NotEnoughMemoryError as error:
        return str(error)
    return None
