"""--reasoning: what a model thinks before it answers, on the screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from selfextend_gguf.generate import Piece
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.prompt import always_thinks

from .colours import coloured
from .options import take_template
from .progress import status_line

reasoning_option = click.option(
    "--reasoning",
    type=click.Choice(["show", "hide", "off"]),
    default="show",
    show_default=True,
    help="What the model thinks before it answers: show it, dimmed on a terminal; hide it; or do without.",
)


def open_model(path: Path, options: dict[str, Any], reasoning: str) -> ModelInfo:
    """The model file with the chat template and its variables that `options` ask for, which are taken out of them."""
    info = ModelInfo(path, verbose=options["verbose"], **take_template(options))
    switch_thinking(info, reasoning)
    return info


def switch_thinking(info: ModelInfo, reasoning: str) -> None:
    """Let the model think from now on, or not."""
    info.may_think = reasoning != "off"
    if reasoning == "off" and always_thinks(info):
        click.echo("Warning: the chat template cannot switch thinking off; what the model thinks is hidden", err=True)


@contextmanager
def answer_printer(reasoning: str) -> Iterator[Callable[[Piece], None]]:
    """Prints the pieces of an answer; while thoughts are hidden, a line on a terminal says that there are some."""
    with ExitStack() as line:
        say: Callable[[str], None] | None = None

        def show(piece: Piece) -> None:
            nonlocal say
            if text := shown(piece, reasoning):
                line.close()
                click.echo(text, nl=False)
            elif piece.kind == "thought" and piece.text:
                say = say or line.enter_context(status_line())
                say(coloured(f"Thinking ... {piece.timings.generated_tokens} tokens", dim=True))

        yield show


def shown(piece: Piece, reasoning: str) -> str:
    """What of a piece goes to standard output."""
    if piece.kind == "answer":
        return piece.text
    if reasoning != "show":
        return ""
    return coloured(piece.text, dim=True)
