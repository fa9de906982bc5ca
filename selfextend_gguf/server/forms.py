"""Answers in a form: whole, or as events of a stream. Here those of OpenAI's older endpoints."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from selfextend_gguf import __version__
from selfextend_gguf.generate import Timings
from selfextend_gguf.server.answering import Read, Said
from selfextend_gguf.server.jobs import Job
from selfextend_gguf.server.logprobs import Chosen, of_chat, of_completion
from selfextend_gguf.server.requests import Request

_FINGERPRINT = f"selfextend-gguf-{__version__}"  # what answered: with a seed, answers are the same while it is


@dataclass
class CalledTool:
    """A call of a tool, as far as it is known."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Choice:
    """An answer, as far as it is known."""

    text: str = ""
    thought: str = ""
    n_thought: int = 0  #: tokens
    calls: list[CalledTool] = field(default_factory=list)
    tokens: list[Chosen] = field(default_factory=list)
    finish_reason: str | None = None
    timings: Timings = field(default_factory=lambda: Timings(0))
    n_answer: int = 0


class Form(ABC):
    """Puts what is said into a form. One for each request."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._hex = uuid.uuid4().hex  # of identifiers
        self._created = int(time.time())
        self._choices = [Choice() for _ in range(len(job.prompts) * job.n)]

    def take(self, said: Said) -> Choice:
        """Note what is said; the answer so far."""
        choice = self._choices[said.index]
        if said.kind == "thought":
            choice.thought += said.text
            choice.n_thought += len(said.tokens)
        elif said.kind == "answer":
            choice.text += said.text
        if said.name is not None:
            choice.calls.append(CalledTool(f"call_{self._hex[-24:]}_{said.index}_{len(choice.calls)}", said.name))
        if choice.calls:
            choice.calls[-1].arguments += said.arguments
        choice.tokens += said.tokens
        choice.finish_reason, choice.timings, choice.n_answer = said.finish_reason, said.timings, said.n_answer
        return choice

    def counts(self) -> tuple[int, int, int]:
        """Tokens of prompts, those of them that were cached, tokens of answers. A prompt counts once."""
        n_prompt = sum(len(prompt.tokens) for prompt in self._job.prompts)
        n_cached = sum(choice.timings.cached_tokens for choice in self._choices[:: self._job.n])
        return n_prompt, n_cached, sum(choice.n_answer for choice in self._choices)

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The answers as one body."""

    def begin(self) -> Iterator[str]:
        """Events of a stream before anything is known."""
        yield from ()

    def progress(self, read: Read) -> Iterator[str]:
        """Events that say how much of a prompt has been read."""
        yield from ()

    @abstractmethod
    def tell(self, said: Said) -> Iterator[str]:
        """Note what is said, for the events of a stream that say it."""

    @abstractmethod
    def end(self) -> Iterator[str]:
        """Events after the last answer."""


def event(data: dict[str, Any], name: str | None = None) -> str:
    """A server-sent event."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"


class ChoicesForm(Form):
    """Answers as choices, of OpenAI's older endpoints."""

    object: str  #: what OpenAI calls a whole answer
    chunk_object: str  #: and a part of one
    prefix: str  #: of identifiers

    def __init__(self, job: Job, body: Request) -> None:
        super().__init__(job)
        self._tells_usage = body.stream_options.include_usage
        self._tells_progress = body.return_progress

    def _body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        name = f"{self.prefix}-{self._hex}"
        known = {"id": name, "object": kind, "created": self._created, "model": self._job.alias}
        known["system_fingerprint"] = _FINGERPRINT
        return {**known, "choices": choices, **more}

    def _chunk(self, choice: dict[str, Any], **more: Any) -> str:
        return event(self._body(self.chunk_object, [choice], **more))

    def _usage(self) -> dict[str, Any]:
        n_prompt, n_cached, n_answer = self.counts()
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
        return self._body(self.object, choices, usage=self._usage(), timings=timings)

    def tell(self, said: Said) -> Iterator[str]:
        """What is said, as chunks."""
        self.take(said)
        for part in self._parts(said):
            yield self._chunk({"index": said.index, "logprobs": None, "finish_reason": None, **part})
        if said.finish_reason is not None:
            choice = {"index": said.index, **self._end(said), "logprobs": None}
            yield self._chunk(choice, timings=timings_of(said.timings))

    def end(self) -> Iterator[str]:
        """Usage, if it is asked for, and a mark."""
        if self._tells_usage:
            yield event(self._body(self.chunk_object, [], usage=self._usage()))
        yield "data: [DONE]\n\n"

    def progress(self, read: Read) -> Iterator[str]:
        """How much of a prompt has been read, as llama.cpp's server reports it, if it is asked for."""
        if self._tells_progress:
            progress = {
                "total": read.n_prompt,
                "cache": read.n_cached,
                "processed": read.n_processed,
                "time_ms": round(read.seconds * 1000),
            }
            choice = {"index": read.index, **self._nothing(), "logprobs": None, "finish_reason": None}
            yield self._chunk(choice, prompt_progress=progress)

    @abstractmethod
    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """An answer as a choice."""

    @abstractmethod
    def _parts(self, said: Said) -> Iterator[dict[str, Any]]:
        """What is said and has been noted, as parts of choices."""

    @abstractmethod
    def _end(self, said: Said) -> dict[str, Any]:
        """The end of an answer as part of a choice."""

    @abstractmethod
    def _nothing(self) -> dict[str, Any]:
        """A part of a choice in which nothing is said."""


