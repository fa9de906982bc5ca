"""llama.cpp's own endpoint for completions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from served import HTTP, Serving, serving

from selfextend_gguf.models import TINY_MODEL

PROMPT = "And it came to pass in those days, that there went out " * 10  # two trained contexts


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving({"tiny": TINY_MODEL}, ctx=1024, cache=2**28) as server:
        yield server


def post(server: Serving, path: str, **body: object) -> Any:
    response = HTTP.post(f"{server.url}{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def complete(server: Serving, prompt: object, **more: object) -> Any:
    return post(server, "/completion", **{"prompt": prompt, "n_predict": 8, "temperature": 0, **more})


def test_it_answers_as_the_other_endpoint(server):
    wanted = post(server, "/v1/completions", prompt=PROMPT, max_tokens=8, temperature=0)
    got = complete(server, PROMPT, return_tokens=True, seed=5)
    assert got["content"] == wanted["choices"][0]["text"]
    assert got["tokens"] == list(got["content"].encode())
    assert (got["tokens_predicted"], got["tokens_evaluated"], got["stop_type"]) == (8, len(PROMPT), "limit")
    assert got["prompt"] == PROMPT
    assert got["generation_settings"]["seed"] == 5
    assert got["timings"]["predicted_n"] == 8
    assert post(server, "/completions", prompt=PROMPT, n_predict=8, temperature=0)["content"] == got["content"]


def test_a_stream(server):
    lines = HTTP.post(
        f"{server.url}/completion", json={"prompt": "And", "n_predict": 8, "temperature": 0, "stream": True}
    ).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert "".join(chunk["content"] for chunk in chunks) == complete(server, "And")["content"]
    assert [token for chunk in chunks for token in chunk["tokens"]] == list(complete(server, "And")["content"].encode())


def test_prompts_of_all_kinds(server):
    wanted = complete(server, "And Paul")["content"]
    tokens = list(b"And Paul")
    for prompt in (tokens, {"prompt_string": "And Paul"}, [65, "nd ", 80, "aul"]):
        assert complete(server, prompt)["content"] == wanted
    several = complete(server, [tokens, "And Paul", {"prompt_string": "And Paul"}])
    assert [answer["content"] for answer in several] == [wanted] * 3
    assert [answer["index"] for answer in several] == [0, 1, 2]


def test_why_an_answer_ends(server):
    whole = complete(server, "And")["content"]
    stopped = complete(server, "And", stop=[whole[3:5]])
    assert (stopped["content"], stopped["stop_type"], stopped["stopping_word"]) == (whole[:3], "word", whole[3:5])
    ended = complete(server, "And", grammar='root ::= "yes"')
    assert (ended["content"], ended["stop_type"], ended["stopping_word"]) == ("yes", "eos", "")


def test_probabilities(server):
    answer = complete(server, "And", n_probs=3)
    wanted = post(server, "/v1/completions", prompt="And", max_tokens=8, temperature=0, logprobs=3)
    tokens = answer["completion_probabilities"]
    assert [t["logprob"] for t in tokens] == wanted["choices"][0]["logprobs"]["token_logprobs"]
    assert bytes(t["id"] for t in tokens).decode() == answer["content"]
    assert [len(t["top_logprobs"]) for t in tokens] == [3] * 8


def test_biases_schemas_and_fields(server):
    first = complete(server, "And")["content"][0]
    for bias in ([[ord(first), False]], [[first, -100]], {first: -100}, [[ord(first), -100.0]]):
        assert first not in complete(server, "And", logit_bias=bias)["content"]
    assert json.loads(complete(server, "And", json_schema={"enum": [7]})["content"]) == 7
    assert post(server, "/v1/completions", prompt="And", json_schema={"enum": [7]})["choices"][0]["text"] == "7"
    fields = ["content", "generation_settings/n_predict", "nothing"]
    assert list(complete(server, "And", response_fields=fields).values())[1:] == [8, None]


def test_a_prompt_is_read_ahead(server):
    """An answer of no tokens."""
    assert complete(server, PROMPT + "from", n_predict=0)["content"] == ""
    assert complete(server, PROMPT + "from")["timings"]["prompt_n"] == 1


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, "prompt"),
        ({"prompt": 5}, "prompt: a text, or a list"),
        ({"prompt": [[1, None]]}, "prompt: a text, or a list"),
        ({"prompt": {"prompt_string": "a", "multimodal_data": ["x"]}}, "not to images"),
        ({"prompt": [1, 300]}, "300"),
        ({"prompt": "a", "logit_bias": [5]}, "logit_bias"),
        ({"prompt": "a", "post_sampling_probs": True, "n_probs": 2}, "post_sampling_probs"),
        ({"prompt": "a" * 2000}, "maximum context length"),
        ({"prompt": "a", "grammar": "root ::= ", "json_schema": {}}, "only one of grammar"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_refused(server, body, error):
    response = HTTP.post(f"{server.url}/completion", json=body)
    assert response.status_code == 400
    assert error in response.json()["error"]["message"]
