"""Several callers of one object: they wait for each other, and notice when another one has changed the text."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator
from typing import Any, Concatenate, ParamSpec, TypeVar

from selfextend_gguf.errors import TextChangedError

P = ParamSpec("P")
R = TypeVar("R")


class TakesTurns:
    """One thread at a time works with an object; the others wait.

    A generator has its turn only while it makes the next item: one that is abandoned halfway keeps nobody waiting. If
    another call has changed the text meanwhile, the next item would be wrong, and is an error.
    """

    def __init__(self) -> None:
        self._turn = threading.RLock()
        self._version = 0

    def note_change(self) -> None:
        """Let generators know that the text is another one now."""
        self._version += 1

    def in_turns(self, items: Generator[R, Any, None]) -> Generator[R, Any, None]:
        """The items of a generator that works with this object. Raises TextChangedError."""
        sent: Any = None
        version: int | None = None
        try:
            while True:
                with self._turn:
                    if version not in (None, self._version):
                        raise TextChangedError("another call has changed the text that was being generated")
                    try:
                        item = items.send(sent)
                    except StopIteration:
                        return
                    version = self._version
                sent = yield item
        finally:
            items.close()


Owner = TypeVar("Owner", bound=TakesTurns)


def takes_turn(method: Callable[Concatenate[Owner, P], R]) -> Callable[Concatenate[Owner, P], R]:
    """A method that works with its object alone."""

    @functools.wraps(method)
    def in_turn(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._turn:
            return method(self, *args, **kwargs)

    return in_turn
