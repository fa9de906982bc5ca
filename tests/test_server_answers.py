"""What answers of the server hold, and what is left out or refused of a request."""

from __future__ import annotations

import json
import logging

import numpy as np
import openai
import pytest
from served import HTTP, Serving, serving

from selfextend_gguf import Llama
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.server import answering
from selfextend_gguf.server.app import Settings

# Shows tools, effort and, if told to, begins a thought.
TEMPLATE = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if reasoning_effort %}({{ reasoning_effort }}){% endif %}"
    "[assistant] {% if thoughtful %}<think>\n{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Say"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Joppa"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def server():
    with serving({"tiny": TINY_MODEL}, ctx=4096, cache=2**28, chat_template=TEMPLATE) as server:
        yield server


@pytest.fixture(scope="module")
def strict_server():
    settings = Settings(strict=True, keys=["one", "other"], reasoning_format="none")
    with serving({"tiny": TINY_MODEL}, ctx=512, settings=settings, chat_template=TEMPLATE) as server:
        yield server


def complete(server: Serving, prompt: object, **more: object) -> dict:
    response = HTTP.post(f"{server.url}/v1/completions", json={"prompt": prompt, "temperature": 0, **more})
    assert response.status_code == 200, response.text
    return response.json()


def chat(server: Serving, **more: object) -> dict:
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 8, **more}
    response = HTTP.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(server: Serving, path: str, **body: object) -> list[str]:
    """The events of a stream, without the last, which says that it is done."""
    with HTTP.stream("POST", f"{server.url}/v1/{path}", json={"temperature": 0, "stream": True, **body}) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        *events, last, rest = response.read().decode().split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return events


def data_of(events: list[str]) -> list[dict]:
    return [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: ")]


# ---- fields --------------------------------------------------------------------------------------------------


def test_unknown_fields_are_left_out_with_one_line_in_the_log(server, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            chat(server, frobnicate=1, typical_p=0.9, cache_prompt=True, mystery=None)
    assert [record.message for record in caplog.records] == ["Ignored what is not known in requests: frobnicate"]


def test_a_strict_server_refuses_them(strict_server):
    client = strict_server.client("other")
    with pytest.raises(openai.BadRequestError, match="frobnicate: unknown parameter"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"frobnicate": 1})
    client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1, user="me", store=False)


@pytest.mark.parametrize(
    "field", [{"guided_json": {}}, {"guided_json": {"type": "object"}}, {"samplers": ["top_k"]}, {"suffix": "x"}]
)
def test_what_would_be_missed_is_refused(server, field):
    body = {"prompt": "a", "max_tokens": 1, **field}
    response = HTTP.post(f"{server.url}/v1/completions", json=body)
    if field == {"guided_json": {}}:  # asks for nothing
        assert response.status_code == 200
    else:
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith(f"{next(iter(field))} is not supported: ")


def test_samplers_of_llama_cpp_have_an_effect(server):
    arguments = {"seed": 1, "temperature": 2.0, "max_tokens": 20}
    plain = complete(server, "And", **arguments)
    for more in ({"xtc_probability": 1.0, "xtc_threshold": 0.05}, {"top_n_sigma": 0.1}, {"dynatemp_range": 2.0}):
        assert complete(server, "And", **arguments, **more)["choices"][0]["text"] != plain["choices"][0]["text"]
    again = complete(server, "And", **arguments)
    assert again["choices"] == plain["choices"]  # the next request has none of it


def test_an_answer_of_at_least_so_many_tokens(server):
    grammarless = {"max_tokens": 30, "logit_bias": {"0": 100}}  # token 0 ends an answer
    assert complete(server, "And", **grammarless)["usage"]["completion_tokens"] == 0
    assert complete(server, "And", **grammarless, min_tokens=7)["usage"]["completion_tokens"] == 7
    assert complete(server, "And", **grammarless, ignore_eos=True)["usage"]["completion_tokens"] == 30


def test_an_answer_to_the_end_of_the_context(strict_server):
    client = strict_server.client("one")
    arguments = {"model": "tiny", "prompt": "a" * 490, "extra_body": {"ignore_eos": True}}
    usage = client.completions.create(**arguments, max_tokens=-1).usage
    assert usage.total_tokens == 512


# ---- beside the text -----------------------------------------------------------------------------------------


