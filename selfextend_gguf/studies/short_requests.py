"""How long a short request takes while a long text is read: docs/server.md.

    python -m selfextend_gguf.studies.short_requests model.gguf --text book.txt --tokens 16000

Starts a server twice. Once it has no room for copies (`--cache-ram 0`), so that requests wait for each other; once they
take turns. A second after a long prompt, short requests are sent, each after the answer to the one before, until the
long one is answered.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.programs import SX_GGUF

SHORT = {"prompt": "The first thing to know is", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True)
class Waits:
    """Seconds that requests took."""

    long_alone: float
    short_alone: float
    long: float
    short: list[float]  # while the long one was read

    def row(self, name: str) -> str:
        """As a line of a table."""
        numbers = (self.short_alone, statistics.median(self.short), max(self.short), self.long_alone, self.long)
        return f"| {name} | {len(self.short)} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |"


HEADING = """\
| | short requests | alone, s | median, s | longest, s | long one alone, s | long one, s |
|---|---:|---:|---:|---:|---:|---:|"""


class Server:
    """A running `sx-gguf serve` on a free port."""

    def __init__(self, *arguments: str) -> None:
        command = [SX_GGUF, "serve", *arguments, "--port", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start")
        self._url = line.split(" on ")[1].split(": ")[0]
        while not self._is_ready():
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/health") as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return False

    def ask(self, body: dict[str, Any]) -> float:
        """Seconds until the whole answer is there."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._url}/v1/completions", json.dumps(body).encode(), headers)
        began = time.perf_counter()
        with urllib.request.urlopen(request) as answer:
            answer.read()
        return time.perf_counter() - began

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def measure(arguments: list[str], prompt: list[int]) -> Waits:
    """Ask a new server. The prompt is read twice, the second time from another first token on."""

    def long(first: int) -> dict[str, Any]:
        return {"prompt": [*prompt[first:], *prompt[:first]], "max_tokens": 1, "temperature": 0}

    server = Server(*arguments)
    try:
        server.ask(SHORT)
        short_alone = statistics.median(server.ask(SHORT) for _ in range(5))
        long_alone = server.ask(long(0))
        took: list[float] = []
        thread = threading.Thread(target=lambda: took.append(server.ask(long(1))))
        thread.start()
        time.sleep(1)
        short = [server.ask(SHORT)]
        while thread.is_alive():
            short.append(server.ask(SHORT))
        thread.join()
        return Waits(long_alone, short_alone, took[0], short)
    finally:
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="read again and again until it is long enough")
    parser.add_argument("--tokens", type=int, required=True, help="of the long prompt")
    given, options = parser.parse_known_args()  # the rest goes to sx-gguf serve
    tokenizer = ModelInfo(given.model).tokenizer
    tokens = tokenizer.tokens(given.text.read_text(encoding="utf-8"), special=False)
    prompt = (tokens * (given.tokens // len(tokens) + 1))[: given.tokens]
    arguments = [str(given.model), "-c", str(given.tokens + 64), *options]
    print(f"{given.model.name}, {len(prompt)} tokens\n\n{HEADING}")
    print(measure([*arguments, "--cache-ram", "0"], prompt).row("one after the other"), flush=True)
    print(measure(arguments, prompt).row("in turns"))


if __name__ == "__main__":
    main()
