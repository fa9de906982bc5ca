"""`sx-gguf serve`, running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai

COMMAND = [str(Path(sys.executable).with_name("sx-gguf")), "serve"]
KEY = "a-key"
HTTP = httpx.Client(timeout=60)  # making one takes longer than most requests
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "SX_GGUF_API_KEY"}


class Served:
    """A running `sx-gguf serve`."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT | environment,
        )
        self.line = self.process.stdout.readline().strip()
        if not self.line:
            raise RuntimeError(self.process.communicate()[1])
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
        error = self.process.communicate(timeout=60)[1]
        return self.process.returncode, error
