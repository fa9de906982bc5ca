"""Ctrl-C during an answer."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from selfextend_gguf._native import watch_interrupts
from selfextend_gguf.llama import Llama


@contextmanager
def deferred_interrupts(llm: Llama) -> Iterator[Callable[[], None]]:
    """Within, Ctrl-C ends a running decode, and is a KeyboardInterrupt there or at the next call of what is yielded.

    Nowhere else: steps that belong together, such as rolling back the cache and noting its size, stay together.
    """
    is_interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal is_interrupted
        is_interrupted = True

    def check() -> None:
        if is_interrupted:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    watch_interrupts(llm.ctx)
    try:
        yield check
    finally:
        # This takes out the native handler as well: a terminal's prompt saves and restores handlers in its own way.
        signal.signal(signal.SIGINT, before)
