"""Programs that know nothing of us: frameworks that construct a `Llama`, and clients of the server.

Those that are not installed (`pip install '.[integrations]'`) are skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import llama_cpp
import pytest
from pydantic import BaseModel, ConfigDict
from served import Served
from test_server_openai import TEMPLATE

import selfextend_gguf
from selfextend_gguf.errors import IgnoredArgumentWarning
from selfextend_gguf.integrations import in_place_of_llama_cpp
from selfextend_gguf.models import TINY_MODEL

PROMPT = "Once upon a time " * 30  # twice the trained context
ASKED = {"max_tokens": 8, "temperature": 0}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def expected() -> str:
    llm = selfextend_gguf.Llama(str(TINY_MODEL), n_ctx=1024, verbose=False)
    text = llm.create_completion(PROMPT, **ASKED)["choices"][0]["text"]
    llm.close()
    return text


# ---- frameworks ------------------------------------------------------------------------------------------------------


def test_llama_cpp_is_itself_again():
    plain = llama_cpp.Llama
    with pytest.raises(ZeroDivisionError), in_place_of_llama_cpp():
        assert llama_cpp.Llama is llama_cpp.llama.Llama is selfextend_gguf.Llama
        selfextend_gguf.Llama(str(TINY_MODEL), n_ctx=1024, verbose=False).close()
        raise ZeroDivisionError
    assert llama_cpp.Llama is llama_cpp.llama.Llama is plain


def test_modules_that_have_our_class_by_name_keep_it():
    namespace = ModuleType("namespace")
    namespace.Llama = selfextend_gguf.Llama
    sys.modules["namespace"] = namespace
    try:
        with in_place_of_llama_cpp():
            pass
        assert namespace.Llama is selfextend_gguf.Llama
    finally:
        del sys.modules["namespace"]


def test_legacy_arguments_are_ignored_with_a_warning():
    with pytest.warns(IgnoredArgumentWarning, match="no f16_kv, n_parts any more: ignored"):
        selfextend_gguf.Llama(str(TINY_MODEL), n_parts=-1, f16_kv=True, verbose=False).close()


def test_langchain(expected):
    module = pytest.importorskip("langchain_community.llms")
    with pytest.warns(IgnoredArgumentWarning), in_place_of_llama_cpp():
        llm = module.LlamaCpp(model_path=str(TINY_MODEL), n_ctx=1024, verbose=False, **ASKED)
    assert type(llm.client) is selfextend_gguf.Llama
    assert llm.client.self_extend.n_ctx == 1024
    assert llm.invoke(PROMPT) == expected
    assert "".join(llm.stream(PROMPT)) == expected
    assert llm.get_num_tokens("abc") == 3


def test_langchain_chat():
    module = pytest.importorskip("langchain_community.chat_models")
    with pytest.warns(IgnoredArgumentWarning), in_place_of_llama_cpp():
        chat = module.ChatLlamaCpp(model_path=str(TINY_MODEL), n_ctx=1024, verbose=False, **ASKED)
    assert type(chat.client) is selfextend_gguf.Llama
    assert len(chat.invoke("hello").content) == 8
    assert chat.invoke(PROMPT).response_metadata["finish_reason"] == "length"


def test_llama_index(expected):
    pytest.importorskip("llama_index.llms.llama_cpp")
    with in_place_of_llama_cpp():
        from llama_index.llms.llama_cpp import LlamaCPP

        llm = LlamaCPP(
            model_path=str(TINY_MODEL), context_window=1024, max_new_tokens=8, temperature=0.0, verbose=False
        )
    assert type(llm._model) is selfextend_gguf.Llama
    assert llm.metadata.context_window == 1024
    assert llm.complete(PROMPT, formatted=True).text == expected
    assert "".join(r.delta for r in llm.stream_complete(PROMPT, formatted=True)) == expected


# ---- clients of the server -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Served]:
    template = tmp_path_factory.mktemp("server") / "chat.jinja"
    template.write_text(TEMPLATE)
    served = Served(str(TINY_MODEL), "--ctx", "1024", "-t", "1", "--chat-template", str(template))
    yield served
    assert served.end()[0] == 0


@pytest.fixture
def model(server) -> str:
    return server.client().models.list().data[0].id


def test_langchain_openai(server, model, expected):
    module = pytest.importorskip("langchain_openai")
    where = {"base_url": f"{server.url}/v1", "api_key": "none", "model": model}
    llm = module.OpenAI(**where, **ASKED)
    assert llm.invoke(PROMPT) == "".join(llm.stream(PROMPT)) == expected
    chat = module.ChatOpenAI(**where, **ASKED)
    answer = chat.invoke("hello")
    assert answer.content == "".join(chunk.content for chunk in chat.stream("hello"))
    assert answer.usage_metadata["output_tokens"] == 8

    class Weather(BaseModel):
        hot: bool

    chat = module.ChatOpenAI(**where, max_tokens=40)
    assert isinstance(chat.with_structured_output(Weather, method="json_schema").invoke("hello").hot, bool)


def test_litellm(server, model, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would be fetched
    module = pytest.importorskip("litellm")
    where = {"model": f"openai/{model}", "base_url": f"{server.url}/v1", "api_key": "none", **ASKED}
    messages = [{"role": "user", "content": "hello"}]
    answer = module.completion(messages=messages, **where).choices[0].message.content
    streamed = module.completion(messages=messages, stream=True, **where)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == answer
    assert len(answer) == 8


def test_instructor(server, model):
    module = pytest.importorskip("instructor")

    class City(BaseModel):
        model_config = ConfigDict(extra="forbid")  # else the model may invent keys without end

        is_old: bool

    for mode in (module.Mode.JSON_SCHEMA, module.Mode.TOOLS):
        client = module.from_openai(server.client(), mode=mode)
        found = client.chat.completions.create(
            model=model, response_model=City, messages=[{"role": "user", "content": "Rome"}], temperature=0
        )
        assert isinstance(found, City)


def test_llm_with_an_endpoint_of_openai(server, model, tmp_path):
    pytest.importorskip("llm")
    program = str(Path(sys.executable).with_name("llm"))
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  model_name: {model}\n  api_base: {server.url}/v1\n  api_key_name: none\n"
    )
    command = [program, "-m", "ours", "--no-log", "--key", "none", "-o", "max_tokens", "8", "hello"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={"LLM_USER_PATH": str(tmp_path), "PATH": str(Path(program).parent), "HOME": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.rstrip("\n")) >= 1


# ---- llm's models ----------------------------------------------------------------------------------------------------


def llm_program(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`llm` in a folder that holds the bundled model."""
    pytest.importorskip("llm")
    program = Path(sys.executable).with_name("llm")
    if not (tmp_path / "tiny.gguf").exists():
        (tmp_path / "tiny.gguf").symlink_to(TINY_MODEL)
    return subprocess.run(
        [program, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={"LLM_USER_PATH": str(tmp_path / "llm"), "PATH": str(program.parent), "HOME": str(tmp_path)},
    )


def test_llm_lists_the_models_of_the_folder_and_the_stores(tmp_path):
    repository = tmp_path / ".cache/huggingface/hub/models--user--tiny"
    snapshot = repository / "snapshots/0123/tiny-Q8_0.gguf"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(TINY_MODEL)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123")
    done = llm_program(tmp_path, "models")
    ours = [line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("SelfExtendModel")]
    assert ours == ["sx", "sx-tiny.gguf", "sx-hf:user/tiny:Q8_0"]


def test_llm_answers_beyond_the_trained_context(tmp_path, expected):
    (tmp_path / "text.html").write_text(f"<p>{PROMPT}</p>")
    asked = ("-o", "max_tokens", "8", "-o", "temperature", "0", "-o", "ctx", "1024")
    done = llm_program(tmp_path, "-m", "sx-tiny.gguf", "--no-log", "--usage", *asked, PROMPT)
    assert (done.returncode, done.stdout) == (0, expected + "\n")
    assert "510 input, 8 output" in done.stderr
    named = llm_program(tmp_path, "-m", "sx", "-o", "model", "tiny.gguf", "--no-log", *asked, PROMPT)
    assert named.stdout == done.stdout
    of_file = llm_program(tmp_path, "-m", "sx-tiny.gguf", "--no-log", "--usage", *asked, "-f", "sx:text.html")
    assert "509 input, 8 output" in of_file.stderr


def test_llm_reads_a_conversation_once(tmp_path):
    module = pytest.importorskip("llm")
    from selfextend_gguf.llm_plugin import SelfExtendModel

    model = SelfExtendModel(str(TINY_MODEL))
    talk = model.conversation()
    options = {"temperature": 0, "max_tokens": 8}
    first = talk.prompt(PROMPT, **options)
    first.text()
    second = talk.prompt(" and then", **options)
    second.text()
    assert second.usage().input > 510
    assert second.usage().details["cached_tokens"] >= 510
    text = model.prompt("x", schema={"type": "object", "properties": {"n": {"enum": [3]}}, "required": ["n"],
                        "additionalProperties": False}).text()  # fmt: skip
    assert json.loads(text) == {"n": 3}
    with pytest.raises(module.ModelError, match="which model"):
        SelfExtendModel(None).prompt("x").text()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["-m", "sx", "x"], "which model? give one"),
        (["-m", "sx", "-o", "model", "nothing.gguf", "x"], "nothing.gguf"),
        (["-m", "sx-tiny.gguf", "-o", "ctx", "0", "x"], "ctx"),
        (["-m", "sx-tiny.gguf", "-o", "ctx", "256", "x" * 300], "exceed context window of 256"),
        (["-m", "sx-tiny.gguf", "-f", "sx:nothing.pdf", "x"], "nothing.pdf"),
    ],
    ids=["no name", "no file", "no context", "too long", "no document"],
)
def test_llm_says_what_is_wrong(tmp_path, arguments, error):
    done = llm_program(tmp_path, "--no-log", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert error in done.stderr
    assert "Traceback" not in done.stderr


# ---- lm-evaluation-harness -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> tuple[Path, list[tuple[str, str]]]:
    """A task in files of its own: which word goes on with a text longer than the trained context."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("task")
    context = "And it came to pass in those days, that there went out a decree. " * 6 + "And the king said unto"
    pairs = [(context, word) for word in (" them", " zebra")]
    rows = [{"context": context, "choices": [word for _, word in pairs], "answer": 0}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "word.yaml").write_text(
        "task: word\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
        'doc_to_text: "{{context}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\ntarget_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n"
    )
    return folder, pairs


@pytest.mark.parametrize("backend", ["gguf", "local-completions"])
def test_lm_evaluation_harness(server, model, scored, backend, monkeypatch):
    """Its scores are the model's own, and it evaluates a task."""
    folder, pairs = scored
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    where = f"{server.url}/v1/completions" if backend == "local-completions" else server.url
    lm = get_model(backend).create_from_arg_string(f"base_url={where},model={model},max_length=1024")
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    got = [score for score, _ in lm.loglikelihood(asked)]
    llm = selfextend_gguf.Llama(str(TINY_MODEL), n_ctx=1024, logits_all=True, verbose=False)
    for (context, word), score in zip(pairs, got, strict=True):
        told = llm(context + word, max_tokens=1, echo=True, logprobs=1)["choices"][0]["logprobs"]
        assert score == pytest.approx(sum(told["token_logprobs"][-1 - len(word) : -1]), abs=1e-3)
    llm.close()
    assert got[0] > got[1]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(lm, tasks=["word"], task_manager=manager, bootstrap_iters=0)
    assert results["results"]["word"]["acc,none"] == 1
