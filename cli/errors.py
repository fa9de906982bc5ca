"""Turning every expected failure into one line on stderr and a non-zero exit code."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import click

from selfextend_gguf.errors import SelfExtendError

from .lazy import LazyCommands
from .settings import blame, read_settings

VERBOSE = "selfextend_gguf.verbose"  #: in the metadata that click's contexts share
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXPECTED = (SelfExtendError, OSError, MemoryError)
T = TypeVar("T")


def collect(measuring: Iterator[T]) -> tuple[list[T], Exception | KeyboardInterrupt | None]:
    """Results as they come, and what ended it too early: to be raised when they are printed, or at once if there are
    none."""
    results = []
    try:
        for result in measuring:
            results.append(result)
    except (KeyboardInterrupt, *EXPECTED) as stop:
        if not results:
            raise
        return results, stop
    return results, None


def reason(stop: Exception | KeyboardInterrupt | None) -> str:
    """Why something was not measured."""
    return "budget" if stop is None else "interrupted" if isinstance(stop, KeyboardInterrupt) else "error"


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One line, without the source line that Python would add."""
    click.echo(f"Warning: {message}", err=True)


class ErrorHandlingGroup(click.Group):
    """A group whose commands take settings, and report expected errors and Ctrl-C without a traceback (unless -v)."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """llama.cpp's -hf USER/REPO is the MODEL hf:USER/REPO."""
        rest, typed = iter(args), []
        for argument in rest:
            if argument == "-hf":
                name = next(rest, None)
                if name is None and not ctx.resilient_parsing:  # a shell completes a line that is not yet whole
                    raise click.UsageError("-hf needs USER/REPO[:QUANT]", ctx)
                typed.append(f"hf:{name}")
            else:
                typed.append(argument)
        return super().parse_args(ctx, typed)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands and what they do, of which none is imported."""
        assert isinstance(self.commands, LazyCommands)
        with formatter.section("Commands"):
            formatter.write_dl(sorted(self.commands.help_lines.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            from selfextend_gguf._native import silence_log  # llama.cpp's, which a help does without

            silence_log()  # -v restores it
            with warnings.catch_warnings():
                warnings.showwarning = show_warning
                ctx.default_map = read_settings(self)
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except click.BadParameter as error:
            raise blame(error) from error
        except EXPECTED as error:
            if VERBOSE in ctx.meta:
                raise
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                # The interpreter flushes at exit, and would complain about the closed pipe.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise click.ClickException("the output was closed before the answer was complete") from error
            message = str(error) or type(error).__name__
            if isinstance(error, MemoryError) and not isinstance(error, SelfExtendError):  # Python's or numpy's own
                message = f"not enough memory: {message}"
            raise click.ClickException(message) from error
