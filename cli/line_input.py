"""Reading messages: typed on a terminal, or line by line from a pipe."""

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


def typed_messages() -> Callable[[], str]:
    """Reads a message with line editing and the history of this session.

    Enter ends it, unless the line goes on; Alt-Enter breaks a line, and pasted text keeps its lines. KeyboardInterrupt
    for Ctrl-C, EOFError for Ctrl-D on an empty line.
    """
    from prompt_toolkit import PromptSession  # takes a moment to import, which other commands need not wait for
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith(CONTINUES):
            buffer.delete_before_cursor(len(CONTINUES))
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    session: PromptSession[str] = PromptSession(multiline=True, key_bindings=bindings, prompt_continuation="  ")

    def read() -> str:
        typed = session.prompt("> ")
        return typed.encode(errors="surrogateescape").decode(errors="replace")  # where bytes were no UTF-8

    return read
