"""`sx-gguf info`: what a model is and what Self-Extend will do with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from selfextend_gguf.cli.options import model_argument, self_extend_options, verbose_option

from selfextend_gguf.config import longest_context, plan
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.model_info import ModelInfo


@click.command()
@model_argument
@click.option("-c", "--ctx", type=click.IntRange(1), help="Wanted context in tokens [4 times the trained one].")
@self_extend_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON record.")
@verbose_option
def info(model: Path, ctx: int | None, as_json: bool, verbose: bool, **parameters: Any) -> None:
    """Show a model's context, RoPE and memory, and what Self-Extend does at a context.

    \b
    Example:
        sx-gguf info model.gguf --ctx 16384
    """
    with ModelInfo(model, verbose=verbose) as file:
        facts = describe(file, ctx or 4 * file.n_ctx_train, parameters)
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
        "Longest context": f"{facts['longest_context']} tokens",
        "Rewritten layers": f"{facts['rewritten_layers']} of {facts['layers']}",
        "Self-Extend": facts["explanation"],
    }
    for name, value in rows.items():
        click.echo(f"{name + ':':<32}{value}")


def describe(file: ModelInfo, n_ctx: int, parameters: dict[str, Any]) -> dict[str, Any]:
    """All facts as a JSON-able record."""
    reason, n_layers = file.examine()
    config = None
    if reason is not None:
        explanation = f"not possible: {reason}"
    elif n_ctx <= file.n_ctx_train:
        explanation = f"not needed: {n_ctx} tokens fit the trained context"
    elif n_layers == 0:
        explanation = "not needed: layers with RoPE look back a window only, the others use no positions"
    else:
        config = plan(file.n_ctx_train, n_ctx, **parameters)
        explanation = str(config)
    return {
        "model": str(file.path),
        "architecture": file.architecture,
        "n_ctx_train": file.n_ctx_train,
        "rope": file.rope,
        "quantisation": file.quantisation,
        "n_ctx": n_ctx,
        "layers": file.n_layers,
        "rewritten_layers": n_layers,
        "kv_cache_bytes": {
            name: file.kv_cache_bytes(n_ctx, KV_TYPES[name], KV_TYPES[name]) for name in ("f16", "q8_0")
        },
        "longest_context": file.n_ctx_train if reason else longest_context(file.n_ctx_train),
        "extendable": reason is None,
        "self_extend": asdict(config) if config else None,
        "explanation": explanation,
    }
