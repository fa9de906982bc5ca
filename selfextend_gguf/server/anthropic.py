"""Anthropic's /v1/messages: requests become those of OpenAI's chats, answers a row of content blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import model_validator

from selfextend_gguf.server.blocks import Block, BlocksForm, check_one_answer
from selfextend_gguf.server.forms import event
from selfextend_gguf.server.jobs import Job
from selfextend_gguf.server.requests import ChatRequest

_REFUSED = {
    "container": "there are none",
    "logprobs": "use /v1/chat/completions",
    "mcp_servers": "there are none",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class MessagesRequest(ChatRequest):
    """A body of /v1/messages."""

    @model_validator(mode="before")
    @classmethod
    def _as_chat(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        for name, why in _REFUSED.items():
            if given.pop(name, None):
                raise ValueError(f"{name} is not supported: {why}")
        check_one_answer(given)
        system = given.pop("system", None)
        messages = given.get("messages")
        if isinstance(messages, list):
            given["messages"] = [] if not system else [{"role": "system", "content": system}]
            for number, message in enumerate(messages):
                given["messages"] += _messages(f"messages[{number}]", message)
        if "stop_sequences" in given:
            given["stop"] = given.pop("stop_sequences")
        if "tools" in given:
            given["tools"] = _tools(given["tools"])
        if "tool_choice" in given:
            choice = _object("tool_choice", given.pop("tool_choice"))
            given["tool_choice"] = _choice(choice)
            if choice.get("disable_parallel_tool_use"):
                given["parallel_tool_calls"] = False
        config = _object("output_config", given.pop("output_config", {}))
        if config.get("format") is not None:
            wanted = _object("output_config.format", config["format"])
            given["response_format"] = {"type": wanted.get("type"), "json_schema": wanted}
        effort = config.get("effort")
        if _object("thinking", given.pop("thinking", {})).get("type") == "disabled":
            effort = "none"
        return given | ({} if effort is None else {"reasoning_effort": effort})


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object")
    return value


def _tools(given: Any) -> list[dict[str, Any]]:
    tools = []
    for number, tool in enumerate(given if isinstance(given, list) else [given]):
        if _object(f"tools[{number}]", tool).get("type", "custom") != "custom":
            raise ValueError(f"tools[{number}]: tools of type {tool['type']!r} are not supported")
        function = {"name": tool.get("name"), "description": tool.get("description")}
        tools.append({"type": "function", "function": {**function, "parameters": tool.get("input_schema")}})
    return tools


def _choice(choice: dict[str, Any]) -> Any:
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise ValueError(f"tool_choice.type must be auto, any, none or tool, not {kind!r}")
    return _CHOICES[kind]


def _messages(name: str, message: Any) -> list[dict[str, Any]]:
    """A message as those that chats have: results of tools come first, each as one of its own."""
    content = _object(name, message).get("content")
    if not isinstance(content, list):
        return [{"role": message.get("role"), "content": content}]
    results: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    texts: list[str] = []
    thoughts: list[str] = []
    for number, block in enumerate(content):
        kind = _object(f"{name}.content[{number}]", block).get("type")
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            said = block.get("content", "")
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": said})
        elif kind != "redacted_thinking":
            raise ValueError(f"{name}.content[{number}]: messages can hold text only, not {kind!r}")
    answer = {"reasoning_content": "".join(thoughts) or None, "tool_calls": calls or None}
    if texts or calls or thoughts or not results:
        return [*results, {"role": message.get("role"), "content": "".join(texts), **answer}]
    return results


class MessagesForm(BlocksForm):
    """Of /v1/messages."""

    def __init__(self, job: Job, body: MessagesRequest, keeps_thoughts_apart: bool) -> None:
        super().__init__(job, keeps_thoughts_apart)

    def whole(self) -> dict[str, Any]:
        """The answer as one body."""
        return self._message([_whole(block) for block in self._blocks])

    def begin(self) -> Iterator[str]:
        """That the answer has begun."""
        yield _event("message_start", message=self._message([]))

    def _opened(self, block: Block) -> Iterator[str]:
        yield _event("content_block_start", index=block.index, content_block=_whole(block))

    def _added(self, block: Block, text: str) -> Iterator[str]:
        kind, name = {
            "call": ("input_json_delta", "partial_json"),
            "thought": ("thinking_delta", "thinking"),
            "text": ("text_delta", "text"),
        }[block.kind]
        yield _event("content_block_delta", index=block.index, delta={"type": kind, name: text})

    def _closed(self, block: Block) -> Iterator[str]:
        yield _event("content_block_stop", index=block.index)

    def _ended(self) -> Iterator[str]:
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": None}
        yield _event("message_delta", delta=delta, usage=self._usage())
        yield _event("message_stop")

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._hex}",
            "type": "message",
            "role": "assistant",
            "model": self._job.alias,
            "content": content,
            "stop_reason": self._stop_reason(),
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _stop_reason(self) -> str | None:
        choice = self._choices[0]
        if choice.finish_reason == "stop":
            return "tool_use" if choice.calls else "end_turn"
        return "max_tokens" if choice.finish_reason == "length" else None

    def _usage(self) -> dict[str, Any]:
        n_prompt, n_cached, n_answer = self.counts()
        read = {"input_tokens": n_prompt - n_cached, "cache_read_input_tokens": n_cached}
        return {**read, "cache_creation_input_tokens": 0, "output_tokens": n_answer}


def _event(name: str, **data: Any) -> str:
    return event({"type": name, **data}, name)


def _whole(block: Block) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    if block.kind == "thought":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "tool_use", "id": f"toolu_{block.id}", "name": block.name, "input": _input(block.text)}


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call, which may have been cut."""
    try:
        return dict(json.loads(arguments or "{}"))
    except ValueError:
        return {"INVALID_JSON": arguments}
