"""What a request may take before it is one: bytes, and time to arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import h11
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_BYTES = 32 * 2**20  #: of a body: a million tokens, with every letter escaped
HEADER_SECONDS = 10.0  #: in which the headers of a request arrive
BODY_SECONDS = 30.0  #: in which a body arrives, and a second more for each BODY_RATE bytes of it
BODY_RATE = 20_000

# The rest of a body that is refused is not waited for.
_CLOSE = {"Connection": "close"}


class RequestLimits:
    """ASGI middleware that reads bodies, and refuses what is too large, too slow, or has two lengths."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = await self._body(Headers(scope=scope), receive)
        if body is None:
            return  # the client has left
        messages: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def received() -> Message:
            return next(messages, None) or await receive()

        await self.app(scope, received, send)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None if the client leaves before. Raises HTTPException."""
        if "Transfer-Encoding" in headers and "Content-Length" in headers:
            # Which of them counts, a proxy before us may decide otherwise (request smuggling).
            raise HTTPException(400, "a body has a Content-Length or a Transfer-Encoding, not both", _CLOSE)
        too_large = HTTPException(413, f"the body is larger than {MOST_BYTES // 2**20} MiB", _CLOSE)
        if int(headers.get("Content-Length", 0)) > MOST_BYTES:
            raise too_large
        body, began, loop = bytearray(), asyncio.get_running_loop().time(), asyncio.get_running_loop()
        while True:
            left = began + BODY_SECONDS + len(body) / BODY_RATE - loop.time()
            try:
                message = await asyncio.wait_for(receive(), left)
            except asyncio.TimeoutError:
                raise HTTPException(408, "the body did not arrive in time", _CLOSE) from None
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > MOST_BYTES:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP, but a connection whose request never begins is closed."""

    _waiting: asyncio.TimerHandle | None = None  # for the rest of the headers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer to what is no HTTP; the application, if it is answering already, must not."""
        super().send_400_response(msg)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
