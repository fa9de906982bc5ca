"""/v1/messages through Anthropic's client."""

from __future__ import annotations

import anthropic
import pytest
from served import HTTP, KEY, serving
from test_server_tools import CALLS, PARAMETERS
from test_tool_calls import HERMES

from selfextend_gguf.errors import StateError
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.server.app import Settings
from selfextend_gguf.server.models import ServedLlama
from selfextend_gguf.server.turns import Turns

WEATHER = {"name": "weather", "description": "Tells", "input_schema": PARAMETERS}
NOW = {"name": "now", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}
USER = {"role": "user", "content": "Say"}
# The newest client has no argument for the temperature any more.
ASKED = {"model": "tiny", "max_tokens": 300, "messages": [USER], "extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def server():
    settings = Settings(keys=[KEY], strict=True)
    with serving({"tiny": TINY_MODEL}, ctx=2048, settings=settings, chat_template=HERMES) as server:
        yield server


def client_of(server, key: str = KEY) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def calls_of(message) -> list[tuple[str, dict]]:
    return [(block.name, block.input) for block in message.content if block.type == "tool_use"]


def test_it_says_what_a_chat_says(client, server):
    messages = [{"role": "system", "content": "Be brief"}, USER]
    chat = server.client().chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=12)
    message = client.messages.create(**{**ASKED, "max_tokens": 12}, system=[{"type": "text", "text": "Be brief"}])
    assert [block.text for block in message.content] == [chat.choices[0].message.content]
    assert (message.stop_reason, message.role, message.model) == ("max_tokens", "assistant", "tiny")
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == chat.usage.prompt_tokens
    assert usage.cache_read_input_tokens > 0
    assert usage.output_tokens == 12
    counted = client.messages.count_tokens(model="tiny", messages=[USER], system="Be brief")
    assert counted.input_tokens == chat.usage.prompt_tokens


def test_blocks_of_an_answer_and_their_events(client, model_says):
    model_says(CALLS)
    whole = client.messages.create(**ASKED, tools=[WEATHER, NOW])
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert (whole.content[0].thinking, whole.content[1].text) == ("Hm", "Let me see.")
    assert calls_of(whole) == [("weather", {"city": "Rome"}), ("now", {})]
    assert whole.stop_reason == "tool_use"
    raw = list(client.messages.create(**ASKED, tools=[WEATHER, NOW], stream=True))
    kinds = [event.type for event in raw]
    assert [kind for n, kind in enumerate(kinds) if n == 0 or kinds[n - 1] != kind] == [
        "message_start",
        *4 * ["content_block_start", "content_block_delta", "content_block_stop"],
        "message_delta",
        "message_stop",
    ]
    with client.messages.stream(**ASKED, tools=[WEATHER, NOW]) as stream:
        assert "".join(stream.text_stream) == "Let me see."
        final = stream.get_final_message()
    assert [block.model_dump() for block in final.content] == [
        {**block.model_dump(), **({"id": other.id} if block.type == "tool_use" else {})}
        for block, other in zip(whole.content, final.content, strict=True)
    ]
    assert (final.stop_reason, final.usage.output_tokens) == ("tool_use", whole.usage.output_tokens)
    one = client.messages.create(
        **ASKED, tools=[WEATHER, NOW], tool_choice={"type": "auto", "disable_parallel_tool_use": True}
    )
    assert len(calls_of(one)) == 1


