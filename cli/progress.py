"""The progress bar of a prompt that is read."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import click

_ERASE_LINE_ABOVE = "\033[A\r\033[K"


@contextmanager
def reading_bar(*, erase: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal, for `show(tokens read, tokens to read)`.

    The first call shows the bar; with `erase` it is gone at the end.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    began = time.perf_counter()
    bar = None
    with ExitStack() as stack:

        def show(done: int, total: int) -> None:
            def speed(done: int | None) -> str | None:
                seconds = time.perf_counter() - began
                return None if not done else f"{done} of {total} tokens, {done / seconds:.0f} tokens/s"

            nonlocal bar
            if bar is None:
                bar = click.progressbar(length=total, label="Reading", width=0, file=sys.stderr, item_show_func=speed)
                stack.enter_context(bar)
            bar.update(done - bar.pos, current_item=done)

        try:
            yield show
        finally:
            stack.close()
            if erase and bar is not None:
                click.echo(_ERASE_LINE_ABOVE, nl=False, err=True)
