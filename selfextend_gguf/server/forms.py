"""Answers in the forms of OpenAI's API: whole, or in chunks of a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from selfextend_gguf.generate import Timings
from selfextend_gguf.server.answering import Read, Said
from selfextend_gguf.server.jobs import Job
from selfextend_gguf.server.logprobs import Chosen, of_chat, of_completion


@dataclass
class Choice:
    """An answer, as far as it is known."""

    text: str = ""
    thought: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    finish_reason: str | None = None
    timings: Timings = field(default_factory=lambda: Timings(0))
    n_answer: int = 0


class Form(ABC):
    """Puts what is said into a form. One for each request."""

    object: str  #: what OpenAI calls a whole answer
    chunk_object: str  #: and a part of one
    prefix: str  #: of identifiers

    def __init__(self, job: Job) -> None:
        self._job = job
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._choices = [Choice() for _ in range(len(job.prompts) * job.n)]

    def _body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        known = {"id": self._id, "object": kind, "created": self._created, "model": self._job.alias}
        return {**known, "choices": choices, **more}

    def take(self, said: Said) -> Choice:
        """Note what is said; the answer so far."""
        choice = self._choices[said.index]
        if said.kind == "thought":
            choice.thought += said.text
        elif said.kind == "answer":
            choice.text += said.text
        choice.tokens += said.tokens
        choice.finish_reason, choice.timings, choice.n_answer = said.finish_reason, said.timings, said.n_answer
        return choice

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens, of all answers together; a prompt counts once."""
        n_prompt = sum(len(prompt.tokens) for prompt in self._job.prompts)
        n_cached = sum(choice.timings.cached_tokens for choice in self._choices[:: self._job.n])
        n_answer = sum(choice.n_answer for choice in self._choices)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_answer,
            "total_tokens": n_prompt + n_answer,
            "prompt_tokens_details": {"cached_tokens": n_cached},
        }

    def whole(self) -> dict[str, Any]:
        """The answers as one body."""
        choices = [self._whole(index, choice) for index, choice in enumerate(self._choices)]
        timings = timings_of(self._choices[-1].timings)
        return self._body(self.object, choices, usage=self.usage(), timings=timings)

    def chunks(self, said: Said) -> Iterator[dict[str, Any]]:
        """What is said, as chunks of a stream."""
        finish = said.finish_reason
        for part in self._parts(said):
            yield self._body(
                self.chunk_object, [{"index": said.index, "logprobs": None, "finish_reason": None, **part}]
            )
        self.take(said)
        if finish is not None:
            choice = {"index": said.index, **self._end(said), "logprobs": None}
            yield self._body(self.chunk_object, [choice], timings=timings_of(said.timings))

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk after the last answer, if it is asked for."""
        return self._body(self.chunk_object, [], usage=self.usage())

    def progress_chunk(self, read: Read) -> dict[str, Any]:
        """How much of a prompt has been read, as llama.cpp's server reports it."""
        progress = {
            "total": read.n_prompt,
            "cache": read.n_cached,
            "processed": read.n_processed,
            "time_ms": round(read.seconds * 1000),
        }
        choice = {"index": read.index, **self._nothing(), "logprobs": None, "finish_reason": None}
        return self._body(self.chunk_object, [choice], prompt_progress=progress)

    @abstractmethod
    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """An answer as a choice."""

    @abstractmethod
    def _parts(self, said: Said) -> Iterator[dict[str, Any]]:
        """What is said, as parts of choices."""

    @abstractmethod
    def _end(self, said: Said) -> dict[str, Any]:
        """The end of an answer as part of a choice."""

    @abstractmethod
    def _nothing(self) -> dict[str, Any]:
        """A part of a choice in which nothing is said."""


