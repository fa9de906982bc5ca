"""Listening, and ending when told to."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from selfextend_gguf.server.limits import TimedProtocol
from selfextend_gguf.server.models import OneModelAtATime
from selfextend_gguf.server.work import server_ends


class Server(uvicorn.Server):
    """uvicorn's, which loads a model while it answers already, and stops what is running when it is told to end."""

    def __init__(self, config: uvicorn.Config, models: OneModelAtATime) -> None:
        super().__init__(config)
        self._models = models
        self._loading: asyncio.Task[None] | None = None
        self.error: Exception | None = None  #: why the model could not be loaded

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, and to load."""
        await super().startup(sockets)
        self._loading = asyncio.create_task(self._load())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End when all answers have, and the loading."""
        await super().shutdown(sockets)
        if self._loading is not None:
            await self._loading

    async def _load(self) -> None:
        try:
            await run_in_threadpool(self._models.load_first)
        except Exception as error:
            self.error, self.should_exit = error, True
            server_ends.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        server_ends.set()
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError, whose message says where."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror  # Python adds to it
        raise OSError(f"cannot listen on {host}:{port}: {reason}") from error


def configuration(app: FastAPI, **more: Any) -> uvicorn.Config:
    """How uvicorn serves the application; `more` are arguments of uvicorn's."""
    return uvicorn.Config(app, http=TimedProtocol, ws="none", lifespan="off", **more)


def run(app: FastAPI, models: OneModelAtATime, listener: socket.socket, *, verbose: bool = False) -> None:
    """Serve until SIGINT or SIGTERM. Raises KeyboardInterrupt after SIGINT, and what loading the first model raises."""
    config = configuration(app, log_level="info" if verbose else "error", access_log=verbose)
    # uvicorn repeats the signal that ended it, for who handled it before; SIGTERM's default would be to die of it.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server = Server(config, models)
    server.run(sockets=[listener])
    if server.error is not None:
        raise server.error
