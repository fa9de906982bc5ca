"""Endpoints beside those that answer."""

from __future__ import annotations

import socket
import threading

import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from served import ARGUMENTS, HTTP, KEY, serving

from selfextend_gguf.errors import UnsupportedModelError
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.server import run
from selfextend_gguf.server.app import Settings, create_app
from selfextend_gguf.server.kept_prompts import KeptPrompts
from selfextend_gguf.server.models import OneModelAtATime, ServedModel

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server():
    models = {"tiny": TINY_MODEL, "other": TINY_MODEL}
    with serving(models, ctx=1024, settings=Settings(keys=[KEY]), chat_template=TEMPLATE) as server:
        yield server


def post(server, path: str, body: dict):
    return HTTP.post(server.url + path, json=body, headers=HEADERS)


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        ("/tokenize", {"content": "Say"}, {"tokens": [83, 97, 121]}),
        ("/tokenize", {"content": "Say", "add_special": True, "model": "other"}, {"tokens": [83, 97, 121]}),
        ("/tokenize", {"content": "\xe9", "with_pieces": True},
         {"tokens": [{"id": 0xC3, "piece": [0xC3]}, {"id": 0xA9, "piece": [0xA9]}]}),
        ("/tokenize", {"content": "a", "with_pieces": True}, {"tokens": [{"id": 97, "piece": "a"}]}),
        ("/detokenize", {"tokens": [83, 97, 121]}, {"content": "Say", "prompt": "Say"}),
        ("/extras/tokenize", {"input": "Say"}, {"tokens": [83, 97, 121]}),
        ("/extras/tokenize/count", {"input": "Say"}, {"count": 3}),
        ("/extras/detokenize", {"tokens": [83, 97]}, {"text": "Sa"}),
        ("/apply-template", {"messages": [{"role": "user", "content": "Say"}]}, {"prompt": "[user] Say\n[assistant] "}),
    ],
)  # fmt: skip
def test_texts_and_tokens(server, path, body, answer):
    response = post(server, path, body)
    assert (response.status_code, response.json()) == (200, answer)
    assert HTTP.post(server.url + path, json=body).status_code == 401


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/tokenize", {}, 400, "content: Field required"),
        ("/tokenize", {"content": "a", "model": "x"}, 404, "the model 'x' does not exist"),
        ("/detokenize", {"tokens": [300]}, 400, "300 is no token of the model"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens: Input should be a valid list"),
        ("/apply-template", {"messages": []}, 400, "messages: "),
        ("/v1/embeddings", {"input": "a"}, 400, "this server gives no embeddings"),
        ("/nowhere", {}, 404, "Not Found"),
    ],
)
def test_bad_requests(server, path, body, status, message):
    response = post(server, path, body)
    assert (response.status_code, message in response.json()["error"]["message"]) == (status, True), response.text


def test_models_with_a_slash(server):
    for path in ("/v1/models", "/v1/models/"):
        assert [m["id"] for m in HTTP.get(server.url + path, headers=HEADERS).json()["data"]] == ["tiny", "other"]


def test_properties(server):
    props = HTTP.get(f"{server.url}/props", params={"model": "other"}, headers=HEADERS).json()
    assert (props["model_alias"], props["model_path"]) == ("other", TINY_MODEL.name)
    assert props["default_generation_settings"]["n_ctx"] == 1024
    assert (props["n_ctx_train"], props["chat_template"], props["total_slots"]) == (256, TEMPLATE, 1)


def test_health(server):
    assert HTTP.head(f"{server.url}/health").status_code == 200
    assert HTTP.get(f"{server.url}/health").json() == {"status": "ok", "busy": False}


def test_health_while_a_model_is_loaded(server, monkeypatch):
    """Others are answered meanwhile."""
    may_load, load = threading.Event(), ServedModel.load

    def slow_load(self):
        may_load.wait(60)
        return load(self)

    monkeypatch.setattr(ServedModel, "load", slow_load)
    alias = "other" if server.models._alias == "tiny" else "tiny"
    body = {"prompt": "a", "max_tokens": 1, "model": alias}
    asking = threading.Thread(target=post, args=(server, "/v1/completions", body))
    asking.start()
    while HTTP.get(f"{server.url}/health").json() != {"status": "loading", "busy": True}:
        pass
    waiting = threading.Thread(target=post, args=(server, "/v1/completions", body))
    waiting.start()
    while metrics(server)["sx_gguf_waiting_requests"] != 1:
        pass
    may_load.set()
    asking.join()
    waiting.join()
    assert HTTP.get(f"{server.url}/health").json()["status"] == "ok"
    assert metrics(server)["sx_gguf_waiting_requests"] == 0


@pytest.mark.parametrize("error", [None, UnsupportedModelError("no such model")])
def test_health_before_the_first_model_is_loaded(monkeypatch, error):
    may_load, load = threading.Event(), ServedModel.load

    def slow_load(self):
        may_load.wait(60)
        if error is not None:
            raise error
        return load(self)

    monkeypatch.setattr(ServedModel, "load", slow_load)
    monkeypatch.setattr(run, "server_ends", threading.Event())  # of this server alone
    models = OneModelAtATime([ServedModel.from_file(TINY_MODEL, "tiny", 256, ARGUMENTS, lambda: KeptPrompts(0))])
    config = uvicorn.Config(create_app(models, Settings()), log_level="critical", lifespan="off")
    server = run.Server(config, models)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        health = f"http://127.0.0.1:{listener.getsockname()[1]}/health"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        response = HTTP.get(health)
        assert (response.status_code, response.json()) == (503, {"status": "loading", "busy": True})
        may_load.set()
        if error is None:
            while HTTP.get(health).status_code != 200:
                pass
            server.should_exit = True
        thread.join()
    assert server.error is error
    models.close()


def metrics(server) -> dict[str, float]:
    text = HTTP.get(f"{server.url}/metrics", headers=HEADERS).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name + "".join(sample.labels.values()): sample.value for sample in samples}


def test_metrics(server):
    assert HTTP.get(f"{server.url}/metrics").status_code == 401
    before = metrics(server)
    for stream in (False, True):
        body = {"prompt": "And Paul said " * 10, "max_tokens": 7, "temperature": 0, "stream": stream}
        assert post(server, "/v1/completions", body).status_code == 200
    after = metrics(server)
    changes = {name: after[name] - before.get(name, 0) for name in after if not name.endswith("_created")}
    assert changes["sx_gguf_prompt_tokens_total"] + changes["sx_gguf_cached_tokens_total"] == 2 * 140
    assert changes["sx_gguf_cached_tokens_total"] >= 100
    assert changes["sx_gguf_generated_tokens_total"] == 14
    assert changes["sx_gguf_answers_totallength"] == 2
    assert changes["sx_gguf_generate_seconds_total"] > 0