def test_cached_tokens_and_timings(server, heldout_text):
    prompt = heldout_text[:700]
    first, second = (complete(server, prompt, max_tokens=3) for _ in range(2))
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached < 700
    timings = second["timings"]
    assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (cached, 700 - cached, 3)
    assert timings["prompt_ms"] > 0
    assert timings["predicted_per_second"] > 0
    complete(server, heldout_text[8000:8600], max_tokens=3)  # a copy of the first text is kept
    assert complete(server, prompt, max_tokens=3)["usage"]["prompt_tokens_details"]["cached_tokens"] > 300
    complete(server, prompt, max_tokens=3)
    chunks = data_of(stream(server, "completions", prompt=prompt, max_tokens=3, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == second["usage"]
    assert chunks[-2]["timings"].keys() == timings.keys()


def test_progress_is_told_if_asked_for(server, heldout_text, monkeypatch):
    monkeypatch.setattr(answering, "_REPORT_EVERY", 0.0)
    prompt = heldout_text[2000:4000]
    chunks = data_of(stream(server, "completions", prompt=prompt, max_tokens=2, return_progress=True))
    reports = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert len(reports) > 5
    assert {(report["total"], report["cache"]) for report in reports[1:]} == {(2000, 0)}
    processed = [report["processed"] for report in reports]
    assert processed == sorted(processed)
    assert processed[-1] == 2000
    assert "prompt_progress" not in str(stream(server, "completions", prompt=prompt, max_tokens=2))


def test_a_stream_is_alive_while_its_prompt_is_read(server, heldout_text, monkeypatch):
    monkeypatch.setattr(answering, "KEEP_ALIVE", 0.05)
    events = stream(server, "completions", prompt=heldout_text[4000:7000], max_tokens=2)
    comments = [event for event in events if event.startswith(":")]
    assert len(comments) > 1
    assert events[: len(comments)] == comments
    assert len(data_of(events)) == len(events) - len(comments)


# ---- several answers, several prompts, probabilities ------------------------------------------------------------


def test_several_answers_read_the_prompt_once(server, heldout_text):
    prompt = heldout_text[100:800]
    arguments = {"max_tokens": 12, "temperature": 1.5, "seed": 5}
    answer = complete(server, prompt, n=3, **arguments)
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert texts == [complete(server, prompt, **arguments | {"seed": 5 + i})["choices"][0]["text"] for i in range(3)]
    assert len(set(texts)) == 3
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (700, 36)
    assert answer["timings"]["prompt_n"] == 1
    pieces = ["", "", ""]
    for chunk in data_of(stream(server, "completions", prompt=prompt, n=3, **arguments)):
        pieces[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert pieces == texts


def test_several_prompts_as_texts_and_as_tokens(server):
    prompts = ["And Paul said", "In the beginning"]
    alone = [complete(server, prompt, max_tokens=8)["choices"][0] for prompt in prompts]
    together = complete(server, prompts, max_tokens=8, echo=True)["choices"]
    assert [choice["text"] for choice in together] == [p + c["text"] for p, c in zip(prompts, alone, strict=True)]
    as_tokens = complete(server, [list(prompt.encode()) for prompt in prompts], max_tokens=8)["choices"]
    assert [choice["text"] for choice in as_tokens] == [choice["text"] for choice in alone]
    assert complete(server, list(prompts[0].encode()), max_tokens=8)["choices"] == alone[:1]


@pytest.mark.parametrize("times", [1, 6])  # the trained context
def test_probabilities_of_a_prompt_are_those_of_the_model(server, times):
    text = ("And Paul said unto the chief captain, May I speak unto thee? " * 50)[: 256 * times - 20]
    llm = Llama(str(TINY_MODEL), n_ctx=4096, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
    asked = {"max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 3}
    wanted = llm(text, **asked)["choices"][0]
    llm.close()
    complete(server, text, max_tokens=1)  # so that the text is known
    (got,) = complete(server, text, **asked)["choices"]
    assert (got["text"], got["logprobs"]["tokens"]) == (wanted["text"], wanted["logprobs"]["tokens"])
    assert got["logprobs"]["text_offset"] == list(range(len(got["text"])))
    assert got["logprobs"]["token_logprobs"][0] is got["logprobs"]["top_logprobs"][0] is None
    assert got["logprobs"]["token_logprobs"][1:-4] == wanted["logprobs"]["token_logprobs"][1:-4]  # bit for bit
    assert got["logprobs"]["top_logprobs"][1:-4] == wanted["logprobs"]["top_logprobs"][1:-4]
    np.testing.assert_allclose(
        got["logprobs"]["token_logprobs"][-4:], wanted["logprobs"]["token_logprobs"][-4:], atol=1e-3
    )


def test_echo_without_an_answer(server):
    (whole,) = complete(server, "And Paul said", max_tokens=1, echo=True, logprobs=0)["choices"]
    answer = complete(server, ["And Paul said", "And"], max_tokens=0, echo=True, logprobs=0)
    first, second = answer["choices"]
    assert (first["text"], second["text"], first["finish_reason"]) == ("And Paul said", "And", "length")
    assert first["logprobs"]["token_logprobs"] == whole["logprobs"]["token_logprobs"][:-1]
    assert second["logprobs"]["token_logprobs"] == first["logprobs"]["token_logprobs"][:3]
    assert answer["usage"]["completion_tokens"] == 0
    assert complete(server, "And", max_tokens=0, echo=True)["choices"][0]["text"] == "And"


def test_several_answers_echo_the_same_prompt(server):
    choices = complete(server, ["And Paul", "So"], max_tokens=2, echo=True, logprobs=1, n=2, temperature=1)["choices"]
    assert [choice["text"][:2] for choice in choices] == ["An", "An", "So", "So"]
    first, second, third, _ = (choice["logprobs"] for choice in choices)
    assert first["token_logprobs"][:8] == second["token_logprobs"][:8]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [10, 10, 4, 4]
    assert third["token_logprobs"][0] is None


def test_a_prompt_of_several_bytes_a_character(server):
    """Bytes are tokens: a character counts where its last byte is."""
    (choice,) = complete(server, "aé€b", max_tokens=0, echo=True, logprobs=0)["choices"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 2, 2, 3]


def test_tokens_as_clients_of_vllm_ask_for_them(server):
    assert HTTP.get(f"{server.url}/tokenizer_info").json()["chat_template"] == TEMPLATE
    tokens = HTTP.post(f"{server.url}/tokenize", json={"prompt": "And", "add_special_tokens": False}).json()["tokens"]
    assert HTTP.post(f"{server.url}/detokenize", json={"tokens": tokens}).json()["prompt"] == "And"


def test_probabilities_are_those_of_the_model(server):
    llm = Llama(str(TINY_MODEL), n_ctx=4096, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
    wanted = llm("And Paul said", max_tokens=8, temperature=0, logprobs=3)["choices"][0]["logprobs"]
    llm.close()
    got = complete(server, "And Paul said", max_tokens=8, logprobs=3)["choices"][0]
    assert got["logprobs"]["tokens"] == wanted["tokens"]
    np.testing.assert_allclose(got["logprobs"]["token_logprobs"], wanted["token_logprobs"], atol=1e-3)
    for mine, theirs in zip(got["logprobs"]["top_logprobs"], wanted["top_logprobs"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    assert got["logprobs"]["text_offset"] == list(range(8))
    chunks = data_of(stream(server, "completions", prompt="And Paul said", max_tokens=8, logprobs=3))
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks[:-1]]
    assert [token for piece in streamed for token in piece["tokens"]] == wanted["tokens"]
    assert [offset for piece in streamed for offset in piece["text_offset"]] == list(range(8))


def test_probabilities_end_where_a_stop_string_cuts_the_answer(server):
    whole = complete(server, "And Paul said", max_tokens=8)["choices"][0]["text"]
    choice = complete(server, "And Paul said", max_tokens=8, stop=whole[4:6], logprobs=0)["choices"][0]
    assert choice["text"] == whole[: whole.index(whole[4:6])]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


def test_probabilities_in_a_chat(server):
    arguments = {"model": "tiny", "messages": MESSAGES, "max_tokens": 5, "temperature": 0}
    client = server.client()
    choice = client.chat.completions.create(**arguments, logprobs=True, top_logprobs=2).choices[0]
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 2
        assert (token.top_logprobs[0].token, token.top_logprobs[0].logprob) == (token.token, token.logprob)  # greedy
        assert bytes(token.bytes) == token.token.encode()
    assert client.chat.completions.create(**arguments).choices[0].logprobs is None


# ---- thoughts ------------------------------------------------------------------------------------------------


def test_thoughts_are_kept_apart(server, model_says):
    model_says("<think>\nHm, <b>\n</think>\n\nYes")
    message = chat(server, max_tokens=99)["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Yes", "Hm, <b>")
    deltas = [c["choices"][0]["delta"] for c in data_of(stream(server, "chat/completions", messages=MESSAGES))]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("reasoning_content", "") for delta in deltas).strip() == "Hm, <b>"
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes"


def test_a_thought_that_the_template_begins(server, model_says):
    model_says("Hm</think>Yes")
    message = chat(server, max_tokens=99, chat_template_kwargs={"thoughtful": True})["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Yes", "Hm")


def test_thoughts_stay_where_they_are_if_so_asked(server, strict_server, model_says):
    model_says("<think>Hm</think>Yes")
    message = chat(server, max_tokens=99, reasoning_format="none")["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "<think>Hm</think>Yes"}
    client = strict_server.client("one")  # whose default it is
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.choices[0].message.content == "<think>Hm</think>Yes"


def test_an_answer_of_a_form_is_no_thought(server):
    kwargs = {"thoughtful": True}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    message = chat(server, max_tokens=99, response_format=wanted, chat_template_kwargs=kwargs)["choices"][0]["message"]
    assert json.loads(message["content"])["city"] in ("Rome", "Joppa")
    assert "reasoning_content" not in message


def test_variables_of_the_template(server):
    plain = chat(server)["usage"]["prompt_tokens"]
    assert chat(server, reasoning_effort="high")["usage"]["prompt_tokens"] == plain + len("(high)")
    thoughtful = chat(server, chat_template_kwargs={"thoughtful": True})
    assert thoughtful["usage"]["prompt_tokens"] == plain + len("<think>\n")
    response = HTTP.post(
        f"{server.url}/v1/chat/completions",
        json={"messages": MESSAGES, "chat_template_kwargs": {"messages": []}},
    )
    assert (response.status_code, "gets messages from" in response.text) == (400, True)


# ---- tools ---------------------------------------------------------------------------------------------------


def test_a_streamed_call_has_its_name_and_identifier_once(server):
    arguments = {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "required"}
    chunks = data_of(stream(server, "chat/completions", **arguments))
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert calls[0]["function"] == {"name": "weather", "arguments": ""}
    assert calls[0]["id"].startswith("call_")
    assert len(calls) > 2
    assert all(call == {"index": 0, "function": {"arguments": call["function"]["arguments"]}} for call in calls[1:])
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    whole = chat(server, max_tokens=None, tools=[TOOL], tool_choice="required")["choices"][0]
    assert whole["message"]["content"] is None
    assert whole["message"]["tool_calls"][0]["function"]["arguments"] == "".join(
        call["function"]["arguments"] for call in calls
    )
    cut = chat(server, max_tokens=2, tools=[TOOL], tool_choice="required")["choices"][0]
    assert cut["finish_reason"] == "length"


# ---- as clients of other servers ask ---------------------------------------------------------------------------------


def test_a_single_model_answers_to_any_name(server, strict_server):
    assert complete(server, "And", model="gpt-4o", max_tokens=1)["model"] == "tiny"
    assert HTTP.get(f"{server.url}/v1/models/gpt-4o").status_code == 404
    body, key = {"prompt": "And", "model": "gpt-4o"}, {"Authorization": "Bearer one"}
    assert HTTP.post(f"{strict_server.url}/v1/completions", json=body, headers=key).status_code == 404


def test_paths_without_a_version_and_counts(server):
    wanted = chat(server)["choices"][0]["message"]["content"]
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 8}
    assert HTTP.post(f"{server.url}/chat/completions", json=body).json()["choices"][0]["message"]["content"] == wanted
    assert HTTP.get(f"{server.url}/models").json()["data"][0]["id"] == "tiny"
    n = chat(server)["usage"]["prompt_tokens"]
    for path in ("/chat/completions/input_tokens", "/v1/chat/completions/input_tokens"):
        assert HTTP.post(server.url + path, json={"messages": MESSAGES}).json() == {"input_tokens": n}
    counted = HTTP.post(f"{server.url}/v1/responses/input_tokens", json={"input": "Say"}).json()
    assert counted == {"object": "response.input_tokens", "input_tokens": n}


def test_a_schema_as_llama_cpps_clients_send_it(server):
    answer = chat(server, json_schema=SCHEMA, max_tokens=40)["choices"][0]["message"]["content"]
    assert json.loads(answer)["city"] in ("Rome", "Joppa")
    both = {"messages": MESSAGES, "json_schema": SCHEMA, "response_format": {"type": "json_object"}}
    assert HTTP.post(f"{server.url}/v1/chat/completions", json=both).status_code == 400


def test_whether_the_last_message_is_continued_can_be_said(server):
    begun = [*MESSAGES, {"role": "assistant", "content": "Once"}]

    def n_tokens(**more: object) -> int:
        return chat(server, messages=begun, **more)["usage"]["prompt_tokens"]

    assert n_tokens(continue_final_message=True, add_generation_prompt=False) == n_tokens()
    assert n_tokens(add_generation_prompt=True) == n_tokens(continue_final_message=False) > n_tokens()
    asked = HTTP.post(
        f"{server.url}/apply-template", json={"messages": MESSAGES, "add_generation_prompt": False}
    ).json()
    assert asked["prompt"] == "[user] Say\n[assistant] "  # this template begins answers unasked
    for messages, more in ((begun, {"add_generation_prompt": True}), (MESSAGES, {})):
        body = {"messages": messages, "continue_final_message": True, **more}
        assert HTTP.post(f"{server.url}/v1/chat/completions", json=body).status_code == 400


def test_a_prompt_need_not_begin_an_answer():
    template = "{{ messages[0].content }}{% if add_generation_prompt %}[assistant]{% endif %}"
    with serving({"tiny": TINY_MODEL}, ctx=256, chat_template=template) as server:
        for wanted, more in (("Say[assistant]", {}), ("Say", {"add_generation_prompt": False})):
            asked = HTTP.post(f"{server.url}/apply-template", json={"messages": MESSAGES, **more})
            assert asked.json()["prompt"] == wanted
