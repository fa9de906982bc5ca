"""`sx-gguf serve` over HTTP, by OpenAI's own client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time

import httpx
import llama_cpp
import numpy as np
import openai
import psutil
import pytest
from served import HTTP, KEY, Served, serving

from selfextend_gguf import Llama
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.server.kept_prompts import KeptPrompts
from selfextend_gguf.server.requests import CompletionRequest
from selfextend_gguf.tiny.keys import key_task

MODEL = str(TINY_MODEL)
CONTEXT = 4096  # 16 trained contexts


@pytest.fixture(scope="module")
def chat_models(model):
    """The bundled weights with a chat template that shows tools, and with one that does not."""
    return [str(model("bundled-tools")), str(model("bundled-chat"))]


@pytest.fixture(scope="module")
def server(chat_models):
    """Three models; the second and third have chat templates."""
    names = [argument for name in ("tiny-256.Q8_0", "chat", "plain") for argument in ("--alias", name)]
    served = Served(MODEL, *chat_models, *names, "-c", str(CONTEXT), "-t", "1", "--api-key", KEY)
    yield served
    code, error = served.end()
    assert code == 0
    assert "Traceback" not in error


@pytest.fixture(scope="module")
def tasks(heldout_text):
    """Prompts of many lengths, up to 16 trained contexts."""
    rng = np.random.default_rng(5)
    return [key_task(rng, heldout_text, length, 0.4).prompt for length in (4000, 2000, 1000, 500, 300, 200, 150, 120)]


def alone(prompt: str, max_tokens: int, path: str = MODEL) -> str:
    """What a fresh `Llama` answers."""
    llm = Llama(path, n_ctx=CONTEXT, n_threads=1, n_threads_batch=1, verbose=False)
    try:
        return llm.create_completion(prompt, max_tokens=max_tokens, temperature=0)["choices"][0]["text"]
    finally:
        llm.close()


# ---- answers -------------------------------------------------------------------------------------------------


def test_eight_clients_at_once_get_the_answers_of_a_fresh_model(server, tasks):
    """200 requests, streamed and not: each answer is the right one, none is lost, memory stays."""
    requests = [(prompt, n) for prompt in tasks for n in (5, 9)]
    answers = {prompt: alone(prompt, 9) for prompt in tasks}  # of ASCII: a byte a token
    wanted = {(prompt, n): answers[prompt][:n] for prompt, n in requests}
    assert len(set(wanted.values())) > len(tasks)
    # All once, then mostly short ones.
    rng = np.random.default_rng(0)
    weights = np.repeat([0.005, 0.01, 0.02, 0.05, 0.1, 0.1, 0.1, 0.1], 2)
    order = [*range(len(requests)), *rng.choice(len(requests), 200 - len(requests), p=weights / weights.sum())]
    process = psutil.Process(server.process.pid)
    sizes = []
    n_answers = 0

    async def client(queue: asyncio.Queue) -> None:
        nonlocal n_answers
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=600
        ) as openai_client:
            while not queue.empty():
                number, index = queue.get_nowait()
                prompt, n = requests[index]
                arguments = {"model": "tiny-256.Q8_0", "prompt": prompt, "max_tokens": n, "temperature": 0}
                if number % 2:
                    answer = await openai_client.completions.create(**arguments)
                    text = answer.choices[0].text
                    assert answer.usage.prompt_tokens == len(prompt)
                else:
                    stream = await openai_client.completions.create(**arguments, stream=True)
                    text = "".join([chunk.choices[0].text async for chunk in stream])
                assert text == wanted[requests[index]]
                n_answers += 1
                sizes.append(process.memory_info().rss)

    async def all_clients() -> None:
        queue: asyncio.Queue = asyncio.Queue()
        for item in enumerate(order):
            queue.put_nowait(item)
        await asyncio.gather(*(client(queue) for _ in range(8)))

    asyncio.run(all_clients())
    assert n_answers == 200
    warm = max(sizes[: len(requests) + 16])  # every prompt has been read once
    assert max(sizes) - warm < 16 * 2**20


def test_the_synchronous_client(server, tasks):
    client = server.client()
    arguments = {"model": "tiny-256.Q8_0", "prompt": tasks[3], "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**arguments)
    assert whole.choices[0].text == alone(tasks[3], 6)
    assert (whole.model, whole.choices[0].finish_reason) == ("tiny-256.Q8_0", "length")
    chunks = list(client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_chat_in_the_models_template(server, chat_models):
    messages = [{"role": "user", "content": "In the beginning"}]
    wanted = alone("[user] In the beginning\n[assistant] ", 8, chat_models[0])
    client = server.client()
    arguments = {"model": "chat", "temperature": 0}
    for more in ({"max_tokens": 8}, {"max_completion_tokens": 8}):
        answer = client.chat.completions.create(messages=messages, **arguments, **more)
        assert answer.choices[0].message.content == wanted
        assert answer.usage.completion_tokens == 8
    parts = [{"role": "user", "content": [{"type": "text", "text": "In the"}, {"type": "text", "text": " beginning"}]}]
    stream = client.chat.completions.create(messages=parts, **arguments, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == wanted


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Joppa"]}, "hot": {"type": "boolean"}},
    "required": ["city", "hot"],
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "weather", "parameters": SCHEMA}}


def fits_schema(text: str) -> bool:
    value = json.loads(text)
    return value["city"] in ("Rome", "Joppa") and isinstance(value["hot"], bool) and len(value) == 2


def test_json_schemas_force_the_form(server):
    client = server.client()
    messages = [{"role": "user", "content": "Say"}]
    for wanted in (
        {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}},
        {"type": "json_object", "schema": SCHEMA},
    ):
        answer = client.chat.completions.create(model="chat", messages=messages, response_format=wanted, temperature=0)
        assert fits_schema(answer.choices[0].message.content)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_that_must_be_called(server, choice):
    client = server.client()
    arguments = {
        "model": "plain",
        "messages": [{"role": "user", "content": "Say"}],
        "tools": [TOOL],
        "tool_choice": choice,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**arguments).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.tool_calls[0].function.name == "weather"
    assert fits_schema(answer.message.tool_calls[0].function.arguments)
    pieces = [
        call.function.arguments
        for chunk in client.chat.completions.create(**arguments, stream=True)
        for call in chunk.choices[0].delta.tool_calls or []
    ]
    assert "".join(pieces) == answer.message.tool_calls[0].function.arguments


def test_tools_the_model_may_call_are_shown_by_its_template(server):
    client = server.client()
    messages = [{"role": "user", "content": "Say"}]
    counts = [
        client.chat.completions.create(model="chat", messages=messages, max_tokens=1, **more).usage.prompt_tokens
        for more in ({}, {"tools": [TOOL]})
    ]
    assert counts[1] - counts[0] == len("<weather>")


def test_every_request_has_a_seed_of_its_own(server):
    """llama_cpp's are the same ones in every process: fresh servers would give the same answers."""
    assert len({CompletionRequest(prompt="a", seed=None).first_seed() for _ in range(9)}) == 9

    def answer(**more: int) -> str:
        body = {"prompt": "And", "max_tokens": 30, "temperature": 2.0, **more}
        return server.post("/v1/completions", body).json()["choices"][0]["text"]

    assert answer() != answer()
    assert answer(seed=5) == answer(seed=5)


