"""`sx-gguf` that waits at chosen moments, so that no test has to be faster than the model:

    python tests/held.py FOLDER chat MODEL ...

While FOLDER holds a file "reading", the reading of a message stops after READ tokens; while it holds a file "answer",
an answer stops after ANSWERED tokens. When the file is gone or Ctrl-C is pressed, it goes on as if it had not stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from selfextend_gguf.cli import main
from selfextend_gguf.conversation import Conversation
from selfextend_gguf.generate import Piece
from selfextend_gguf.llama import Llama

command = import_module("selfextend_gguf.cli.chat")  # in its package, that name is the command's
READ, ANSWERED = 300, 200


def hold(folder: Path) -> None:
    """Make the answers of a chat wait."""
    ask, deferred_interrupts = Conversation.ask, command.deferred_interrupts
    check: Callable[[], None]  # raises KeyboardInterrupt after Ctrl-C

    def wait(moment: str) -> None:
        while (folder / moment).exists():
            try:
                check()
            except KeyboardInterrupt:
                return
            time.sleep(0.01)

    @contextmanager
    def remembered(llm: Llama) -> Iterator[Callable[[], None]]:
        nonlocal check
        with deferred_interrupts(llm) as check:
            yield check

    def held(self: Conversation, text: str, *, on_read: Callable[[int, int], None], **options: Any) -> Iterator[Piece]:
        has_waited = False

        def report(done: int, total: int) -> None:
            nonlocal has_waited
            on_read(done, total)
            if done >= READ and not has_waited:
                has_waited = True
                wait("reading")

        with closing(ask(self, text, on_read=report, **options)) as pieces:
            for n, piece in enumerate(pieces, start=1):
                yield piece
                if n == ANSWERED:
                    wait("answer")

    command.deferred_interrupts, Conversation.ask = remembered, held


if __name__ == "__main__":
    hold(Path(sys.argv.pop(1)))
    main()
