"""Answers as a row of blocks: thoughts, texts, calls. Newer APIs have them so."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from selfextend_gguf.server.answering import Said
from selfextend_gguf.server.forms import Choice, Form
from selfextend_gguf.server.jobs import Job


def check_one_answer(body: dict[str, Any]) -> None:
    """Raise ValueError for a body that asks for several answers, which have no place in a row of blocks."""
    if body.get("n", 1) != 1:
        raise ValueError("n is not supported: there is one answer")


@dataclass
class Block:
    """A part of an answer, as far as it is known."""

    kind: Literal["thought", "text", "call"]
    index: int
    id: str
    name: str = ""  #: of the tool that is called
    text: str = ""  #: or arguments of the call, JSON


class BlocksForm(Form):
    """One answer, whose blocks are the same whether it is whole or a stream."""

    def __init__(self, job: Job, keeps_thoughts_apart: bool) -> None:
        super().__init__(job)
        self._apart = keeps_thoughts_apart
        self._blocks: list[Block] = []

    def take(self, said: Said) -> Choice:
        """Note what is said; the answer so far."""
        for _ in self.tell(said):
            pass
        return self._choices[0]

    def tell(self, said: Said) -> Iterator[str]:
        """What is said, as events of its block."""
        super().take(said)
        text = said.arguments or said.text
        kind: Literal["thought", "text", "call"] = "text"
        if said.kind == "tag":
            return
        if said.name is not None or said.arguments:
            kind = "call"
        elif said.kind == "thought" and self._apart:
            kind = "thought"
        if said.name is not None or (text and (not self._blocks or self._blocks[-1].kind != kind)):
            if self._blocks:
                yield from self._closed(self._blocks[-1])
            number = len(self._blocks)
            self._blocks.append(Block(kind, number, f"{self._hex[-24:]}{number}", said.name or ""))
            yield from self._opened(self._blocks[-1])
        if text:
            self._blocks[-1].text += text
            yield from self._added(self._blocks[-1], text)

    def end(self) -> Iterator[str]:
        """The end of the last block, and of the answer."""
        if self._blocks:
            yield from self._closed(self._blocks[-1])
        yield from self._ended()

    @abstractmethod
    def _opened(self, block: Block) -> Iterator[str]:
        """Events at the beginning of a block."""

    @abstractmethod
    def _added(self, block: Block, text: str) -> Iterator[str]:
        """Events for more of a block."""

    @abstractmethod
    def _closed(self, block: Block) -> Iterator[str]:
        """Events at the end of a block."""

    @abstractmethod
    def _ended(self) -> Iterator[str]:
        """Events at the end of the answer."""
