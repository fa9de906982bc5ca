"""Texts of several requests in one context: each is in the cache during its turns, and copied out between them.

Copying is exact: a text goes on from the same keys and values, and is read in the same steps, as if it were alone.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from selfextend_gguf.server.kept_prompts import KeptPrompts, RememberingLlama
from selfextend_gguf.server.turns import SHARED, Ticket, Turns
from selfextend_gguf.turns import TakesTurns

TURN = 0.5  #: seconds that a turn lasts at least, if its request can use them
_WORTH = 10  # times as long as copying the text out and in takes
_OF_A_STEP = 0.5  # as long as a step of another request takes

Text = TypeVar("Text", bound="SharingLlama")


class Shared(Generic[Text]):
    """A loaded model, whose context the texts of several requests share."""

    def __init__(self, llm: Text, turns: Turns) -> None:
        self.llm = llm  #: whose text the cache holds
        self.turns = turns
        self.copying = 0.0  #: seconds that copying a text out and in took the last time


class Share:
    """What a request has of a model. Its text is in the cache while the request has its turn."""

    def __init__(self, shared: Shared[Any], ticket: Ticket, stop: Callable[[], None]) -> None:
        """`stop` is called before each step, and raises an error when nobody waits for the text any more."""
        self._shared = shared
        self._ticket = ticket
        self._stop = stop
        self._step_began = 0.0
        self._branches: dict[Ticket, int] = {}  # where the prompts of requests that wait leave this one

    def clock(self) -> float:
        """Seconds, without those of others' turns."""
        return time.perf_counter() - self._ticket.away

    def reads(self, prompt: Sequence[int]) -> None:
        """Note the prompt that is read next."""
        self._ticket.prompt, self._ticket.n_read = np.asarray(prompt, np.int32), 0
        self._branches.clear()

    def until_branch(self, n_read: int, longest: int) -> int:
        """Tokens up to where the prompt of a request that waits leaves this one, if these are fewer than `longest`."""
        for other in self._shared.turns:
            if other is self._ticket or other.has_begun:
                continue
            if other not in self._branches:
                self._branches[other] = self._ticket.common(other)
            if (branch := self._branches[other]) >= max(SHARED, n_read + 1):
                longest = min(longest, branch - n_read)
        return longest

    def before_step(self, llm: SharingLlama) -> None:
        """Let others have a turn, if it is time. Raises what `stop` raises."""
        self._stop()
        self._ticket.n_read = llm.n_tokens
        if llm.n_tokens and llm.kept_prompts is not None and self._shared.turns.is_over(self._ticket, self._length()):
            self._pass_on(llm, llm.kept_prompts)
        self._step_began = time.perf_counter()

    def _length(self) -> float:
        """Seconds of a turn. A short request shall not wait twice for the step of a slow one: it has half as long."""
        steps = [other.step for other in self._shared.turns if other is not self._ticket]
        return max(TURN, _WORTH * self._shared.copying, *(_OF_A_STEP * step for step in steps))

    def after_step(self, llm: SharingLlama) -> None:
        """Keep a copy where another request will go on from."""
        self._ticket.n_read = llm.n_tokens
        self._ticket.step = max(self._ticket.step, time.perf_counter() - self._step_began)
        if llm.kept_prompts is not None and llm.n_tokens in self._branches.values():
            llm.kept_prompts.keep(llm)

    def _pass_on(self, llm: SharingLlama, prompts: KeptPrompts) -> None:
        began = time.perf_counter()
        kept = prompts.set_aside(llm)
        copying = time.perf_counter() - began
        if kept is None:
            return  # no room: the others wait until this request is done
        try:
            self._shared.turns.pass_on(self._ticket, self._stop)
        except BaseException:
            kept.is_needed = False  # who comes with the same prompt again goes on from it
            raise
        resumed = time.perf_counter()
        prompts.take_up(llm, kept)
        self._shared.llm = llm
        ended = time.perf_counter()
        self._shared.copying = copying + ended - resumed
        self._ticket.away += ended - began


class SharingLlama(RememberingLlama):
    """A `Llama` that may share its context with others of its kind."""

    #: None = it has its context for itself.
    share: Share | None = None

    def beside(self: Text, share: Share) -> Text:
        """Another object for the same context, which begins with the same text. Closing it does not close that."""
        other: Text = object.__new__(type(self))
        vars(other).update(vars(self))
        TakesTurns.__init__(other)
        other._stack = contextlib.ExitStack()
        other.input_ids = self.input_ids.copy()
        other.tokenizer_ = copy.copy(self.tokenizer_)  # it knows which tokens an answer spells
        other.share = share
        return other

    def clock(self) -> float:
        """Seconds, without those of others' turns."""
        return time.perf_counter() if self.share is None else self.share.clock()

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
        """Generate tokens after a prompt, as the parent does."""
        if self.share is not None:
            self.share.reads(tokens)
        yield from super().generate(tokens, *args, **kwargs)

    def _longest_step(self, n_cached: int) -> int:
        longest = super()._longest_step(n_cached)
        return longest if self.share is None else self.share.until_branch(n_cached, longest)

    def _eval_step(self, tokens: Sequence[int]) -> None:
        if self.share is not None:
            self.share.before_step(self)
        super()._eval_step(tokens)
        if self.share is not None:
            self.share.after_step(self)
