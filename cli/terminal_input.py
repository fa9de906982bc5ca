"""Reading messages that are typed on a terminal: line editing, history, completion.

prompt_toolkit takes a moment to import, so this module is imported where a chat begins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

from .line_input import CONTINUES

_LONGEST_KEPT = 10_000  # characters of a message; what is longer was pasted, and is a text of its own
_PAGES = re.compile(r"--pages[\s=]\s*\S+\s+")


def typed_messages(completer: Completer, history: History) -> Callable[[], str]:
    """Reads a message with line editing.

    Enter ends it, unless the line goes on; Alt-Enter breaks a line, and pasted text keeps its lines. Tab completes.
    KeyboardInterrupt for Ctrl-C, EOFError for Ctrl-D on an empty line.
    """
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

    session: PromptSession[str] = PromptSession(
        multiline=True,
        key_bindings=bindings,
        prompt_continuation="  ",
        completer=completer,
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        history=history,
    )
    return lambda: _valid(session.prompt("> "))


def _valid(typed: str) -> str:
    """A text that is one, also where the bytes that were typed are no UTF-8."""
    return typed.encode(errors="surrogateescape").decode(errors="replace")


# ---- history ---------------------------------------------------------------------------------------------------------


def history_file() -> Path:
    """Where the messages of earlier chats are."""
    return user_state_path("sx-gguf") / "chat-history"


def open_history(file: Path | None) -> History:
    """The messages of earlier chats in a file that only its owner reads, or those of this one. Raises OSError."""
    if file is None:
        return InMemoryHistory()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    with file.open("r+b"):  # for the error now, and not at the first message
        return _FileHistory(file)


class _FileHistory(FileHistory):
    def store_string(self, string: str) -> None:
        if len(string) <= _LONGEST_KEPT:
            with suppress(OSError):  # such as a full disk: no reason to end a chat
                super().store_string(_valid(string))


# ---- completion ------------------------------------------------------------------------------------------------------

PATHS = PathCompleter(expanduser=True)


class CommandCompleter(Completer):
    """Completes names of commands, such as "/file", and their arguments by a completer for each."""

    def __init__(self, names: Iterable[str], arguments: Mapping[str, Completer]) -> None:
        self._names = list(names)
        self._arguments = arguments

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """As prompt_toolkit asks for it."""
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, blank, argument = text[1:].partition(" ")
        if not blank:
            yield from (
                Completion(f"{one} ", start_position=-len(name), display=f"/{one}")
                for one in self._names
                if one.startswith(name)
            )
        elif name in self._arguments:
            argument = _PAGES.sub("", argument, count=1).lstrip()
            yield from self._arguments[name].get_completions(Document(argument), complete_event)
