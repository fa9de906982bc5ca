"""`sx-gguf serve`, running: as a program, or in this process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from selfextend_gguf.server.app import Settings, create_app
from selfextend_gguf.server.kept_prompts import KeptPrompts
from selfextend_gguf.server.models import OneModelAtATime, ServedModel
from selfextend_gguf.server.run import configuration

COMMAND = [str(Path(sys.executable).with_name("sx-gguf")), "serve"]
KEY = "a-key"
HTTP = httpx.Client(timeout=60)  # making one takes longer than most requests
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "SX_GGUF_API_KEY"}


class Served:
    """A running `sx-gguf serve`."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (ends with the program; a pipe would be full some day)
        self.process = subprocess.Popen(
            [*COMMAND, *arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=ENVIRONMENT | environment,
        )
        self.line = self.process.stdout.readline().strip()
        if not self.line:
            raise RuntimeError(self.end()[1])
        self.url = self.line.split(" on ")[1].split(": ")[0]
        while HTTP.get(f"{self.url}/health").status_code != 200:
            time.sleep(0.05)

    def client(self, api_key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0)

    def post(self, path: str, body: object = None, content: bytes | None = None) -> httpx.Response:
        return HTTP.post(
            f"{self.url}{path}",
            content=json.dumps(body) if content is None else content,
            headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )

    def end(self, sig: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit code and standard error."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        self.process.communicate(timeout=60)
        with self.errors:
            self.errors.seek(0)
            return self.process.returncode, self.errors.read()


ARGUMENTS = dict.fromkeys(("group_size", "neighbor_window", "max_distance", "block_size", "schedule")) | {
    "verbose": False,
    "n_threads": 1,
    "n_threads_batch": 1,
}


@dataclass
class Serving:
    """A server in this process, where it can be seen how far the model has got."""

    url: str
    models: OneModelAtATime
    tasks: set[Any]  #: requests at work

    def client(self, api_key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0)


@contextlib.contextmanager
def serving(
    models: dict[str, Path], *, ctx: int, settings: Settings | None = None, cache: int = 0, **templates: Any
) -> Iterator[Serving]:
    """Serve models by name; `cache` bytes are for copies of prompts."""
    served = [
        ServedModel.from_file(path, name, ctx, ARGUMENTS, lambda: KeptPrompts(cache), **templates)
        for name, path in models.items()
    ]
    offered = OneModelAtATime(served, any_name=settings is None or not settings.strict)
    offered.load_first()
    app = create_app(offered, settings or Settings())
    server = uvicorn.Server(configuration(app, log_level="critical"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Serving(f"http://127.0.0.1:{listener.getsockname()[1]}", offered, server.server_state.tasks)
        finally:
            server.should_exit = True
            thread.join()
    offered.close()
