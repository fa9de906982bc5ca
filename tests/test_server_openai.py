"""OpenAI's own client against a server with a key, doing what programs that use it do."""

from __future__ import annotations

import asyncio
import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict
from served import KEY, serving

from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.server.app import Settings

# Shows tools, calls and their results.
TEMPLATE = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments | tojson }}){% endfor %}{{ '\n' }}"
    "{% endfor %}[assistant] "
)


class Weather(BaseModel):
    """What is asked for."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Rome", "Joppa"]
    hot: bool


TOOL = {"type": "function", "function": {"name": "now", "strict": True}}
TOOLS = [TOOL, openai.pydantic_function_tool(Weather, name="weather")]
WEATHER = {"type": "function", "function": {"name": "weather"}}
ASKED = {"model": "tiny", "temperature": 0, "max_tokens": 40}


@pytest.fixture(scope="module")
def server():
    settings = Settings(keys=["another", KEY], is_local=False, strict=True)
    with serving({"tiny": TINY_MODEL}, ctx=2048, cache=2**26, settings=settings, chat_template=TEMPLATE) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def test_a_conversation_that_sends_back_what_it_got(client):
    messages: list = [{"role": "developer", "content": "Be brief"}, {"role": "user", "name": "anna", "content": "Say"}]
    for question in ("And then?", "And then?"):
        answer = client.chat.completions.create(**ASKED, messages=messages).choices[0]
        assert answer.finish_reason == "length"
        messages += [answer.message.model_dump(), {"role": "user", "content": question}]
    last = client.chat.completions.create(**ASKED, messages=messages)
    assert last.usage.prompt_tokens > 2 * 40
    assert last.usage.prompt_tokens_details.cached_tokens > 40
    assert last.usage.completion_tokens == 40


def test_a_stream_is_the_whole_answer(client):
    messages = [{"role": "user", "content": "Say"}]
    whole = client.chat.completions.create(**ASKED, messages=messages)
    chunks = list(
        client.chat.completions.create(
            **ASKED, messages=messages, stream=True, stream_options={"include_usage": True}, logprobs=True
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_stream_helper_puts_a_call_together(client):
    messages = [{"role": "user", "content": "Say"}]
    arguments = {"messages": messages, "tools": TOOLS, "tool_choice": WEATHER, "model": "tiny", "temperature": 0}
    with client.chat.completions.stream(**arguments) as stream:
        kinds = {event.type for event in stream}
        call = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert "tool_calls.function.arguments.done" in kinds
    assert call.function.name == "weather"
    assert isinstance(call.function.parsed_arguments, Weather)
    assert call.id.startswith("call_")
    whole = client.chat.completions.create(**arguments).choices[0]
    assert whole.message.tool_calls[0].function.arguments == call.function.arguments
    assert whole.finish_reason == "tool_calls"


def test_the_result_of_a_call_is_sent_back(client):
    messages: list = [{"role": "user", "content": "Say"}]
    arguments = {"model": "tiny", "temperature": 0, "tools": TOOLS}
    answer = client.chat.completions.create(**arguments, messages=messages, tool_choice=WEATHER).choices[0].message
    before = client.chat.completions.create(**arguments, messages=messages, max_tokens=1).usage.prompt_tokens
    call = answer.tool_calls[0]
    messages += [answer, {"role": "tool", "tool_call_id": call.id, "content": "22"}]
    again = client.chat.completions.create(**arguments, messages=messages, max_tokens=5)
    said = f"(weather {json.dumps(json.loads(call.function.arguments))})\n"
    assert again.usage.prompt_tokens == before + len(said) + len("[tool] 22\n[assistant] ")
    assert again.choices[0].finish_reason in ("length", "stop")


def test_an_answer_of_a_form_is_parsed(client):
    messages = [{"role": "user", "content": "Say"}]
    answer = client.chat.completions.parse(model="tiny", messages=messages, response_format=Weather, temperature=0)
    assert answer.choices[0].message.parsed.city in ("Rome", "Joppa")


def test_an_answer_that_was_begun(client):
    begun = {"role": "assistant", "content": "And Paul"}
    messages = [{"role": "user", "content": "Say"}]
    answer = client.chat.completions.create(**ASKED, messages=[*messages, begun])
    prompt = "[user] Say\n[assistant] And Paul"
    assert answer.usage.prompt_tokens == len(prompt)
    same = client.completions.create(**ASKED, prompt=prompt)
    assert answer.choices[0].message.content == same.choices[0].text


def test_completions(client):
    answer = client.completions.create(**ASKED, prompt=[[65, 110, 100], [65, 110, 100]], n=2, logprobs=1, echo=False)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 1  # greedy, and all prompts are the same
    assert answer.choices[3].logprobs.tokens == answer.choices[0].logprobs.tokens


def test_many_at_once(server):
    async def ask(client: openai.AsyncOpenAI, text: str) -> str:
        answer = await client.chat.completions.create(**ASKED, messages=[{"role": "user", "content": text}])
        return answer.choices[0].message.content

    async def ask_all(texts: list[str]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, text) for text in texts))

    texts = ["Say", "Go", "Come", "Say", "Go", "Come"]
    at_once = asyncio.run(ask_all(texts))
    assert at_once[:3] == at_once[3:]
    assert at_once[:3] == [asyncio.run(ask_all([text]))[0] for text in texts[:3]]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").created > 0
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-4")


def test_what_is_refused_is_the_clients_error(server, client):
    messages = [{"role": "user", "content": "Say"}]
    with pytest.raises(openai.AuthenticationError) as caught:
        server.client("wrong").chat.completions.create(**ASKED, messages=messages)
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASKED, messages=[{"role": "user", "content": "a" * 3000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model="tiny", input="a")
    with pytest.raises(openai.BadRequestError, match="text only"):
        image = {"type": "image_url", "image_url": {"url": "data:,"}}
        client.chat.completions.create(**ASKED, messages=[{"role": "user", "content": [image]}])
