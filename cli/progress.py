"""What is being done, on standard error if that is a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tqdm import tqdm

_READING = "{desc} |{bar}| {n_fmt} of {total_fmt} tokens, {rate_noinv_fmt}, {remaining} left"


def _bar(**options: Any) -> tqdm[Any]:
    from tqdm import tqdm  # only where there is a terminal: it takes longer to import than a short answer does

    # A terminal that does not know its size says 0, for which tqdm would draw nothing.
    has_size = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    size: dict[str, Any] = {"dynamic_ncols": True} if has_size else {"ncols": 80, "nrows": 24}
    return tqdm(file=sys.stderr, **size, **options)


@contextmanager
def reading_bar(*, erase: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of a prompt that is read, for `show(tokens read, tokens to read)`.

    The first call shows the bar; with `erase` it is gone at the end.
    """
    bar: tqdm[Any] | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if not sys.stderr.isatty():
            return
        if bar is None:
            bar = _bar(desc="Reading", total=total, unit=" tokens", bar_format=_READING, leave=not erase)
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def note_on_terminal(text: str) -> None:
    """A line that stays."""
    if sys.stderr.isatty():
        click.echo(text, err=True)


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A line of text; gone at the end."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    with _bar(bar_format="{desc}", leave=False) as line:
        yield lambda text: line.set_description_str(text)