def test_a_grammar(server):
    body = {"prompt": "And", "grammar": 'root ::= "yes" | "no"', "temperature": 0}
    assert server.post("/v1/completions", body).json()["choices"][0]["text"] in ("yes", "no")


# ---- models --------------------------------------------------------------------------------------------------


def test_models_and_their_contexts(server):
    models = server.client().models.list().data
    assert [(m.id, m.n_ctx_train, m.n_ctx) for m in models] == [
        (name, 256, CONTEXT) for name in ("tiny-256.Q8_0", "chat", "plain")
    ]
    assert server.client().models.retrieve("chat").id == "chat"
    names = [f"{m.id} (trained on 256 tokens, reads {CONTEXT})" for m in models]
    assert server.line == f"Listening on {server.url}: {', '.join(names)}"


def test_models_take_turns(server, chat_models):
    """They have the same weights in Q8_0 and F32, which differ in what follows."""
    body = {"prompt": "And Paul said", "max_tokens": 24, "temperature": 0}
    wanted = {
        name: alone(body["prompt"], 24, path) for name, path in (("tiny-256.Q8_0", MODEL), ("chat", chat_models[0]))
    }
    for name in ("tiny-256.Q8_0", "chat", "tiny-256.Q8_0"):
        answer = server.post("/v1/completions", body | {"model": name}).json()
        assert (answer["model"], answer["choices"][0]["text"]) == (name, wanted[name])
    assert server.post("/v1/completions", body).json()["model"] == "tiny-256.Q8_0"


