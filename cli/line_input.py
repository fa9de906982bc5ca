"""Reading messages line by line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable

from .texts import decode

CONTINUES = "\\"  # a line that ends so goes on


def piped_messages() -> Callable[[], str]:
    """Reads the next line of standard input, with those it goes on in. EOFError at the end."""
    number = 0

    def read_line() -> str:
        nonlocal number
        number += 1
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return decode(line, f"line {number}").rstrip("\r\n")

    def read() -> str:
        text = read_line()
        while text.endswith(CONTINUES):
            text = text.removesuffix(CONTINUES)
            try:
                text += "\n" + read_line()
            except EOFError:
                break
        return text

    return read