class CompletionForm(Form):
    """Of /v1/completions."""

    object = chunk_object = "text_completion"
    prefix = "cmpl"

    def __init__(self, job: Job, echoed: list[str] | None = None) -> None:
        """`echoed`: texts that stand before the answers to each prompt."""
        super().__init__(job)
        self._echoed = echoed

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        echoed = self._echoed[index // self._job.n] if self._echoed else ""
        logprobs = None if self._job.n_top is None else of_completion(choice.tokens, len(echoed))
        text = echoed + choice.text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _parts(self, said: Said) -> Iterator[dict[str, Any]]:
        if said.text:
            offset = len(self._choices[said.index].text)
            logprobs = None if self._job.n_top is None else of_completion(said.tokens, offset)
            yield {"text": said.text, "logprobs": logprobs}

    def _end(self, said: Said) -> dict[str, Any]:
        return {"text": "", "finish_reason": said.finish_reason}

    def _nothing(self) -> dict[str, Any]:
        return {"text": ""}


class ChatForm(Form):
    """Of /v1/chat/completions."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, job: Job, *, tool: str | None, keeps_thoughts_apart: bool) -> None:
        """`tool`: name of the one that is called; else the answer is a text."""
        super().__init__(job)
        self._tool = tool
        self._apart = keeps_thoughts_apart
        self._begun: set[int] = set()  # answers whose role has been told

    def take(self, said: Said) -> Choice:
        """Note what is said; the answer so far."""
        return super().take(said if self._apart else replace(said, kind="answer"))

    def _call(self, index: int, arguments: str) -> dict[str, Any]:
        function = {"name": self._tool, "arguments": arguments}
        return {"id": f"call_{self._id[-24:]}_{index}", "type": "function", "function": function}

    def _finish_reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._tool is not None else reason

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if self._tool is not None:
            message |= {"content": None, "tool_calls": [self._call(index, choice.text)]}
        if choice.thought.strip():
            message["reasoning_content"] = choice.thought.strip()
        logprobs = None if self._job.n_top is None else of_chat(choice.tokens)
        reason = self._finish_reason(choice.finish_reason)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _parts(self, said: Said) -> Iterator[dict[str, Any]]:
        if said.index not in self._begun:
            self._begun.add(said.index)
            yield {"delta": self._first(said.index)}
        said = said if self._apart else replace(said, kind="answer")
        delta: dict[str, Any] = {}
        if self._tool is not None:
            delta = {"tool_calls": [{"index": 0, "function": {"arguments": said.text}}]}
        elif said.kind == "thought":
            delta = {"reasoning_content": said.text}
        elif said.kind == "answer":
            delta = {"content": said.text}
        if said.text and (delta or said.tokens):
            yield {"delta": delta, "logprobs": None if self._job.n_top is None else of_chat(said.tokens)}

    def _first(self, index: int) -> dict[str, Any]:
        """The first delta of an answer: who says it and, of a call, what no other delta has."""
        if self._tool is None:
            return {"role": "assistant", "content": ""}
        return {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **self._call(index, "")}]}

    def _end(self, said: Said) -> dict[str, Any]:
        return {"delta": {}, "finish_reason": self._finish_reason(said.finish_reason)}

    def _nothing(self) -> dict[str, Any]:
        return {"delta": {}}


def timings_of(timings: Timings) -> dict[str, Any]:
    """Timings by the names of llama.cpp's server."""
    n_read = timings.prompt_tokens - timings.cached_tokens
    return {
        "cache_n": timings.cached_tokens,
        **_rates("prompt", n_read, timings.prompt_seconds),
        **_rates("predicted", timings.generated_tokens, timings.generate_seconds),
    }


def _rates(name: str, n: int, seconds: float) -> dict[str, Any]:
    return {
        f"{name}_n": n,
        f"{name}_ms": round(seconds * 1000, 3),
        f"{name}_per_token_ms": round(seconds * 1000 / n, 3) if n else 0.0,
        f"{name}_per_second": round(n / seconds, 3) if seconds else 0.0,
    }