# ---- bad requests --------------------------------------------------------------------------------------------

CHAT = {"model": "chat", "messages": [{"role": "user", "content": "Say"}]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
TOOL_RESULT = {"role": "tool", "content": "a", "tool_call_id": "b"}
BAD_SCHEMA = {"type": "json_object", "schema": {"type": "foo"}}
HUGE_SCHEMA = {"type": "json_object", "schema": {"type": "array", "minItems": 10**9, "items": {"type": "null"}}}
OTHER = {"type": "function", "function": {"name": "x"}}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", {"prompt": "a", "model": "gpt-4"}, 404, "the model 'gpt-4' does not exist"),
        ("completions", {}, 400, "prompt: Field required"),
        ("completions", {"prompt": ""}, 400, "the prompt is empty"),
        ("completions", {"prompt": 5}, 400, "prompt: Input should be a valid string"),
        ("completions", {"prompt": [1, 300]}, 400, "300 is no token of the model"),
        ("completions", {"prompt": [[1], [-1]]}, 400, "-1 is no token of the model"),
        ("completions", {"prompt": ["a", 1]}, 400, "prompt: "),
        ("completions", {"prompt": ["a", ""]}, 400, "the prompt is empty"),
        ("completions", {"prompt": []}, 400, "the prompt is empty"),
        ("completions", [1], 400, "the body must be a JSON object"),
        ("completions", "text", 400, "the body must be a JSON object"),
        ("completions", {"prompt": "a" * 5000}, 400, "maximum context length is 4096 tokens"),
        ("completions", {"prompt": "a" * 5000, "stream": True}, 400, "maximum context length is 4096 tokens"),
        ("completions", {"prompt": "a", "max_tokens": 4096}, 400, "you requested 4097"),
        ("completions", {"prompt": "a", "max_tokens": 10**30}, 400, "maximum context length"),
        ("completions", {"prompt": "a", "max_tokens": -2}, 400, "max_tokens: "),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens: "),
        ("completions", {"prompt": "a", "max_tokens": "9"}, 400, "max_tokens: Input should be a valid integer"),
        ("completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature: "),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature: "),
        ("completions", {"prompt": "a", "repeat_penalty": 0}, 400, "repeat_penalty: "),
        ("completions", {"prompt": "a", "repeat_penalty": 1e-9}, 400, "repeat_penalty must be at least 1e-06"),
        ("completions", {"prompt": "a", "temperature": 1e300}, 400, "temperature must be at"),
        ("completions", {"prompt": "a", "top_k": 2**40}, 400, "top_k must be between"),
        ("completions", {"prompt": "a", "top_k": 2**40, "stream": True}, 400, "top_k must be between"),
        ("completions", {"prompt": "a", "seed": 10**30}, 400, "seed must be between"),
        ("completions", {"prompt": "a", "seed": 1.5}, 400, "seed: "),
        ("completions", {"prompt": "a", "n": 0}, 400, "n: Input should be gr"),
        ("completions", {"prompt": "a", "best_of": 3}, 400, "best_of is not supported"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens: Input should be at least 1"),
        ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix is not supported"),
        ("completions", {"prompt": "a", "echo": True, "stream": True}, 400, "echo and stream"),
        ("completions", {"prompt": "a", "stop": [""]}, 400, "stop: "),
        ("completions", {"prompt": "a", "grammar": "root ::= ("}, 400, "cannot parse the grammar"),
        ("completions", {"prompt": "a", "grammar": "root ::= " + "(" * 10**5}, 400, "nests 100000 parentheses"),
        ("completions", {"prompt": "a", "grammar": r"root ::= [\UFFFFFFFF]"}, 400, "the grammar allows no token here"),
        ("completions", {"prompt": "a", "grammar": 'root ::= "a"', "min_tokens": 3}, 400, "min_tokens"),
        ("completions", {"prompt": "a", "logit_bias": {"300": 1}}, 400, "'300', which is no token of the model"),
        ("completions", {"prompt": "a", "logit_bias": {"-1": 1}}, 400, "'-1', which is no token of the model"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "'x', which is no token of the model"),
        ("completions", {"prompt": "a", "logit_bias": {"97": 1e300}}, 400, "logit_bias: "),
        ("completions", {"prompt": "\ud800"}, 400, "surrogates not allowed"),
        ("chat/completions", {"model": "chat"}, 400, "messages"),
        ("chat/completions", CHAT | {"messages": []}, 400, "messages"),
        ("chat/completions", CHAT | {"messages": "Say"}, 400, "messages: "),
        ("chat/completions", CHAT | {"messages": [{"role": "clown", "content": "a"}]}, 400, "messages: "),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "text only"),
        ("chat/completions", CHAT | {"model": "tiny-256.Q8_0"}, 400, "has no chat template"),
        ("chat/completions", CHAT | {"messages": [TOOL_RESULT]}, 400, "refuses the messages: no tool messages"),
        ("chat/completions", CHAT | {"max_tokens": -2}, 400, "max_tokens: "),
        ("chat/completions", CHAT | {"max_completion_tokens": 5000}, 400, "maximum context length"),
        ("chat/completions", CHAT | {"modalities": ["audio"]}, 400, "answers are texts"),
        ("chat/completions", CHAT | {"tools": [TOOL], "model": "plain"}, 400, "tells the model nothing of tools"),
        ("chat/completions", CHAT | {"tool_choice": "required"}, 400, '"required" without tools'),
        ("chat/completions", CHAT | {"tools": [TOOL], "tool_choice": OTHER}, 400, "'x', which is not among"),
        ("chat/completions", CHAT | {"tools": [TOOL], "tool_choice": NAMED, "grammar": "a"}, 400, "only one of"),
        ("chat/completions", CHAT | {"response_format": BAD_SCHEMA}, 400, "the JSON schema cannot be kept at #/type"),
        ("chat/completions", CHAT | {"response_format": HUGE_SCHEMA}, 400, "no whole number from 0 to 1000000"),
        ("chat/completions", CHAT | {"response_format": {"type": "json_schema"}}, 400, "schema is missing"),
    ],
)  # fmt: skip
def test_bad_requests(server, path, body, status, message):
    response = server.post(f"/v1/{path}", content=json.dumps(body).encode())
    error = response.json()["error"]
    assert (response.status_code, set(error)) == (status, {"message", "type", "param", "code"}), error
    assert message in error["message"]
    if "maximum context length" in message:
        assert error["code"] == "context_length_exceeded"
    answer = server.post("/v1/completions", {"prompt": "And", "max_tokens": 1})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "content", [b'{"prompt": ', b'{"prompt": "caf\xe9"}', b"", b"[" * 100_000, b'{"prompt": "a", "temperature": NaN}']
)
def test_bodies_that_are_no_json(server, content):
    response = server.post("/v1/completions", content=content)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert server.post("/v1/completions", {"prompt": "And", "max_tokens": 1}).status_code == 200


