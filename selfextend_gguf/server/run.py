"""Listening, and ending when told to."""

from __future__ import annotations

import os
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from selfextend_gguf.server.work import server_ends


class Server(uvicorn.Server):
    """uvicorn's, which also stops the running generation when it is told to end."""

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


def run(app: FastAPI, listener: socket.socket, *, verbose: bool = False) -> None:
    """Serve until SIGINT or SIGTERM. Raises KeyboardInterrupt after SIGINT."""
    level = "info" if verbose else "error"
    config = uvicorn.Config(app, log_level=level, access_log=verbose, lifespan="off")
    # uvicorn repeats the signal that ended it, for who handled it before; SIGTERM's default would be to die of it.
    signal.signal(signal.SIGTERM, lambda *_: None)
    Server(config).run(sockets=[listener])
