"""`Llama` as a drop-in for `llama_cpp.Llama`: every way of using it, beyond the trained context."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import pickle
import subprocess
import sys

import llama_cpp
import numpy as np
import pytest
from helpers import F16, F32, random_tokens, relative_error, write_adapter
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from selfextend_gguf import Llama, SelfExtendError
from selfextend_gguf._native import schedule_step
from selfextend_gguf.drafting import PromptLookup
from selfextend_gguf.errors import (
    ConfigError,
    ContextFullError,
    ForeignPromptCacheError,
    StateError,
    UnsupportedModelError,
)
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.models import TINY_MODEL

LONG = 1500  # tokens; the bundled model is trained on 256


@pytest.fixture(scope="module")
def llm():
    return Llama(str(TINY_MODEL), n_ctx=2048, verbose=False)


@pytest.fixture(scope="module")
def long_prompt(heldout_text):
    return heldout_text[:LONG]


def test_it_is_a_llama_with_all_its_arguments():
    assert issubclass(Llama, llama_cpp.Llama)
    parameters = inspect.signature(Llama.__init__).parameters
    for name in ("group_size", "neighbor_window", "max_distance", "block_size", "schedule"):
        assert parameters[name].default is None


@pytest.mark.parametrize("cache", [F16, F32])
@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("n_ctx", [256, 1024, 4096])
def test_within_the_trained_context_logits_equal_plain_llama_cpp_bit_for_bit(cache, flash_attn, n_ctx, heldout_text):
    tokens = list(heldout_text[:256].encode())
    arguments = {"n_ctx": n_ctx, "flash_attn": flash_attn, "logits_all": True, "verbose": False, **cache}
    ours, plain = Llama(str(TINY_MODEL), **arguments), llama_cpp.Llama(str(TINY_MODEL), **arguments)
    for begin, end in ((0, 100), (100, 101), (101, 256)):
        ours.eval(tokens[begin:end])
        plain.eval(tokens[begin:end])
    assert np.array_equal(ours.scores[:256], plain.scores[:256])
    assert (ours.self_extend is None) == (n_ctx <= 256)
    assert np.array_equal(ours.key_positions, np.arange(256))


def test_completion_and_stream_agree(llm, long_prompt):
    whole = llm.create_completion(long_prompt, max_tokens=24, temperature=0)
    assert whole["usage"] == {"prompt_tokens": LONG, "completion_tokens": 24, "total_tokens": LONG + 24}
    pieces = llm.create_completion(long_prompt, max_tokens=24, temperature=0, stream=True)
    assert "".join(p["choices"][0]["text"] for p in pieces) == whole["choices"][0]["text"]
    assert llm(long_prompt, max_tokens=24, temperature=0)["choices"][0]["text"] == whole["choices"][0]["text"]


def test_generate_yields_the_same_tokens(llm, long_prompt):
    tokens = llm.tokenize(long_prompt.encode(), add_bos=False)
    generated = []
    for token in llm.generate(tokens, temp=0.0):
        generated.append(token)
        if len(generated) == 24:
            break
    wanted = llm.create_completion(long_prompt, max_tokens=24, temperature=0)["choices"][0]["text"]
    assert llm.detokenize(generated).decode() == wanted


def test_chat_completion(llm, long_prompt):
    answer = llm.create_chat_completion(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": long_prompt}],
        max_tokens=8,
        temperature=0,
    )
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["prompt_tokens"] > LONG
    stream = llm.create_chat_completion(
        [{"role": "user", "content": long_prompt}], max_tokens=8, temperature=0, stream=True
    )
    assert sum(1 for _ in stream) > 1


def test_grammar_and_json_schema(llm, long_prompt):
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
    answer = llm.create_completion(long_prompt, max_tokens=8, grammar=grammar, temperature=0)
    assert answer["choices"][0]["text"] in ("yes", "no")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    answer = llm.create_chat_completion(
        [{"role": "user", "content": long_prompt}],
        response_format={"type": "json_object", "schema": schema},
        max_tokens=200,
        temperature=0,
    )
    content = answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "length" or isinstance(json.loads(content)["n"], int)
    assert content.lstrip().startswith("{")


def test_logprobs(long_prompt):
    llm = Llama(str(TINY_MODEL), n_ctx=2048, logits_all=True, verbose=False)
    answer = llm.create_completion(long_prompt, max_tokens=5, logprobs=3, temperature=0)
    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 5
    assert all(
        max(top.values()) == pytest.approx(p)
        for top, p in zip(logprobs["top_logprobs"], logprobs["token_logprobs"], strict=True)
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("as_tokens", [False, True])
def test_logprobs_are_plain_numbers_of_the_right_tokens(stream, echo, as_tokens, long_prompt):
    llm = Llama(str(TINY_MODEL), n_ctx=1024, logits_all=True, verbose=False)
    prompt = long_prompt[:300]  # beyond the trained context; tokens are bytes
    answer = llm.create_completion(
        list(prompt.encode()) if as_tokens else prompt,
        max_tokens=6,
        logprobs=2,
        echo=echo,
        stream=stream,
        temperature=0,
    )
    choices = [part["choices"][0] for part in json.loads(json.dumps(list(answer) if stream else [answer]))]
    text = "".join(choice["text"] for choice in choices)
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    found = {key: [value for part in logprobs for value in part[key]] for key in logprobs[0]}

    tokens = list((text if echo else prompt + text).encode())
    assert len(tokens) == 300 + 6
    fresh = Llama(str(TINY_MODEL), n_ctx=1024, logits_all=True, verbose=False)
    fresh.eval(tokens)
    logits = fresh.scores[: len(tokens)].astype(np.float64)
    of_next = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    begin = 0 if echo else 300
    wanted = [None, *(of_next[i - 1, tokens[i]] for i in range(1, len(tokens)))][begin:]
    assert "".join(found["tokens"]) == text
    assert found["token_logprobs"][1:] == pytest.approx(wanted[1:], abs=0.01)
    assert found["token_logprobs"][0] == (None if echo else pytest.approx(wanted[0], abs=0.01))
    for i, top in list(enumerate(found["top_logprobs"], begin))[1:]:
        assert max(top.values()) == pytest.approx(of_next[i - 1].max(), abs=0.01)
    if not (stream and as_tokens):  # where llama_cpp counts tokens
        assert found["text_offset"] == list(range(begin, 306))


def test_logprobs_of_a_restored_prompt(tmp_path):
    """A prompt cache holds no logits: with `echo` the text is read again."""
    llm = Llama(str(TINY_MODEL), n_ctx=512, logits_all=True, verbose=False)
    ask = {"prompt": "In the beginning", "max_tokens": 2, "logprobs": 1, "echo": True, "temperature": 0}
    wanted = llm.create_completion(**ask)["choices"][0]["logprobs"]
    llm.save_prompt(tmp_path / "prompt.kv")
    other = Llama(str(TINY_MODEL), n_ctx=512, logits_all=True, verbose=False)
    other.load_prompt(tmp_path / "prompt.kv")
    found = other.create_completion(**ask)["choices"][0]["logprobs"]
    assert found["token_logprobs"] == pytest.approx(wanted["token_logprobs"], abs=1e-3)


def test_logprobs_of_an_answer_to_messages():
    llm = Llama(str(TINY_MODEL), n_ctx=512, logits_all=True, verbose=False)
    answer = llm.create_chat_completion([{"role": "user", "content": "a"}], max_tokens=3, logprobs=True)
    tokens = json.loads(json.dumps(answer))["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == answer["choices"][0]["message"]["content"]
    assert all(token["logprob"] < 0 for token in tokens)


def test_a_bias_and_a_processor_together():
    """llama_cpp loses both."""
    llm = Llama(str(TINY_MODEL), n_ctx=256, verbose=False)
    twice = llama_cpp.LogitsProcessorList([lambda ids, scores: scores * 0])
    answer = llm.create_completion("a", max_tokens=3, logits_processor=twice, logit_bias={"65": 50.0})
    assert answer["choices"][0]["text"] == "AAA"


def test_a_sampler_does_not_outlive_its_generation():
    """It would choose for whoever samples next."""
    llm = Llama(str(TINY_MODEL), n_ctx=256, verbose=False)
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "~"')
    llm.create_completion("ab", max_tokens=4, grammar=grammar)
    llm.eval([ord("c")])
    assert llm.sample(temp=0) != ord("~")


@pytest.mark.parametrize("draft", [LlamaPromptLookupDecoding(num_pred_tokens=8), PromptLookup()], ids=type)
def test_draft_model_gives_the_same_text(llm, long_prompt, draft):
    """Speculative decoding rolls back rejected tokens, also across a rewrite."""
    wanted = llm.create_completion(long_prompt, max_tokens=120, temperature=0)["choices"][0]["text"]
    drafting = Llama(str(TINY_MODEL), n_ctx=2048, draft_model=draft, verbose=False)
    assert drafting.create_completion(long_prompt, max_tokens=120, temperature=0)["choices"][0]["text"] == wanted


def test_only_guesses_and_what_they_follow_have_logits():
    """Not all tokens of the prompt, which would take time and memory."""
    llm = Llama(str(TINY_MODEL), n_ctx=256, draft_model=lambda ids: ids[-3:], verbose=False)
    steps = llm.generate(llm.tokenize(b"abcabcabcabc"), temp=0)
    next(steps)
    assert llm._n_logits == 1
    next(steps)
    assert llm._n_logits in (1, 4)  # the first guess may have been cut at the end of a step


def test_scores_are_not_kept_for_the_whole_context(llm):
    assert llm.scores.shape[0] <= llm.n_batch


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"n_ctx": 256}, llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO),
        ({"n_ctx": 512}, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED),  # steps of 64 on the CPU
        ({"n_ctx": 512, "flash_attn": True}, llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED),
        ({"n_ctx": 256, "flash_attn": False}, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED),
        ({"n_ctx": 256, **F32}, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED),
        ({"n_ctx": 512, "type_v": llama_cpp.GGML_TYPE_Q8_0}, llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO),
    ],
)
def test_flash_attention_is_automatic(arguments, wanted):
    assert Llama(str(TINY_MODEL), verbose=False, **arguments).context_params.flash_attn_type == wanted


def test_pickling_keeps_the_parameters():
    llm = Llama(str(TINY_MODEL), n_ctx=1024, group_size=50, neighbor_window=40, verbose=False)
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.self_extend == llm.self_extend
    assert copy.context_params.flash_attn_type == llm.context_params.flash_attn_type
    tokens = random_tokens(700)
    llm.eval(tokens)
    copy.eval(tokens)
    assert np.array_equal(copy.key_positions, llm.key_positions)


def test_progress_is_reported():
    llm = Llama(str(TINY_MODEL), n_ctx=1024, verbose=False)
    seen = []
    llm.progress = lambda done, total: seen.append((done, total))
    llm.eval(random_tokens(600))
    # 256 tokens within the trained context, then up to each move of the boundary, the rest last.
    done = [256]
    while done[-1] < 600:
        done.append(done[-1] + schedule_step(llm.self_extend, done[-1], 600 - done[-1]))
    assert seen == [(n, 600) for n in done]
    assert all(64 <= b - a < 80 for a, b in itertools.pairwise(done[1:-1]))  # at least a tile of 64


def test_rewrites_are_few():
    llm = Llama(str(TINY_MODEL), n_ctx=4096, verbose=False)
    llm.eval(random_tokens(4000))
    stats = llm.rewrite_stats
    assert 0 < stats.n_rows < 5 * 4000  # each key a few times, not once per step
    assert stats.seconds > 0


# ---- rollback ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["norm-32", "neox-64"])
def test_rollback_to_any_length_equals_a_fresh_run_without_reading_the_prefix_again(model, name):
    path = str(model(name))
    n = 900
    tokens = random_tokens(n)
    llm = Llama(path, n_ctx=1024, logits_all=True, verbose=False, **F32)
    fresh = Llama(path, n_ctx=1024, logits_all=True, verbose=False, **F32)
    rng = np.random.default_rng(0)
    llm.eval(tokens)
    decoded = []
    decode = llm._ctx.decode
    llm._ctx.decode = lambda batch: (decoded.append(batch.n_tokens()), decode(batch))
    for keep in [*rng.integers(1, n, 8).tolist(), 1, n - 1, 20]:
        more = random_tokens(60, seed=keep)
        decoded.clear()
        llm.n_tokens = keep
        llm.eval(more)
        assert sum(decoded) == 60
        fresh.reset()
        fresh.eval(tokens[:keep] + more)
        assert relative_error(llm.scores[keep : keep + 60], fresh.scores[keep : keep + 60]) < 1e-3
        assert np.array_equal(llm.key_positions, fresh.key_positions)
        # Back to the long text for the next round.
        llm.n_tokens = keep
        llm.eval(tokens[keep:])


def test_a_prompt_that_shares_a_prefix_is_not_read_again(llm, long_prompt):
    llm.reset()
    llm.create_completion(long_prompt, max_tokens=4, temperature=0)
    seen = []
    llm.progress = lambda done, total: seen.append(total)
    llm.create_completion(long_prompt[:1000] + "And Peter said", max_tokens=1, temperature=0)
    llm.progress = None
    assert seen[0] == len("And Peter said")


# ---- states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["norm-32", "neox-64"])
def test_a_state_restored_in_a_fresh_context_continues_alike(model, name):
    path = str(model(name))
    tokens, more = random_tokens(700), random_tokens(80, seed=1)
    first = Llama(path, n_ctx=1024, logits_all=True, verbose=False, **F32)
    first.eval(tokens)
    state = pickle.loads(pickle.dumps(first.save_state()))
    second = Llama(path, n_ctx=1024, logits_all=True, verbose=False, **F32)
    second.load_state(state)
    assert np.array_equal(second.key_positions, first.key_positions)
    first.eval(more)
    second.eval(more)
    assert relative_error(second.scores[700:780], first.scores[700:780]) < 1e-4
    # And after going back into the grouped part.
    for llm in (first, second):
        llm.n_tokens = 300
        llm.eval(more)
    assert relative_error(second.scores[300:380], first.scores[300:380]) < 1e-4


def test_a_state_of_plain_llama_cpp_can_be_continued(model):
    path, tokens = str(model("norm-32")), random_tokens(60)
    plain = llama_cpp.Llama(path, n_ctx=1024, logits_all=True, verbose=False, **F32)
    plain.eval(tokens)
    llm = Llama(path, n_ctx=1024, logits_all=True, verbose=False, **F32)
    llm.load_state(plain.save_state())
    llm.eval(random_tokens(300, seed=1))
    fresh = Llama(path, n_ctx=1024, logits_all=True, verbose=False, **F32)
    fresh.eval(tokens + random_tokens(300, seed=1))
    assert relative_error(llm.scores[60:360], fresh.scores[60:360]) < 1e-4


@pytest.mark.parametrize("damage", ["truncated", "garbage", "positions", "too long"])
def test_a_damaged_state_is_refused_and_leaves_an_empty_cache(damage):
    llm = Llama(str(TINY_MODEL), n_ctx=1024, verbose=False)
    llm.eval(random_tokens(500))
    state = llm.save_state()
    if damage == "truncated":
        state.llama_state = state.llama_state[:-100]
    elif damage == "garbage":
        state.llama_state = bytes(len(state.llama_state))
    elif damage == "positions":
        state.key_positions = state.key_positions[:-1]
    else:
        state.n_tokens = 5000
    with pytest.raises(StateError, match="cannot be restored"):
        llm.load_state(state)
    assert llm.n_tokens == 0
    llm.eval(random_tokens(500))  # still works


def test_grouped_keys_are_refused_by_a_context_within_the_trained_one():
    long = Llama(str(TINY_MODEL), n_ctx=1024, schedule="paper", verbose=False)
    long.eval(random_tokens(200))
    long.eval(random_tokens(20))  # beyond the window of 64 and a block, the paper groups
    short = Llama(str(TINY_MODEL), n_ctx=256, verbose=False)
    with pytest.raises(StateError, match="grouped keys"):
        short.load_state(long.save_state())


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantised_caches_roll_back_and_restore(kind):
    """Keys come back from a rollback or a saved state rounded once more, not otherwise."""
    tokens = random_tokens(900, seed=2)
    arguments = {"type_k": KV_TYPES[kind], "type_v": KV_TYPES[kind], "logits_all": True, "verbose": False}
    llm = Llama(str(TINY_MODEL), n_ctx=1024, **arguments)
    llm.eval(tokens)
    fresh = llm.scores[899].copy()
    llm.n_tokens = 300
    llm.eval(tokens[300:])
    assert relative_error(llm.scores[899], fresh) < {"q8_0": 0.05, "q4_0": 0.5}[kind]

    other = Llama(str(TINY_MODEL), n_ctx=1024, **arguments)
    other.load_state(llm.save_state())
    assert np.array_equal(other.key_positions, llm.key_positions)
    llm.eval(tokens[:90])
    other.eval(tokens[:90])
    assert np.array_equal(other.scores[900:990], llm.scores[900:990])


# ---- errors --------------------------------------------------------------------------------------------------


def test_unknown_arguments_are_an_error():
    for kind in (ConfigError, TypeError):
        with pytest.raises(kind, match="unknown argument: grp_attn_n"):
            Llama(str(TINY_MODEL), n_ctx=512, grp_attn_n=4)


def test_too_many_tokens_are_refused_before_anything_is_read():
    llm = Llama(str(TINY_MODEL), n_ctx=512, verbose=False)
    llm.eval(random_tokens(500))
    with pytest.raises(ContextFullError, match=r"Requested tokens \(600\) exceed context window of 512"):
        llm.eval(random_tokens(100))
    assert llm.n_tokens == 500
    with pytest.raises(ValueError, match=r"Requested tokens \(600\) exceed context window of 512"):
        llm.create_completion("x" * 600)


def test_an_adapter_is_used_and_counts_as_another_model(tmp_path):
    path = str(write_adapter(tmp_path / "adapter.gguf"))
    arguments = {"n_ctx": 256, "flash_attn": False, "logits_all": True, "verbose": False}
    tokens = random_tokens(60)
    plain, ours = (
        Llama(str(TINY_MODEL), **arguments),
        Llama(str(TINY_MODEL), **arguments, lora_path=path, lora_scale=2.0),
    )
    theirs = llama_cpp.Llama(str(TINY_MODEL), **arguments, lora_path=path, lora_scale=2.0)
    for llm in (plain, ours, theirs):
        llm.eval(tokens)
    assert np.array_equal(ours.scores[:60], theirs.scores[:60])
    assert relative_error(ours.scores[:60], plain.scores[:60]) > 0.1
    with pytest.raises(ForeignPromptCacheError, match="made by another model or with other settings"):
        plain.restore_prompt(ours.copy_prompt())
    long = Llama(str(TINY_MODEL), n_ctx=1024, verbose=False, lora_path=path)
    long.eval(random_tokens(700))
    assert long.rewrite_stats.n_rewrites > 0


def test_adapters_add_up(tmp_path):
    files = [str(write_adapter(tmp_path / f"{n}.gguf", seed=seed)) for n, seed in enumerate((0, 0, 1))]
    first, same, other = files
    arguments = {"n_ctx": 256, "flash_attn": False, "logits_all": True, "verbose": False}
    tokens = random_tokens(60)

    def logits(**adapters: object) -> np.ndarray:
        with contextlib.closing(Llama(str(TINY_MODEL), **arguments, **adapters)) as llm:
            llm.eval(tokens)
            return llm.scores[:60].copy()

    plain, twice = logits(), logits(lora_path=first, lora_scale=2.0)
    # B A x + B A x = 2 B A x, and B A x - B A x = 0
    assert relative_error(logits(adapters={first: 1, same: 1}), twice) < 1e-4
    assert relative_error(logits(lora_path=first, adapters={same: -1}), plain) < 1e-4
    both = logits(adapters={first: 2, other: 2})
    assert relative_error(both, twice) > 0.05
    assert relative_error(both, logits(adapters={other: 2})) > 0.05
    assert np.array_equal(both, logits(adapters={other: 2, first: 2}))

    llm = Llama(str(TINY_MODEL), **arguments, adapters={first: 2, other: 2})
    copy = pickle.loads(pickle.dumps(llm))
    copy.eval(tokens)
    assert np.array_equal(copy.scores[:60], both)
    llm.eval(tokens)
    with pytest.raises(ForeignPromptCacheError):
        Llama(str(TINY_MODEL), **arguments, adapters={first: 2}).restore_prompt(llm.copy_prompt())


def test_a_middle_part_cannot_be_removed():
    llm = Llama(str(TINY_MODEL), n_ctx=1024, verbose=False)
    llm.eval(random_tokens(500))
    with pytest.raises(SelfExtendError, match="middle"):
        llm._ctx.kv_cache_seq_rm(0, 100, 200)
    with pytest.raises(SelfExtendError, match="one sequence"):
        llm._ctx.kv_cache_seq_shift(0, 100, 200, 5)


def test_embeddings_beyond_the_trained_context_are_refused():
    with pytest.raises(UnsupportedModelError, match="n_ctx must be at most 256"):
        Llama(str(TINY_MODEL), n_ctx=1024, embedding=True, verbose=False)
    assert len(Llama(str(TINY_MODEL), n_ctx=256, embedding=True, verbose=False).embed("hello")) > 0


@pytest.mark.parametrize("first", ["import llama_cpp", "from selfextend_gguf import Llama"])
def test_one_copy_of_llama_cpp_is_loaded(first):
    """Whatever is imported first. Counted in the process's own list of mapped files."""
    if sys.platform == "darwin":
        count = (
            "d = ctypes.CDLL(None); d._dyld_get_image_name.restype = ctypes.c_char_p\n"
            "files = {d._dyld_get_image_name(i).decode() for i in range(d._dyld_image_count())}\n"
        )
    else:
        count = "files = {line.split()[-1] for line in open('/proc/self/maps') if '/' in line}\n"
    code = (
        f"{first}\nimport ctypes, llama_cpp\nfrom selfextend_gguf import Llama\n{count}"
        "for name in ('libllama.', 'libggml.', 'libggml-base.', 'libggml-cpu.', 'libselfextend.'):\n"
        "    print(name, sum(name in f for f in files))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [line.split()[1] for line in output.splitlines()] == ["1"] * 5


def test_another_llama_cpp_python_version_is_refused():
    from selfextend_gguf._native import check_version
    from selfextend_gguf.errors import NativeLibraryError

    check_version("0.3.36", "0.3.36")
    with pytest.raises(
        NativeLibraryError, match=r"compiled against llama-cpp-python 0\.3\.36, but 0\.3\.40 is installed"
    ):
        check_version("0.3.36", "0.3.40")
