"""OpenAI's /v1/responses: requests become those of chats, answers a row of items. Nothing is kept between requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import model_validator

from selfextend_gguf.server.blocks import Block, BlocksForm, check_one_answer
from selfextend_gguf.server.forms import event
from selfextend_gguf.server.jobs import Job
from selfextend_gguf.server.requests import ChatRequest

_STORED = "nothing is kept between requests: send the whole conversation as input"
_REFUSED = {
    "background": "answers come at once",
    "conversation": _STORED,
    "logprobs": "use /v1/chat/completions",
    "previous_response_id": _STORED,
    "prompt": "there are no stored prompts",
    "top_logprobs": "use /v1/chat/completions",
}
# Without an effect here.
_IGNORED = ("include", "max_tool_calls", "truncation")


class ResponsesRequest(ChatRequest):
    """A body of /v1/responses."""

    instructions: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_chat(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None and name not in _IGNORED}
        for name, why in _REFUSED.items():
            if given.pop(name, None):
                raise ValueError(f"{name} is not supported: {why}")
        check_one_answer(given)
        if "input" not in given:
            raise ValueError("input: Field required")
        system = [{"role": "system", "content": given["instructions"]}] if "instructions" in given else []
        given["messages"] = [*system, *_messages(given.pop("input"))]
        if "max_output_tokens" in given:
            given["max_tokens"] = given.pop("max_output_tokens")
        if "tools" in given:
            given["tools"] = [_tool(number, tool) for number, tool in enumerate(_listed("tools", given["tools"]))]
        choice = given.get("tool_choice")
        if isinstance(choice, dict) and choice.get("type") == "function":
            given["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
        wanted = _object("text", given.pop("text", {})).get("format")
        if wanted is not None:
            schema = _object("text.format", wanted)
            given["response_format"] = {"type": schema.get("type"), "json_schema": schema}
        effort = _object("reasoning", given.pop("reasoning", {})).get("effort")
        if effort is not None:
            given["reasoning_effort"] = effort
        return given


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object")
    return value


def _listed(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list")
    return value


def _tool(number: int, tool: Any) -> dict[str, Any]:
    if _object(f"tools[{number}]", tool).get("type") != "function":
        raise ValueError(f"tools[{number}]: only functions can be called, not {tool.get('type')!r}")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _messages(given: Any) -> list[dict[str, Any]]:
    """Input as messages: calls and thoughts become parts of the answer that they belong to."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(_listed("input", given)):
        kind = _object(f"input[{number}]", item).get("type", "message")
        if kind == "message":
            message = {name: item[name] for name in ("role", "content") if name in item}
            if message.get("role") == "assistant" and _is_begun(messages, "content"):
                messages[-1] |= message  # a thought came before
            else:
                messages.append(message)
        elif kind == "reasoning":
            parts = [_object("reasoning", part) for part in _listed("content", item.get("content") or [])]
            messages.append(
                {"role": "assistant", "reasoning_content": "".join(str(part.get("text")) for part in parts)}
            )
        elif kind == "function_call":
            call = {name: item.get(name) for name in ("name", "arguments")}
            if not _is_begun(messages):
                messages.append({"role": "assistant"})
            calls = messages[-1].setdefault("tool_calls", [])
            calls.append({"id": item.get("call_id"), "type": "function", "function": call})
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        else:
            raise ValueError(f"input[{number}]: items of type {kind!r} are not supported")
    return messages


def _is_begun(messages: list[dict[str, Any]], without: str | None = None) -> bool:
    """Whether the last message is an answer, to which more belongs."""
    return bool(messages) and messages[-1].get("role") == "assistant" and without not in messages[-1]


