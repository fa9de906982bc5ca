"""Texts from outside."""

from __future__ import annotations

import sys
from pathlib import Path

import click


def read_text(path: Path) -> str:
    """A UTF-8 file, or an error in one line."""
    return decode(path.read_bytes(), str(path))


def read_standard_input() -> str:
    """All of standard input, or an error in one line."""
    return decode(sys.stdin.buffer.read(), "standard input")


def decode(content: bytes, name: str) -> str:
    """UTF-8 text that came from `name`, without its byte order mark, or an error in one line."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{name} is not UTF-8 text: invalid byte at offset {error.start}") from error


def before_question(text: str, question: str) -> str:
    """A text, a blank line, and the question about it."""
    return f"{text.rstrip()}\n\n{question}"