class CompletionForm(ChoicesForm):
    """Of /v1/completions."""

    object = chunk_object = "text_completion"
    prefix = "cmpl"

    def __init__(self, job: Job, body: Request, echoed: list[str] | None = None) -> None:
        """`echoed`: texts that stand before the answers to each prompt."""
        super().__init__(job, body)
        self._echoed = echoed

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        echoed = self._echoed[index // self._job.n] if self._echoed else ""
        before = 0 if self._job.scored_from else len(echoed)
        logprobs = None if self._job.n_top is None else of_completion(choice.tokens, before)
        text = echoed + choice.text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _parts(self, said: Said) -> Iterator[dict[str, Any]]:
        if said.text:
            offset = len(self._choices[said.index].text) - len(said.text)
            logprobs = None if self._job.n_top is None else of_completion(said.tokens, offset)
            yield {"text": said.text, "logprobs": logprobs}

    def _end(self, said: Said) -> dict[str, Any]:
        return {"text": "", "finish_reason": said.finish_reason}

    def _nothing(self) -> dict[str, Any]:
        return {"text": ""}


class ChatForm(ChoicesForm):
    """Of /v1/chat/completions."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, job: Job, body: Request, keeps_thoughts_apart: bool) -> None:
        super().__init__(job, body)
        self._apart = keeps_thoughts_apart
        self._begun: set[int] = set()  # answers whose role has been told

    def take(self, said: Said) -> Choice:
        """Note what is said; the answer so far."""
        return super().take(said if self._apart else replace(said, kind="answer"))

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if choice.calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [_as_tool_call(call) for call in choice.calls]
        if choice.thought.strip():
            message["reasoning_content"] = choice.thought.strip()
        logprobs = None if self._job.n_top is None else of_chat(choice.tokens)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": _finish_reason(choice)}

    def _parts(self, said: Said) -> Iterator[dict[str, Any]]:
        said = said if self._apart else replace(said, kind="answer")
        if said.index not in self._begun:
            self._begun.add(said.index)
            yield {"delta": {"role": "assistant", "content": None if said.name is not None else ""}}
        number = len(self._choices[said.index].calls) - 1  # of the last call
        delta: dict[str, Any] = {}
        if said.kind == "thought" and said.text:
            delta = {"reasoning_content": said.text}
        elif said.kind == "answer" and said.text:
            delta = {"content": said.text}
        elif said.arguments:
            delta = {"tool_calls": [{"index": number, "function": {"arguments": said.arguments}}]}
        if said.name is not None:
            begun = replace(self._choices[said.index].calls[-1], arguments="")
            yield {"delta": {"tool_calls": [{"index": number, **_as_tool_call(begun)}]}}
        if delta or (said.tokens and self._job.n_top is not None):
            yield {"delta": delta, "logprobs": None if self._job.n_top is None else of_chat(said.tokens)}

    def _end(self, said: Said) -> dict[str, Any]:
        return {"delta": {}, "finish_reason": _finish_reason(self._choices[said.index])}

    def _nothing(self) -> dict[str, Any]:
        return {"delta": {}}


def _as_tool_call(call: CalledTool) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _finish_reason(choice: Choice) -> str | None:
    return "tool_calls" if choice.finish_reason == "stop" and choice.calls else choice.finish_reason


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