class ResponsesForm(BlocksForm):
    """Of /v1/responses."""

    def __init__(self, job: Job, body: ResponsesRequest, keeps_thoughts_apart: bool) -> None:
        super().__init__(job, keeps_thoughts_apart)
        self._asked = body
        self._n_events = 0

    def whole(self) -> dict[str, Any]:
        """The answer as one body."""
        return self._response([self._item(block) for block in self._blocks])

    def begin(self) -> Iterator[str]:
        """That the answer has begun."""
        yield self._event("response.created", response=self._response([]))
        yield self._event("response.in_progress", response=self._response([]))

    def _ended(self) -> Iterator[str]:
        response = self.whole()
        yield self._event(f"response.{response['status']}", response=response)

    def _opened(self, block: Block) -> Iterator[str]:
        item = self._item(block, "in_progress") | ({} if block.kind == "call" else {"content": []})
        yield self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind != "call":
            yield self._part_event("response.content_part.added", block, part=_part(block))

    def _added(self, block: Block, text: str) -> Iterator[str]:
        if block.kind == "call":
            yield self._item_event("response.function_call_arguments.delta", block, delta=text)
        elif block.kind == "thought":
            yield self._part_event("response.reasoning_text.delta", block, delta=text)
        else:
            yield self._part_event("response.output_text.delta", block, delta=text, logprobs=[])

    def _closed(self, block: Block) -> Iterator[str]:
        if block.kind == "call":
            more = {"name": block.name, "arguments": block.text}
            yield self._item_event("response.function_call_arguments.done", block, **more)
        else:
            if block.kind == "thought":
                yield self._part_event("response.reasoning_text.done", block, text=block.text)
            else:
                yield self._part_event("response.output_text.done", block, text=block.text, logprobs=[])
            yield self._part_event("response.content_part.done", block, part=_part(block))
        yield self._event("response.output_item.done", output_index=block.index, item=self._item(block))

    def _event(self, kind: str, /, **data: Any) -> str:
        numbered = {"type": kind, "sequence_number": self._n_events, **data}
        self._n_events += 1
        return event(numbered, kind)

    def _item_event(self, kind: str, block: Block, /, **data: Any) -> str:
        return self._event(kind, item_id=_id(block), output_index=block.index, **data)

    def _part_event(self, kind: str, block: Block, /, **data: Any) -> str:
        return self._item_event(kind, block, content_index=0, **data)

    def _item(self, block: Block, status: str | None = None) -> dict[str, Any]:
        is_cut = self._choices[0].finish_reason == "length" and block is self._blocks[-1]
        item = {"id": _id(block), "status": status or ("incomplete" if is_cut else "completed")}
        if block.kind == "call":
            call = {"call_id": f"call_{block.id}", "name": block.name, "arguments": block.text}
            return {"type": "function_call", **item, **call}
        if block.kind == "thought":
            return {"type": "reasoning", **item, "summary": [], "content": [_part(block)]}
        return {"type": "message", **item, "role": "assistant", "content": [_part(block)]}

    def _response(self, output: list[dict[str, Any]]) -> dict[str, Any]:
        body, reason = self._asked, self._choices[0].finish_reason
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        choice = body.tool_choice or "auto"
        return {
            "id": f"resp_{self._hex}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_tokens,
            "metadata": body.metadata or {},
            "model": self._job.alias,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "tool_choice": {"type": "function", **choice["function"]} if isinstance(choice, dict) else choice,
            "tools": [{"type": "function", "strict": None, **tool.function.model_dump()} for tool in body.tools],
            "top_p": body.top_p,
            "usage": self._usage() if reason is not None else None,
        }

    def _usage(self) -> dict[str, Any]:
        n_prompt, n_cached, n_answer = self.counts()
        return {
            "input_tokens": n_prompt,
            "input_tokens_details": {"cached_tokens": n_cached, "cache_write_tokens": 0},
            "output_tokens": n_answer,
            "output_tokens_details": {"reasoning_tokens": self._choices[0].n_thought},
            "total_tokens": n_prompt + n_answer,
        }


def _id(block: Block) -> str:
    return {"call": "fc_", "thought": "rs_", "text": "msg_"}[block.kind] + block.id


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "thought":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
