"""What the converters of other APIs make of bodies in which anything stands anywhere."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from selfextend_gguf.server.anthropic import MessagesRequest
from selfextend_gguf.server.requests import ChatRequest
from selfextend_gguf.server.responses import ResponsesRequest

STRANGE: list[Any] = [
    None,
    True,
    0,
    -1,
    2.5,
    10**30,
    "",
    "a",
    "\ud800",
    [],
    [None],
    [[]],
    ["a"],
    {},
    {"type": "text"},
    {"a": {}},
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
MESSAGES = {
    "model": "a",
    "max_tokens": 9,
    "system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "a", "signature": ""},
                {"type": "tool_use", "id": "1", "name": "a", "input": {"a": "b"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "a", "is_error": False}]},
    ],
    "tools": [{"name": "a", "description": "a", "input_schema": SCHEMA}],
    "tool_choice": {"type": "tool", "name": "a", "disable_parallel_tool_use": True},
    "thinking": {"type": "disabled"},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
    "stop_sequences": ["a"],
}
RESPONSES = {
    "model": "a",
    "instructions": "a",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "1", "summary": [], "content": [{"type": "reasoning_text", "text": "a"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        {"type": "function_call", "call_id": "1", "name": "a", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "a"},
    ],
    "tools": [{"type": "function", "name": "a", "description": "a", "parameters": SCHEMA, "strict": True}],
    "tool_choice": {"type": "function", "name": "a"},
    "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}, "verbosity": "low"},
    "reasoning": {"effort": "low"},
    "max_output_tokens": 9,
    "metadata": {"a": "b"},
}
BODIES = [(MessagesRequest, MESSAGES), (ResponsesRequest, RESPONSES)]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@pytest.mark.parametrize(("form", "good"), BODIES)
def test_the_same_conversation_comes_from_both(form: type[ChatRequest], good: dict):
    body = form.model_validate(good)
    assert [message.role for message in body.messages] == ["system", "user", "assistant", "tool"]
    answer = body.messages[2]
    assert (answer.reasoning_content, [call.function.name for call in answer.tool_calls]) == ("a", ["a"])
    assert (body.max_tokens, body.tools[0].function.parameters) == (9, SCHEMA)
    assert body.response_format == {"type": "json_object", "schema": SCHEMA}
    assert body.tool_choice == {"type": "function", "function": {"name": "a"}}
    assert not body.unknown


@pytest.mark.parametrize(("form", "good"), BODIES)
def test_anything_anywhere_is_taken_or_refused_in_one_line(form: type[ChatRequest], good: dict):
    n_refused = 0
    for number in range(len(list(places(good)))):
        for strange in STRANGE:
            body = copy.deepcopy(good)
            container, key = list(places(body))[number]
            container[key] = strange
            try:
                form.model_validate(body)
            except ValidationError as error:
                n_refused += 1
                assert error.errors()[0]["msg"].count("\n") == 0
    assert n_refused > 100


@pytest.mark.parametrize(("form", "good"), BODIES)
def test_many_strange_things_at_once(form: type[ChatRequest], good: dict):
    rng = random.Random(1)
    for _ in range(500):
        body = copy.deepcopy(good)
        for _ in range(rng.randint(2, 5)):
            container, key = rng.choice(list(places(body)))
            if rng.random() < 0.2 and isinstance(container, dict):
                del container[key]
            else:
                container[key] = copy.deepcopy(rng.choice(STRANGE))
        try:
            form.model_validate(body)
        except ValidationError as error:
            assert json.dumps(error.errors()[0]["msg"])
