"""/v1/responses through OpenAI's client."""

from __future__ import annotations

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel
from served import HTTP, KEY, serving
from test_server_tools import CALLS, PARAMETERS
from test_tool_calls import HERMES

from selfextend_gguf.errors import StateError
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.server.app import Settings
from selfextend_gguf.server.models import ServedLlama

WEATHER = {"type": "function", "name": "weather", "description": "Tells", "parameters": PARAMETERS, "strict": True}
NOW = {"type": "function", "name": "now"}
ASKED = {"model": "tiny", "input": "Say", "temperature": 0, "max_output_tokens": 300}


@pytest.fixture(scope="module")
def server():
    with serving({"tiny": TINY_MODEL}, ctx=2048, settings=Settings(keys=[KEY]), chat_template=HERMES) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def calls_of(response) -> list[tuple[str, dict]]:
    return [(item.name, json.loads(item.arguments)) for item in response.output if item.type == "function_call"]


def test_it_says_what_a_chat_says(client):
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Say"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=12)
    response = client.responses.create(**{**ASKED, "max_output_tokens": 12}, instructions="Be brief")
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert (response.usage.output_tokens, response.usage.total_tokens) == (12, chat.usage.total_tokens)
    again = client.responses.create(**{**ASKED, "input": messages, "max_output_tokens": 12})
    assert again.output_text == response.output_text
    assert again.usage.input_tokens_details.cached_tokens > 0


def test_blocks_of_an_answer_and_their_events(client, model_says):
    model_says(CALLS)
    whole = client.responses.create(**ASKED, tools=[WEATHER, NOW])
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]
    assert (whole.status, whole.output_text) == ("completed", "Let me see.")
    assert whole.output[0].content[0].text == "Hm"
    assert calls_of(whole) == [("weather", {"city": "Rome"}), ("now", {})]
    assert 0 < whole.usage.output_tokens_details.reasoning_tokens < whole.usage.output_tokens
    with client.responses.stream(**{name: ASKED[name] for name in ASKED}, tools=[WEATHER, NOW]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert [kind for n, kind in enumerate(kinds) if n == 0 or kinds[n - 1] != kind] == [
        "response.created",
        "response.in_progress",
        *(f"response.{name}" for name in ("output_item.added", "content_part.added", "reasoning_text.delta")),
        *(f"response.{name}" for name in ("reasoning_text.done", "content_part.done", "output_item.done")),
        *(f"response.{name}" for name in ("output_item.added", "content_part.added", "output_text.delta")),
        *(f"response.{name}" for name in ("output_text.done", "content_part.done", "output_item.done")),
        *2
        * [
            f"response.{name}"
            for name in (
                "output_item.added",
                "function_call_arguments.delta",
                "function_call_arguments.done",
                "output_item.done",
            )
        ],
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (final.output_text, calls_of(final)) == (whole.output_text, calls_of(whole))
    assert final.usage == whole.usage


def test_a_forced_call_and_its_result(client, server):
    asked = {**ASKED, "tools": [WEATHER, NOW], "tool_choice": "required"}
    first = client.responses.create(**asked)
    [(name, _)] = calls_of(first)
    assert name in ("weather", "now")
    [named] = calls_of(client.responses.create(**{**asked, "tool_choice": {"type": "function", "name": "weather"}}))
    assert (named[0], set(named[1])) == ("weather", {"city"})
    with client.responses.stream(**asked) as stream:
        assert calls_of(stream.get_final_response()) == calls_of(first)
    call = first.output[0]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "22 degrees"}
    sent = [{"role": "user", "content": "Say"}, call.model_dump(exclude_none=True), result]
    again = client.responses.create(**{**ASKED, "input": sent, "tools": [WEATHER, NOW], "max_output_tokens": 4})
    messages = [
        {"role": "user", "content": "Say"},
        {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": call.arguments}}]},
        {"role": "tool", "content": "22 degrees"},
    ]
    tools = [{"type": "function", "function": tool} for tool in (WEATHER, NOW)]
    body = {"messages": messages, "tools": tools, "max_tokens": 4, "temperature": 0}
    headers = {"Authorization": f"Bearer {KEY}"}
    chat = HTTP.post(f"{server.url}/v1/chat/completions", json=body, headers=headers).json()
    assert again.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert again.output_text == chat["choices"][0]["message"]["content"]


def test_a_conversation_of_what_it_gave(client, model_says):
    model_says("<think>Hm</think>Yes")
    given = client.responses.create(**ASKED).output
    again = [{"role": "user", "content": "Say"}, *(item.model_dump(exclude_none=True) for item in given)]
    more = {"role": "user", "content": [{"type": "input_text", "text": "And?"}]}
    response = client.responses.create(**{**ASKED, "input": [*again, more]})
    prompt = "<|im_start|>user\nSay<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
    assert response.usage.input_tokens == len(prompt + "<|im_start|>assistant\n")


class Place(BaseModel):
    """What is asked for."""

    name: Literal["Rome", "Joppa"]


def test_an_answer_of_a_form(client):
    schema = {"type": "json_schema", "name": "place", "schema": PARAMETERS}
    assert json.loads(client.responses.create(**ASKED, text={"format": schema}).output_text)["city"]
    assert isinstance(client.responses.parse(**ASKED, text_format=Place).output_parsed, Place)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported: nothing is kept"),
        ({"n": 2}, "n is not supported: there is one answer"),
        ({"background": True}, "background is not supported"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "items of type 'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]}, "text only"),
        ({"input": 5}, "input must be a list"),
        ({"input": [5]}, r"input\[0\] must be an object"),
        ({"input": []}, "at least 1 item"),
        ({"tools": [{"type": "web_search"}]}, "only functions can be called, not 'web_search'"),
        ({"tools": {}}, "tools must be a list"),
        ({"text": "json"}, "text must be an object"),
        ({"tool_choice": {"type": "function"}}, "must be an object with a name"),
        ({"tools": [{**WEATHER, "name": 5}]}, "valid string"),
        ({"input": "a" * 3000}, "maximum context length"),
    ],
)
def test_what_is_refused(client, more, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.responses.create(model="tiny", input="Say", extra_body=more)
    assert "\n" not in caught.value.body["message"]


def test_errors_of_the_api(server, client, monkeypatch):
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").responses.create(**ASKED)

    def generate(self, *args, **kwargs):
        raise StateError("no token")
        yield

    monkeypatch.setattr(ServedLlama, "generate", generate)
    with pytest.raises(openai.APIError, match="no token"):
        list(client.responses.create(**ASKED, stream=True))
