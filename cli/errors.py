"""Turning every expected failure into one line on stderr and a non-zero exit code."""

from __future__ import annotations

import errno
import sys
from typing import Any

import click

from selfextend_gguf.errors import SelfExtendError

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class ErrorHandlingGroup(click.Group):
    """A group whose commands report SelfExtendError, OSError and Ctrl-C without a traceback (unless -v)."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except (SelfExtendError, OSError, ValueError, MemoryError) as error:
            if _wants_traceback():
                raise
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                _silence_stdout()
                raise click.ClickException("the output was closed before the answer was complete") from error
            if isinstance(error, ValueError) and not isinstance(error, SelfExtendError):
                # ValueErrors of llama_cpp are about the user's input; others would be defects of ours.
                if not str(error).startswith(("Requested tokens", "Failed to create", "Failed to parse")):
                    raise
            raise click.ClickException(str(error) or type(error).__name__) from error


def _wants_traceback() -> bool:
    # The option belongs to the subcommand, whose context is gone when its exception arrives here.
    return "-v" in sys.argv or "--verbose" in sys.argv


def _silence_stdout() -> None:
    """Keep the interpreter from complaining about the closed pipe when it flushes at exit."""
    import os

    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
