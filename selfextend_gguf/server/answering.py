"""Doing a job: in a thread of its own, while what comes of it is told to whoever waits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from anyio import CapacityLimiter, to_thread

from selfextend_gguf.generate import Piece, Timings, stream_completion
from selfextend_gguf.reasoning import Kind
from selfextend_gguf.server.jobs import Job
from selfextend_gguf.server.logprobs import Chosen
from selfextend_gguf.server.models import OneModelAtATime, ServedLlama
from selfextend_gguf.server.work import current_work
from selfextend_gguf.tool_calls.reading import Part, Reader

KEEP_ALIVE = 3.0  #: seconds of silence after which a stream says that it is alive
_REPORT_EVERY = 0.1  # seconds between reports of progress


@dataclass(frozen=True)
class Read:
    """How much of a prompt has been read."""

    index: int  #: of the answer
    n_prompt: int  #: tokens
    n_cached: int  #: tokens of them that were in the cache
    n_processed: int  #: tokens in the cache by now
    seconds: float


@dataclass(frozen=True)
class Said:
    """A piece of an answer: text, or arguments of a call, whose name comes with the first of them."""

    index: int  #: of the answer
    kind: Kind
    text: str
    name: str | None  #: of a tool, whose call begins
    arguments: str  #: of the call that has begun last, JSON
    tokens: list[Chosen]  #: that begin in it
    finish_reason: str | None
    timings: Timings
    n_answer: int  #: tokens of the answer so far


def answer(llm: ServedLlama, job: Job, tell: Callable[[Read | Said], None]) -> None:
    """Give all answers of a job, one after the other. Raises what generating raises."""
    llm.n_top, llm.more_samplers, llm.comes_again = job.n_top, job.more_samplers, job.n > 1
    echoed: list[Chosen] = []
    for index, (prompt, sampling) in enumerate(job.answers()):
        reports = _Reports(index, len(prompt.tokens), tell)
        pieces = stream_completion(
            llm,
            prompt,
            on_read=reports,
            tells_thoughts=job.tells_thoughts,
            spelled=job.spelled,
            clock=llm.clock,
            **sampling,
        )
        reader = job.reader()
        with contextlib.ExitStack() as noting, contextlib.closing(pieces):
            if job.scored_from and index % job.n == 0:
                echoed = noting.enter_context(llm.noting_prompt(prompt, job.scored_from[index // job.n]))
            first = next(pieces)
            noting.close()
            if echoed or job.longest == 0:
                end = "length" if job.longest == 0 else None
                tell(Said(index, "answer", "", None, "", echoed, end, first.timings, 0))
            if job.longest == 0:
                continue
            begun = _Begun(llm)
            for piece in chain([first], pieces):
                for part, finish_reason in _parts(piece, reader):
                    said = (part.text, part.name, part.arguments, begun.take(part.written), finish_reason)
                    tell(Said(index, piece.kind, *said, piece.timings, len(llm.answer)))
                if reader.is_done:
                    break


def _parts(piece: Piece, reader: Reader) -> Iterator[tuple[Part, str | None]]:
    """Parts of a piece, and how the answer ends with them."""
    if piece.kind != "answer":
        yield Part(piece.text, text=piece.text), piece.finish_reason
        return
    parts = chain(reader.feed(piece.text) if piece.text else (), reader.finish() if piece.finish_reason else ())
    yield from ((part, None) for part in parts)
    if piece.finish_reason is not None or reader.is_done:
        yield Part(""), piece.finish_reason or "stop"


class _Reports:
    """Tells of the reading of a prompt, not too often."""

    def __init__(self, index: int, n_prompt: int, tell: Callable[[Read | Said], None]) -> None:
        self._index = index
        self._n_prompt = n_prompt
        self._tell = tell
        self._began = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if 0 < done < total and now < self._last + _REPORT_EVERY:
            return
        self._last = now
        n_cached = self._n_prompt - total
        self._tell(Read(self._index, self._n_prompt, n_cached, n_cached + done, now - self._began))


class _Begun:
    """Which tokens of an answer begin in which of its pieces."""

    def __init__(self, llm: ServedLlama) -> None:
        self._llm = llm
        self._n_taken = 0
        self._n_bytes_taken = 0
        self._n_bytes = 0

    def take(self, written: str) -> list[Chosen]:
        """The tokens that begin in the next piece."""
        self._n_bytes += len(written.encode())
        taken = []
        while self._n_taken < len(self._llm.answer) and self._n_bytes_taken < self._n_bytes:
            token = self._llm.answer[self._n_taken]
            self._n_taken += 1
            self._n_bytes_taken += len(token.spelled)
            taken.append(token)
        return taken


def begin(models: OneModelAtATime, job: Job) -> AsyncIterator[Read | Said | None]:
    """Let a job wait for its turn, and be done. Raises QueueFullError.

    What comes of it; None after each silence of KEEP_ALIVE seconds. Raises what loading and generating raise.
    """
    ticket = models.turns.enter(job.alias, job.prompts[0].tokens)
    queue: asyncio.Queue[Read | Said | Exception | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def tell(event: Read | Said) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)

    def work_in_turn() -> None:
        with models.turn(ticket) as llm:
            answer(llm, job, tell)

    async def work() -> None:
        try:
            await to_thread.run_sync(work_in_turn, limiter=CapacityLimiter(1))  # a thread of its own
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    current_work().task = asyncio.create_task(work())
    return _told(queue)


async def _told(queue: asyncio.Queue[Read | Said | Exception | None]) -> AsyncIterator[Read | Said | None]:
    while True:
        try:
            event = await asyncio.wait_for(queue.get(), KEEP_ALIVE)
        except asyncio.TimeoutError:
            yield None
            continue
        if event is None:
            return
        if isinstance(event, Exception):
            raise event
        yield event
