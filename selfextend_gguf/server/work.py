"""The work on a request, stopped when its client leaves or the server ends."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfextend_gguf.errors import RequestStoppedError


@dataclass
class Work:
    """What is known of the work on one request."""

    client_left: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None  #: that does it, once it has begun


# Set for each request; a worker thread sees that of the request it works for.
_work: ContextVar[Work] = ContextVar("work")
#: Set when the server is to end.
server_ends = threading.Event()


def current_work() -> Work:
    """The work that is being done."""
    return _work.get()


def stop_if_unwanted(*_: int) -> None:
    """Raise RequestStoppedError when nobody waits for the answer."""
    if server_ends.is_set() or current_work().client_left.is_set():
        raise RequestStoppedError("the client has left, or the server ends")


class DisconnectWatcher:
    """ASGI middleware that notices a client's leaving whatever the application is doing meanwhile.

    A request ends when its work has: no thread goes on for a client that has left.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        work = Work()
        left = work.client_left
        listening: asyncio.Task[None] | None = None

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

        async def receive_body_then_disconnect() -> Message:
            nonlocal listening
            if listening is None:
                message = await receive()
                if message["type"] == "http.request" and not message.get("more_body", False):
                    listening = asyncio.create_task(listen())
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        _work.set(work)
        try:
            await self.app(scope, receive_body_then_disconnect, send)
        except Exception:
            if not left.is_set():
                raise
        finally:
            left.set()  # whoever still works may stop
            if listening is not None:
                listening.cancel()
            if work.task is not None:
                await asyncio.wait([work.task])  # its thread runs until it notices
