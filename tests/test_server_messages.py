"""Messages and tools as real clients send them: what the model's template makes of them."""

from __future__ import annotations

import json

import pytest
from openai.types.chat import ChatCompletionMessage
from pydantic import ValidationError
from served import ARGUMENTS

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.server.jobs import chat_job, chat_text, tool_to_call
from selfextend_gguf.server.models import ServedModel
from selfextend_gguf.server.requests import ChatRequest

# As Hermes and Qwen have it: arguments are objects.
TEMPLATE = (
    "{% for t in tools or [] %}<{{ t.function.name }} {{ t.function.parameters | tojson }}>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}{{ ' ' + m.name if m.name }}] {{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments | tojson }}){% endfor %}{{ '\n' }}"
    "{% endfor %}[assistant] "
)
# As DeepSeek's: arguments are texts.
TEXT_TEMPLATE = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}"
    "{% endfor %}"
)
THINKING_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if reasoning_effort %}({{ reasoning_effort }}){% endif %}"
    "[assistant] {% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
)
USER = {"role": "user", "content": "Say"}
WEATHER = {"type": "function", "function": {"name": "weather"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}


@pytest.fixture(scope="module")
def served():
    """The bundled model with a template."""

    def make(template: str = TEMPLATE) -> ServedModel:
        return ServedModel.from_file(TINY_MODEL, "tiny", 512, ARGUMENTS, None, chat_template=template)

    return make


def text(model: ServedModel, messages: list, **more: object) -> str:
    return chat_text(ChatRequest(messages=messages, **more), model)


def test_developers_are_the_system(served):
    messages = [{"role": "developer", "content": "Be brief"}, USER]
    assert text(served(), messages) == "[system] Be brief\n[user] Say\n[assistant] "


def test_an_answer_that_is_sent_back_as_the_client_dumps_it(served):
    answer = ChatCompletionMessage.model_validate({"role": "assistant", "content": "Yes", "reasoning_content": "Hm"})
    dumped = answer.model_dump()
    assert dumped["refusal"] is None  # beside other nulls
    assert (
        text(served(), [USER, {**dumped, "unknown": 1}, USER])
        == "[user] Say\n[assistant] Yes\n[user] Say\n[assistant] "
    )


def test_calls_and_their_results(served):
    for call in ({"tool_calls": [CALL]}, {"tool_calls": [CALL], "content": None}):
        messages = [USER, {"role": "assistant", **call}, {"role": "tool", "content": "22", "tool_call_id": "call_1"}]
        wanted = '[user] Say\n[assistant] (weather {"city": "Rome"})\n[tool] 22\n[assistant] '
        assert text(served(), messages) == wanted
    assert text(served(TEXT_TEMPLATE), messages) == 'weather{"city": "Rome"}'


def test_templates_that_want_identifiers_of_nine_letters(served):
    """Mistral's. A call and its result keep theirs in common."""
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [m] if c.id or c.tool_call_id %}"
        "{% set id = c.id or c.tool_call_id %}{% if id | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}"
        "{{ id }},{% endfor %}{% endfor %}"
    )
    messages = [USER, {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "call_2"}]}]
    messages += [{"role": "tool", "content": "22", "tool_call_id": name} for name in ("call_1", "call_2")]
    first, second, *results, rest = text(served(template), messages).split(",")
    assert (results, rest) == ([first, second], "")
    assert first.isalnum()
    assert first != second
    kept = [{**message, "tool_call_id": "abcdefghi"} for message in messages[2:3]]
    assert text(served(template), kept) == "abcdefghi,"


def test_arguments_that_are_no_json_stay_texts(served):
    call = {**CALL, "function": {"name": "weather", "arguments": "Rome"}}
    assert '(weather "Rome")' in text(served(), [USER, {"role": "assistant", "tool_calls": [call]}, USER])


def test_names_and_parts(served):
    parts = [{"type": "text", "text": "Sa"}, {"type": "text", "text": "y"}]
    assert text(served(), [{"role": "user", "name": "Anna", "content": parts}]) == "[user Anna] Say\n[assistant] "


def test_tools_without_parameters_and_with_strict(served):
    nothing = '{"type": "object", "properties": {}, "additionalProperties": false}'
    for function in ({"name": "now"}, {"name": "now", "parameters": {}, "strict": True}):
        tools = [{"type": "function", "function": function}]
        assert text(served(), [USER], tools=tools).startswith(f"<now {nothing}>[user]")
        job = chat_job(ChatRequest(messages=[USER], tools=tools, tool_choice="required"), served())
        assert job.schema == json.loads(nothing)


def test_no_tool_is_to_be_called(served):
    model = served(THINKING_TEMPLATE)  # which speaks of no tools
    with pytest.raises(ConfigError, match="tells the model nothing of tools"):
        text(model, [USER], tools=[WEATHER])
    assert "[user] Say" in text(model, [USER], tools=[WEATHER], tool_choice="none")
    assert text(served(), [USER], tools=[WEATHER], tool_choice="none").startswith("[user]")


def test_older_names_of_tools():
    body = ChatRequest(messages=[USER], functions=[{"name": "weather"}], function_call={"name": "weather"})
    assert tool_to_call(body) == "weather"
    assert [tool.function.name for tool in body.tools] == ["weather"]


def test_an_answer_that_was_begun_is_continued(served):
    begun = {"role": "assistant", "content": "It is"}
    assert text(served(), [USER, begun]) == "[user] Say\n[assistant] It is"
    assert text(served(), [USER, {**begun, "tool_calls": [CALL]}]).endswith("\n[assistant] ")
    # What was begun is no thought, and control tokens in it are texts.
    assert text(served(THINKING_TEMPLATE), [USER, begun]) == "[user] Say\n[assistant] <think>\n\n</think>\n\nIt is"
    job = chat_job(ChatRequest(messages=[USER, begun]), served(THINKING_TEMPLATE))
    assert job.prompts[0].thought_end is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [{"role": "user"}]}, "a message of the role 'user' has no content"),
        ({"messages": [{"role": "user", "content": None}]}, "a message of the role 'user' has no content"),
        ({"messages": [{"role": "clown", "content": "a"}]}, "Input should be 'system'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tool_calls.0.function"),
        ({"messages": [USER], "tools": [{"type": "web_search"}]}, "Input should be 'function'"),
        ({"messages": [USER], "tools": [{"function": {"name": ""}}]}, "at least 1 character"),
    ],
)
def test_what_is_no_message(body, message):
    with pytest.raises(ValidationError) as caught:
        ChatRequest(**body)
    assert message in str(caught.value)
