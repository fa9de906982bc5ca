"""Programs on a pseudo-terminal whose screen is rendered."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pexpect
import pyte

COMMAND = str(Path(sys.executable).with_name("sx-gguf"))
GIVE_UP = 120  # seconds


class Terminal:
    """A program on a pseudo-terminal, and what its screen shows."""

    def __init__(
        self,
        command: str,
        *arguments: str,
        columns: int = 160,
        rows: int = 30,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.program = pexpect.spawn(
            command,
            list(arguments),
            dimensions=(rows, columns),
            # Without COLUMNS, which readline exports behind Python's back. Bars are drawn at every step.
            env={**os.environ, "TERM": "xterm", "TQDM_MININTERVAL": "0", **(environment or {})},
            encoding="utf-8",
            timeout=GIVE_UP,
            # As on any terminal, even where the tests are run by nohup.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        self.screen = pyte.Screen(columns, rows)
        self.screen.write_process_input = self.program.send  # the terminal's answer to "where is the cursor?"
        self.stream = pyte.Stream(self.screen)
        self.has_ended = False
        self.received = ""  # with escape sequences

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def until(self, pattern: str) -> list[str]:
        """Wait for the screen's text to match."""
        end = time.monotonic() + GIVE_UP
        while not re.search(pattern, "\n".join(self.lines()), re.MULTILINE):
            is_over = self.has_ended or time.monotonic() > end
            assert not is_over, f"no {pattern!r} on the screen:\n" + "\n".join(self.lines())
            self.read()
        return self.lines()

    def read(self, seconds: float = 0.5) -> None:
        """Show what comes, waiting at most so long for the first of it."""
        try:
            for _ in range(100):  # an answer comes in single characters; looking at the screen takes longer
                received = self.program.read_nonblocking(4096, timeout=seconds)
                self.received += received
                self.stream.feed(received)
                seconds = 0
        except pexpect.TIMEOUT:
            pass
        except pexpect.EOF:
            self.has_ended = True
            time.sleep(0.05)

    def type(self, keys: str) -> None:
        self.program.send(keys)

    def enter(self, message: str) -> list[str]:
        """Send a message or command and wait for the next prompt."""
        self.type(message)
        self.until(rf"^> {re.escape(message.rstrip())}\Z")
        self.type("\r")
        return self.until(r"^>\Z")

    def kill(self, way: signal.Signals) -> None:
        """End the program by a signal."""
        self.program.kill(way)
        self.exit_code()

    def exit_code(self) -> int:
        end = time.monotonic() + GIVE_UP
        while self.program.isalive():
            assert time.monotonic() < end, "does not end"
            self.read(0.1)
        self.program.close()
        return self.program.exitstatus
