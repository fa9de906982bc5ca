"""Turns: which of several requests works with the model, and in which order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from selfextend_gguf.errors import QueueFullError

MOST = 64  #: requests that are worked on or wait
SHARED = 64  #: tokens of a common beginning that are worth waiting for
_POLL = 0.1  # seconds between looks whether a request that waits is still wanted


@dataclass(eq=False)
class Ticket:
    """A request's place among the others."""

    alias: str  #: of the model that it needs
    prompt: npt.NDArray[np.int32]  #: that it reads, or will read first
    n_read: int = 0  #: tokens of it that have been read
    has_begun: bool = False  #: whether it has had a turn
    waits: bool = False  #: whether a thread waits for its turn
    used: float = 0.0  #: seconds of turns
    away: float = 0.0  #: seconds that others took between its turns
    step: float = 0.0  #: seconds of its longest step, in which nobody else has a turn

    def common(self, other: Ticket) -> int:
        """How many tokens both prompts begin with."""
        n = min(len(self.prompt), len(other.prompt))
        for length in (min(n, SHARED), n):  # most prompts part soon
            differs = np.flatnonzero(self.prompt[:length] != other.prompt[:length])
            if len(differs):
                return int(differs[0])
        return n


class Turns:
    """Gives one request at a time the turn. Called by the threads that work.

    Every other turn is that of the request that came first, so that it is done in about twice its time, however many
    come after it. The turns between are those of the request that has had least of them: what is short is soon done.

    A request whose prompt begins like one that is being read waits for that reading. Requests for another model than
    the loaded one wait until all have ended that were before them.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._tickets: list[Ticket] = []  # in order of arrival
        self._holder: Ticket | None = None
        self._last: Ticket | None = None  # who had the turn before
        self._began = 0.0  # when the turn did

    def __iter__(self) -> Iterator[Ticket]:
        """All requests, in order of arrival."""
        return iter(tuple(self._tickets))

    def enter(self, alias: str, prompt: Sequence[int] = ()) -> Ticket:
        """A place at the end. Raises QueueFullError."""
        with self._changed:
            if len(self._tickets) >= self._most:
                raise QueueFullError(f"{self._most} requests are worked on or wait: try again later")
            ticket = Ticket(alias, np.asarray(prompt, np.int32))
            self._tickets.append(ticket)
            return ticket

    def take(self, ticket: Ticket, stop: Callable[[], None] = lambda: None) -> None:
        """Wait for the turn. Raises what `stop` raises, which is called again and again meanwhile."""
        with self._changed:
            ticket.waits = True
            try:
                while not self._is_given_to(ticket):
                    self._changed.wait(_POLL)
                    stop()
            finally:
                ticket.waits = False

    def pass_on(self, ticket: Ticket, stop: Callable[[], None]) -> None:
        """Let another one have a turn, and wait for the next. Raises what `stop` raises; the turn is lost then."""
        self._release(ticket)
        self.take(ticket, stop)

    def leave(self, ticket: Ticket) -> None:
        """End a request's place, and its turn if it has it."""
        self._release(ticket)
        with self._changed:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
            self._changed.notify_all()

    def is_over(self, ticket: Ticket, seconds: float) -> bool:
        """Whether a turn that has lasted so long, or longer, should go to somebody who could use it now."""
        if time.monotonic() - self._began < seconds:
            return False
        with self._changed:
            return self._next(ticket) is not None

    def _release(self, ticket: Ticket) -> None:
        with self._changed:
            if self._holder is ticket:
                ticket.used += time.monotonic() - self._began
                self._holder, self._last = None, ticket
                self._changed.notify_all()

    def _is_given_to(self, ticket: Ticket) -> bool:
        if self._holder is None:
            self._holder = self._next(self._last) or self._next(None)
            if self._holder is not None:
                self._holder.has_begun = True
                self._began = time.monotonic()
                self._changed.notify_all()
        return self._holder is ticket

    def _next(self, last: Ticket | None) -> Ticket | None:
        """Who has the turn after `last`, if somebody else can use it."""
        able = [t for t in self._of_one_model() if t.waits and t is not last and not self._waits_for_a_reading(t)]
        if not able:
            return None
        oldest = next(t for t in self._tickets if t.has_begun or t in able)
        return oldest if oldest in able else min(able, key=lambda t: t.used)  # the first of equals

    def _of_one_model(self) -> Iterator[Ticket]:
        """Those that can be served before another model has to be loaded."""
        alias = next((t.alias for t in self._tickets if t.has_begun), None)
        is_overtaking = False
        for ticket in self._tickets:
            alias = alias or ticket.alias
            is_overtaking = is_overtaking or ticket.alias != alias
            if ticket.has_begun or not is_overtaking:
                yield ticket

    def _waits_for_a_reading(self, ticket: Ticket) -> bool:
        if ticket.has_begun:
            return False
        return any(other.has_begun and other.n_read + SHARED <= other.common(ticket) for other in self._tickets)
