"""Calls of tools, read from an answer while it comes in pieces."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

from selfextend_gguf.tool_calls.formats import NOTHING, Format, Found, Tools


@dataclass(frozen=True)
class Part:
    """A part of an answer: text, or arguments of a call, whose name comes with the first of them."""

    written: str  #: by the model; that of all parts together is the answer
    text: str = ""
    name: str | None = None  #: of a tool, whose call begins
    arguments: str = ""  #: of the call that has begun last, JSON


class Reader(Protocol):
    """Tells calls from text."""

    is_done: bool  #: whether nothing that comes counts any more

    def feed(self, piece: str) -> Iterator[Part]:
        """Parts that are known when `piece` has come."""

    def finish(self) -> Iterator[Part]:
        """The rest, when no more comes."""


class TextReader:
    """Of answers that call no tool."""

    is_done = False

    def feed(self, piece: str) -> Iterator[Part]:
        """The piece is text."""
        yield Part(piece, text=piece)

    def finish(self) -> Iterator[Part]:
        """Nothing is held back."""
        yield from ()


class ArgumentsReader:
    """Of answers that are the arguments of a tool."""

    is_done = False

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, piece: str) -> Iterator[Part]:
        """The piece is arguments."""
        yield Part(piece, name=self._name, arguments=piece)
        self._name = None

    def finish(self) -> Iterator[Part]:
        """Nothing is held back."""
        yield from ()


class CallReader:
    """Of answers with calls in a format. A call is told once it is whole; what only looks like one is text."""

    def __init__(self, form: Format, tools: Tools, *, at_most_one: bool = False) -> None:
        """With `at_most_one`, the first call ends the answer."""
        self.is_done = False
        self._form = form
        self._tools = tools
        self._at_most_one = at_most_one
        self._begins = _expanded(form.begins, tools)
        self._first = (*self._begins, *_expanded(form.bare, tools))  # marks with which calls begin where no text does
        self._dropped = form.before_text  # marks that are no text
        self._held = ""
        self._is_in_text = False
        self._worth_a_look = 0  # characters
        self._has_called = False

    def feed(self, piece: str) -> Iterator[Part]:
        """Parts that are known when `piece` has come."""
        self._held += piece
        if len(self._held) >= self._worth_a_look:
            yield from self._parts(is_last=False)

    def finish(self) -> Iterator[Part]:
        """The rest, when no more comes."""
        yield from self._parts(is_last=True)

    def _parts(self, is_last: bool) -> Iterator[Part]:
        while self._held and not self.is_done:
            parts = list(self._in_text(is_last) if self._is_in_text else self._between(is_last))
            if not parts:
                return
            yield from parts

    def _between(self, is_last: bool) -> Iterator[Part]:
        """At the start of the answer, or after a call."""
        rest = self._held.lstrip()
        blank = len(self._held) - len(rest)
        if end := next((mark for mark in self._dropped if rest.startswith(mark)), None):
            yield self._taken(blank + len(end))
        elif any(mark.startswith(rest) for mark in (*self._dropped, *self._first)) and not is_last:
            return
        elif begin := next((mark for mark in self._first if rest.startswith(mark)), None):
            yield from self._call(blank, begin, is_last)
        elif self._has_called and blank:
            yield self._taken(blank)
        else:
            self._is_in_text = True
            yield from self._in_text(is_last)

    def _in_text(self, is_last: bool) -> Iterator[Part]:
        found = [(at, mark) for mark in self._begins if (at := self._held.find(mark)) >= 0]
        at, begin = min(found, default=(len(self._held), ""))
        if begin and not self._held[:at].strip():
            yield from self._call(at, begin, is_last)
        elif is_last and not begin:
            yield self._taken(at, self._held)
        else:
            if not begin:
                at -= _begun(self._held, self._begins)
            text = self._held[:at].rstrip()  # blanks before a call are none of the text
            if text:
                yield self._taken(len(text), text)

    def _call(self, at: int, begin: str, is_last: bool) -> Iterator[Part]:
        """What stands where a call seems to begin."""
        found: Found | None = self._form.read(self._held[at:], self._tools)
        # A long call is not looked through again with each of its tokens, but when it has grown by a 64th.
        self._worth_a_look = len(self._held) * 65 // 64 if found is None else 0
        if found is None and not is_last:
            return
        found = found or NOTHING
        if not found.calls:
            self._is_in_text = True
            length = at + len(begin)
            yield self._taken(length, self._held[:length])
            return
        calls = found.calls[:1] if self._at_most_one else found.calls
        written = self._taken(at + found.length).written
        for call in calls:
            yield Part(written, name=call.name, arguments=call.arguments)
            written = ""
        if not self._has_called:
            self._has_called = True
            self._first += self._form.more
            self._dropped += self._form.ends
        self._is_in_text, self.is_done = False, self._at_most_one

    def _taken(self, length: int, text: str = "") -> Part:
        """What is held back, up to there."""
        written, self._held = self._held[:length], self._held[length:]
        return Part(written, text=text)


def _expanded(marks: tuple[str, ...], names: Collection[str]) -> tuple[str, ...]:
    """Marks with the names of all tools."""
    return tuple(mark.replace("NAME", name) for mark in marks for name in (names if "NAME" in mark else ("",)))


def _begun(text: str, marks: tuple[str, ...]) -> int:
    """Characters at the end of a text with which a mark may begin."""
    lengths = range(min(len(text), max(map(len, marks), default=1) - 1), 0, -1)
    return next((n for n in lengths if any(mark.startswith(text[-n:]) for mark in marks)), 0)
