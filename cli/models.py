"""`sx-gguf models`: what can be given as MODEL."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from selfextend_gguf.catalogue import HeldModel, held_models
from selfextend_gguf.memory import gib

from .options import verbose_option

COLUMNS = ("MODEL", "SIZE", "QUANTISATION", "ARCHITECTURE", "TRAINED", "CAN BE EXTENDED")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list, a record for each model.")
@verbose_option
def models(as_json: bool, verbose: bool) -> None:
    """List the models that are there.

    In this folder, in Hugging Face's cache, in Ollama's store and in LM Studio's. Each has the name that other
    commands take as MODEL. Only the headers of files are read: `info` says more of one.

    \b
    Examples:
        sx-gguf models
        sx-gguf models --json
    """
    held = list(held_models(Path()))
    if as_json:
        click.echo(json.dumps([asdict(model) for model in held], indent=1))
    elif held:
        for line in table(held):
            click.echo(os.fsencode(line).decode(errors="replace"))  # names of files may be any bytes
    else:
        click.echo("There is none in this folder, in Hugging Face's cache, in Ollama's store or LM Studio's.", err=True)


def table(held: Sequence[HeldModel]) -> list[str]:
    """Lines of aligned columns; in that of a damaged model its error."""
    rows = [COLUMNS, *(_row(model) for model in held)]
    widths = [max(len(row[i]) for row in rows if i == 0 or len(row) == len(COLUMNS)) for i in range(len(COLUMNS))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def _row(model: HeldModel) -> tuple[str, ...]:
    if model.error is not None:
        return model.name, model.error
    return (
        model.name,
        gib(model.n_bytes or 0),
        model.quantisation or "?",
        model.architecture or "?",
        str(model.n_ctx_train or "?"),
        "yes" if model.extendable else f"no: {model.reason}",
    )
