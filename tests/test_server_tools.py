"""Calls of tools through the server: read from what the model writes, forced, streamed, and answered."""

from __future__ import annotations

import json

import openai
import pytest
from served import HTTP, serving
from test_tool_calls import HERMES

from selfextend_gguf.models import TINY_MODEL

CITY = {"city": {"enum": ["Rome", "Joppa"]}}
PARAMETERS = {"type": "object", "properties": CITY, "required": ["city"], "additionalProperties": False}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now"}}
USER = {"role": "user", "content": "Say"}
ASKED = {"model": "tiny", "messages": [USER], "tools": [WEATHER, NOW], "temperature": 0}
CALLS = (
    '<think>Hm</think>Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def server():
    with serving({"tiny": TINY_MODEL}, ctx=2048, cache=2**26, chat_template=HERMES) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def functions(message) -> list[tuple[str, dict]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def test_calls_of_an_answer(client, model_says):
    model_says(CALLS)
    choice = client.chat.completions.create(**ASKED, logprobs=True).choices[0]
    assert functions(choice.message) == [("weather", {"city": "Rome"}), ("now", {})]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    assert choice.message.reasoning_content == "Hm"


def test_calls_of_a_stream(client, model_says):
    model_says(CALLS)
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ASKED, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Let me see."
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [(delta.index, delta.function.name, bool(delta.id)) for delta in deltas] == [
        (0, "weather", True),
        (0, None, False),
        (1, "now", True),
        (1, None, False),
    ]
    assert [delta.function.arguments for delta in deltas] == ["", '{"city": "Rome"}', "", "{}"]
    assert chunks[-1].finish_reason == "tool_calls"
    with client.chat.completions.stream(**ASKED) as stream:
        assert len(functions(stream.get_final_completion().choices[0].message)) == 2


def test_one_call_ends_the_answer_if_so_asked(client, model_says):
    model_says(CALLS)
    answer = client.chat.completions.create(**ASKED, parallel_tool_calls=False)
    assert functions(answer.choices[0].message) == [("weather", {"city": "Rome"})]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.usage.completion_tokens < len(CALLS)
    last = list(client.chat.completions.create(**ASKED, parallel_tool_calls=False, stream=True))[-1]
    assert last.choices[0].finish_reason == "tool_calls"


def test_each_answer_has_its_own_calls(client, model_says):
    model_says(CALLS)
    choices = client.chat.completions.create(**ASKED, n=2).choices
    assert [functions(choice.message) for choice in choices] == 2 * [[("weather", {"city": "Rome"}), ("now", {})]]
    assert len({call.id for choice in choices for call in choice.message.tool_calls}) == 4


def test_text_streams_as_text(client, model_says):
    model_says("It is 3 < 4, <b>")
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ASKED, stream=True, tool_choice="auto")]
    told = [chunk.delta.content for chunk in chunks if chunk.delta.content]
    assert "".join(told) == "It is 3 < 4, <b>"
    assert len(told) > 8
    assert chunks[-1].finish_reason == "stop"


def test_a_cut_call_is_text(client, model_says):
    model_says(CALLS)
    choice = client.chat.completions.create(**ASKED, max_tokens=60).choices[0]
    assert choice.message.tool_calls is None
    assert choice.message.content.startswith("Let me see.\n<tool_call>")


def test_no_call_is_read_where_none_is_wanted(client, model_says):
    model_says(CALLS)
    message = client.chat.completions.create(**ASKED, tool_choice="none").choices[0].message
    assert message.tool_calls is None
    assert message.content == CALLS.removeprefix("<think>Hm</think>")


@pytest.mark.parametrize("temperature", [0, 2])
def test_any_of_several_tools_is_forced(client, temperature):
    asked = {**ASKED, "tool_choice": "required", "temperature": temperature, "seed": 3}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    [(name, arguments)] = functions(choice.message)
    assert (name, set(arguments)) in (("weather", {"city"}), ("now", set()))
    with client.chat.completions.stream(**asked) as stream:
        assert functions(stream.get_final_completion().choices[0].message) == [(name, arguments)]


def test_several_calls_are_forced_if_so_asked(client):
    asked = {**ASKED, "tool_choice": "required", "parallel_tool_calls": True}
    for tools in ([WEATHER, NOW], [WEATHER]):
        choice = client.chat.completions.create(**{**asked, "tools": tools}, max_tokens=300).choices[0]
        if choice.finish_reason == "tool_calls":  # a small model need not find the end of a list
            assert {name for name, _ in functions(choice.message)} <= {"weather", "now"}
        else:
            assert choice.message.content.startswith("[")


def test_a_named_tool_is_forced(client):
    choice = {"type": "function", "function": {"name": "now"}}
    message = client.chat.completions.create(**ASKED, tool_choice=choice).choices[0].message
    assert functions(message) == [("now", {})]
    with pytest.raises(openai.BadRequestError, match="not among the tools"):
        client.chat.completions.create(**ASKED, tool_choice={"type": "function", "function": {"name": "else"}})


def test_results_are_sent_back(server, client, model_says):
    model_says(CALLS)
    message = client.chat.completions.create(**ASKED).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "22"} for call in message.tool_calls]
    body = {"messages": [USER, message.model_dump(), *results], "tools": [WEATHER, NOW]}
    prompt = HTTP.post(f"{server.url}/apply-template", json=body).json()["prompt"]
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>' in prompt
    assert prompt.count("<|im_start|>tool\n22<|im_end|>") == 2
    model_says("It is 22.")
    again = client.chat.completions.create(**{**ASKED, "messages": body["messages"]})
    assert again.choices[0].message.content == "It is 22."