def test_a_forced_call_and_its_result(client, server):
    asked = {**ASKED, "tools": [WEATHER, NOW]}
    first = client.messages.create(**asked, tool_choice={"type": "any"})
    [(name, _)] = calls_of(first)
    assert name in ("weather", "now")
    [named] = calls_of(client.messages.create(**asked, tool_choice={"type": "tool", "name": "weather"}))
    assert (named[0], set(named[1])) == ("weather", {"city"})
    with client.messages.stream(**asked, tool_choice={"type": "any"}) as stream:
        assert calls_of(stream.get_final_message()) == calls_of(first)
    result = {"type": "tool_result", "tool_use_id": first.content[0].id, "content": [{"type": "text", "text": "22"}]}
    sent = [USER, {"role": "assistant", "content": first.content}]
    sent.append({"role": "user", "content": [result, {"type": "text", "text": "And?"}]})
    counted = client.messages.count_tokens(model="tiny", messages=sent).input_tokens
    body = {
        "messages": [
            USER,
            {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": first.content[0].input}}]},
            {"role": "tool", "content": "22"},
            {"role": "user", "content": "And?"},
        ]
    }
    headers = {"X-Api-Key": KEY}
    prompt = HTTP.post(f"{server.url}/apply-template", json=body, headers=headers).json()["prompt"]
    assert "<tool_call>" in prompt
    assert counted == len(prompt)


def test_a_begun_answer_and_an_old_thought(client, model_says):
    begun = client.messages.count_tokens(model="tiny", messages=[USER, {"role": "assistant", "content": "And"}])
    assert begun.input_tokens == len("<|im_start|>user\nSay<|im_end|>\n<|im_start|>assistant\nAnd")
    model_says("<think>Hm</think>Yes")
    message = client.messages.create(**ASKED, thinking={"type": "disabled"})
    assert [block.type for block in message.content] == ["thinking", "text"]  # this template cannot switch it off
    sent = [USER, {"role": "assistant", "content": message.content}, USER]
    client.messages.create(**{**ASKED, "messages": sent}, stop_sequences=["s"], metadata={"user_id": "me"})


def test_a_call_that_is_cut(client):
    message = client.messages.create(
        **{**ASKED, "max_tokens": 3}, tools=[WEATHER], tool_choice={"type": "tool", "name": "weather"}
    )
    assert message.stop_reason == "max_tokens"
    [(_, given)] = calls_of(message)
    assert set(given) == {"INVALID_JSON"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"messages": "Say"}, "messages: Input should be a valid list"),
        ({"messages": [5]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "text only, not 'image'"),
        ({"messages": [{"role": "user", "content": [5]}]}, r"messages\[0\].content\[0\] must be an object"),
        ({"messages": [{"role": "user"}]}, "has no content"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305' are not supported"),
        ({"tools": [5]}, r"tools\[0\] must be an object"),
        ({"tools": [{"name": ""}]}, "at least 1 character"),
        ({"tool_choice": "any"}, "tool_choice must be an object"),
        ({"tool_choice": {"type": "all"}}, "tool_choice.type must be"),
        ({"tool_choice": {"type": "any"}}, "without tools"),
        ({"mcp_servers": [{}]}, "mcp_servers is not supported"),
        ({"system": [{"type": "image"}]}, "text only"),
        ({"n": 2}, "n is not supported: there is one answer"),
        ({"frobnicate": 1}, "frobnicate: unknown parameter"),
        ({"messages": [{"role": "user", "content": "a" * 3000}]}, "maximum context length"),
    ],
)
def test_what_is_refused(client, more, message):
    with pytest.raises(anthropic.BadRequestError, match=message) as caught:
        client.messages.create(**{**ASKED, "extra_body": more})
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert "\n" not in caught.value.body["error"]["message"]


def test_errors_of_the_api(server, client, monkeypatch):
    with pytest.raises(anthropic.AuthenticationError):
        client_of(server, "wrong").messages.create(**ASKED)
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        client.messages.create(**{**ASKED, "model": "other"})
    bearer = anthropic.Anthropic(base_url=server.url, auth_token=KEY, max_retries=0)
    assert bearer.messages.create(**{**ASKED, "max_tokens": 1}).content

    def generate(self, *args, **kwargs):
        raise StateError("no token")
        yield

    monkeypatch.setattr(ServedLlama, "generate", generate)
    with pytest.raises(anthropic.APIStatusError, match="no token"):
        list(client.messages.create(**ASKED, stream=True))


def test_a_full_queue_is_told_before_a_stream_begins(server, client, monkeypatch):
    monkeypatch.setattr(server.models, "turns", Turns(most=0))
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.create(**ASKED, stream=True)
    assert (caught.value.status_code, caught.value.body["error"]["type"]) == (503, "overloaded_error")
    assert caught.value.response.headers["Retry-After"] == "10"