def test_a_stream_that_fails_says_so(server):
    body = {"prompt": "a", "grammar": r'root ::= "ab" [\UFFFFFFFF]', "stream": True}
    with pytest.raises(openai.APIError, match="the grammar allows no token here"):
        list(server.client().completions.create(model="chat", prompt="a", stream=True, extra_body=body))


def test_a_key_is_needed_everywhere_but_for_health(server):
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").completions.create(model="chat", prompt="a")
    for method, path in (
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/chat"),
    ):
        response = HTTP.request(
            method, server.url + path, json={"prompt": "a", "messages": []} if method == "POST" else None
        )
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key"), path
    assert HTTP.get(server.url + "/health").json() == {"status": "ok", "busy": False}


# ---- clients that leave --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here():
    """A server in this process: (URL, models, requests at work)."""
    with serving({"tiny": TINY_MODEL, "other": TINY_MODEL}, ctx=16384) as server:
        yield server.url, server.models, server.tasks


def wait_for(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def left_request(url: str, body: dict):
    """A request whose client hangs up at the end of the block."""
    address = httpx.URL(url)
    content = json.dumps(body).encode()
    with socket.create_connection((address.host, address.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}"
        connection.sendall(head.encode() + b"\r\nContent-Type: application/json\r\n\r\n" + content)
        yield


def busy(url: str) -> bool:
    return HTTP.get(f"{url}/health").json()["busy"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_reading_of_its_prompt(here, heldout_text, stream):
    url, models, at_work = here
    prompt = heldout_text[:16000]
    models._shared.llm.reset()
    with left_request(url, {"prompt": prompt, "max_tokens": 5, "stream": stream}):
        wait_for(lambda: models._shared.llm.n_tokens > 200)
    wait_for(lambda: not at_work)
    n_read = models._shared.llm.n_tokens
    assert 200 < n_read < len(prompt)
    assert bytes(models._shared.llm.input_ids[:n_read].astype(np.uint8)) == prompt[:n_read].encode()
    check_next_answer(url)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_answer(here, stream):
    url, models, at_work = here
    body = {
        "prompt": "And Paul said",
        "max_tokens": 16000,
        "temperature": 0,
        "logit_bias": {"0": -100},
        "stream": stream,
    }
    models._shared.llm.reset()
    with left_request(url, body):
        wait_for(lambda: models._shared.llm.n_tokens > 50)
    wait_for(lambda: not at_work)
    assert 50 < models._shared.llm.n_tokens < 8000
    check_next_answer(url)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_never_served(here, heldout_text, stream):
    url, models, at_work = here
    models._shared.llm.reset()
    with left_request(url, {"prompt": heldout_text[:16000], "max_tokens": 5}):
        wait_for(lambda: models._shared.llm.n_tokens > 200)
        with left_request(url, {"model": "other", "prompt": "Never read", "max_tokens": 5, "stream": stream}):
            wait_for(lambda: len(at_work) == 2)
    wait_for(lambda: not at_work)
    assert models._alias == "tiny"  # the other one was not even loaded
    assert bytes(models._shared.llm.input_ids[:10].astype(np.uint8)) == heldout_text[:10].encode()
    check_next_answer(url)


def check_next_answer(url: str) -> None:
    answer = HTTP.post(
        f"{url}/v1/completions", json={"prompt": "And he said", "max_tokens": 9, "temperature": 0}
    ).json()
    llm = Llama(MODEL, n_ctx=16384, verbose=False)
    assert answer["choices"][0]["text"] == llm("And he said", max_tokens=9, temperature=0)["choices"][0]["text"]
    llm.close()


# ---- starting and ending -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sig", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_it_also_while_it_answers(sig, code):
    served = Served(MODEL, "-c", "16384")
    with left_request(served.url, {"prompt": "And", "max_tokens": 16000, "logit_bias": {"0": -100}}):
        wait_for(lambda: busy(served.url))
        got, error = served.end(sig)
    assert got == code
    assert "Traceback" not in error
    assert error.splitlines() in ([], ["Interrupted."])


@pytest.mark.parametrize("way", ["environment", "file"])
def test_keys_from_elsewhere(way, tmp_path):
    (tmp_path / "keys").write_text("\nsecret\n  other \n")
    if way == "file":
        served = Served(MODEL, "--alias", "mine", "--api-key-file", str(tmp_path / "keys"))
    else:
        served = Served(MODEL, "--alias", "mine", SX_GGUF_API_KEY="secret other")
    try:
        for key in ("secret", "other"):
            assert [m.id for m in served.client(key).models.list()] == ["mine"]
        with pytest.raises(openai.AuthenticationError):
            served.client("secret other").models.list()
    finally:
        served.end()


@pytest.mark.parametrize(("more", "warnings"), [([], 1), (["--api-key", "x"], 0)])
def test_an_open_server_without_a_key_is_warned_of(more, warnings):
    served = Served(MODEL, "--host", "0.0.0.0", *more)
    _, error = served.end()
    assert [line for line in error.splitlines() if line.startswith("Warning: ")] == error.splitlines()
    assert error.count("anyone who reaches 0.0.0.0 can use this server: set --api-key") == warnings


def test_an_address_in_use(one_line_error):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        error = one_line_error("serve", MODEL, "--port", str(port))
    assert error == f"Error: cannot listen on 127.0.0.1:{port}: Address already in use"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.gguf"], "Model path does not exist: missing.gguf"),
        ([MODEL, MODEL], "two models have the same name"),
        ([MODEL, "--alias", "a", "--alias", "b"], "1 models and 2 aliases"),
        ([MODEL, "-c", "1000000"], "beyond the reach of Self-Extend"),
        ([MODEL, "--port", "70000"], "70000 is not in the range"),
        ([MODEL, "--api-key", ""], "API key 1 is empty"),
        ([MODEL, "--api-key", "a", "--api-key", "b c"], "API key 2 is empty, or has blanks"),
        ([MODEL, "--api-key-file", "missing"], "missing"),
        ([MODEL, "--api-key-file", "/dev/null"], "/dev/null is empty"),
        ([MODEL, "--cors-origins", "https://a.example,b.example"], "'b.example' is no origin"),
        ([MODEL, "--cors-origins", "https://a.example/page"], "is no origin"),
        ([], "Missing argument 'MODEL...'"),
    ],
)
def test_bad_arguments(one_line_error, arguments, message):
    assert message in one_line_error("serve", *arguments)


def test_without_the_extra_it_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['fastapi'] = None; sys.argv[1:] = ['serve', 'x.gguf']\n"
        "from selfextend_gguf.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["Error: the server needs fastapi: pip install 'selfextend-gguf[server]'"]


def test_a_grammar_never_ends_the_process():
    llm = Llama(MODEL, n_ctx=256, verbose=False)
    for text in ("root ::= (", r"root ::= [\UFFFFFFFF]", "root ::= root"):
        with pytest.raises(ValueError, match="grammar"):
            llm("And", max_tokens=3, grammar=llama_cpp.LlamaGrammar.from_string(text))
    assert (
        llm("And", max_tokens=3, grammar=llama_cpp.LlamaGrammar.from_string('root ::= "yes"'))["choices"][0]["text"]
        == "yes"
    )


# ---- kept prompts --------------------------------------------------------------------------------------------


def test_questions_about_one_document_read_it_once(here, heldout_text):
    url, models, _ = here
    llm = models._shared.llm
    fresh = Llama(MODEL, n_ctx=16384, verbose=False)
    states, llm.kept_prompts = llm.kept_prompts, KeptPrompts(2**30)
    try:
        n_read = []
        for question in ("And Paul said", "And Peter said unto them", "The chief captain", "And he"):
            body = {"prompt": heldout_text[:800] + question, "max_tokens": 100, "temperature": 0}
            answer = HTTP.post(f"{url}/v1/completions", json=body).json()
            usage = answer["usage"]
            n_read.append(usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"])
            assert answer["timings"]["prompt_n"] == n_read[-1]
            fresh.reset()
            wanted = fresh(body["prompt"], max_tokens=100, temperature=0)["choices"][0]["text"]
            assert answer["choices"][0]["text"] == wanted
    finally:
        llm.kept_prompts = states
    assert n_read[0] >= 800
    assert max(n_read[1:]) < 300


def test_a_folder_of_prompts_outlives_the_server(heldout_text, tmp_path):
    folder = tmp_path / "prompts"
    body = {"prompt": heldout_text[:800], "max_tokens": 20, "temperature": 0}
    answers = []
    for option in ("--prompt-cache", "--prompt-cache", "--prompt-cache-ro"):
        served = Served(MODEL, "-c", "1024", option, str(folder), "--cache-ram", "64")
        answers.append(HTTP.post(f"{served.url}/v1/completions", json=body).json()["choices"][0]["text"])
        assert served.end()[0] == 0
        assert list(folder.glob("*.kv"))
    assert answers[0] == answers[1] == answers[2]
