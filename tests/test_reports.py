"""What users of llama.cpp and its bindings reported: wrong calls and wrong files are errors in one line.

What could end the process is tried in another one, many cases in each.
"""

from __future__ import annotations

import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import write_adapter
from processes import attempt

from selfextend_gguf import Llama
from selfextend_gguf.cli import main
from selfextend_gguf.errors import TextChangedError
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.tiny.model_file import LlamaShape, random_tensors, write_llama

MODEL = str(TINY_MODEL)

SETUP = f"""
import math, threading
import llama_cpp, numpy as np
from llama_cpp import LlamaGrammar, LogitsProcessorList
from selfextend_gguf import Llama, plan, schedule_positions
from selfextend_gguf._native import Engine, watch_interrupts
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.server.kept_prompts import KeptPrompts
nan, inf, huge = math.nan, math.inf, 10**20
BYTES = list(b"In the beginning")
def load(n_ctx=512, **arguments):
    return Llama({MODEL!r}, n_ctx=n_ctx, verbose=False, **arguments)
def complete(prompt="ab", **arguments):
    return load().create_completion(prompt, max_tokens=4, **arguments)
def processed(*processors):
    return complete(logits_processor=LogitsProcessorList(processors))
"""


def check(outcomes: dict[str, tuple[str, str]], wanted: dict[str, tuple[str, str]]) -> None:
    """Each raised an error of the class wanted, in one line that holds the words wanted."""
    for name, (kind, words) in wanted.items():
        found, message = outcomes.get(name, ("did not run", ""))
        assert found == kind, f"{name}: {found} {message}"
        assert words in message, f"{name}: {message}"
        assert "\n" not in message, f"{name}: {message}"


# ---- arguments of Llama ----------------------------------------------------------------------------------------

NO_NUMBER = "must be a whole number, not"
# Argument, value: words of the ConfigError. Each was taken for another value, ended the process, or raised what is no
# error of ours.
WRONG_ARGUMENTS = {
    "n_ctx=-1": "n_ctx must be between 0 and 1073741824, not -1",
    "n_ctx=huge": "n_ctx must be between 0 and",
    "n_ctx=10**5000": "not a number of more than 60 digits",
    "n_ctx=nan": "n_ctx must be a whole number, not nan",
    "n_ctx='512'": NO_NUMBER,
    "n_ctx=True": NO_NUMBER,
    "n_ctx=None": NO_NUMBER,
    "n_batch=0": "n_batch must be between 1 and",
    "n_batch=nan": NO_NUMBER,
    "n_batch=False": NO_NUMBER,
    "n_ubatch=-4": "n_ubatch must be between 0 and",
    "max_distance=huge": "max_distance must be between 8 and 256 (the model is trained on 256 tokens)",
    "max_distance=True": NO_NUMBER,
    "max_distance='100'": NO_NUMBER,
    "neighbor_window=-huge": "neighbor_window must be between 1 and",
    "neighbor_window=inf": NO_NUMBER,
    "block_size=nan": NO_NUMBER,
    "group_size=2.0": NO_NUMBER,
    "schedule=5": "unknown schedule 5; choose from selfextend",
    "n_threads=100000": "n_threads must be between 0 and 512, not 100000",  # a SIGSEGV
    "n_threads_batch=-5": "n_threads_batch must be between 0 and 512",
    "n_gpu_layers='all'": NO_NUMBER,
    "n_gpu_layers=huge": "n_gpu_layers must be between -1 and 2147483647",
    "main_gpu=-3": "main_gpu must be between -1 and",
    "split_mode=99": "split_mode must be between 0 and 3",
    "tensor_split=[1.0] * 1000": "tensor_split has 1000 parts; llama.cpp knows 16 devices at most",
    "tensor_split=[nan]": "tensor_split[0] must be a finite number",
    "tensor_split='0.5'": "tensor_split must be a list of numbers",
    "tensor_split=3": "tensor_split must be a list of numbers",
    "type_k=9999": "type_k must be a type that a cache can have (f32 = 0, ",  # GGML_ASSERT
    "type_k=4": "type_k must be a type that a cache can have",  # SIGFPE
    "type_k=14": "type_k must be a type that a cache can have",
    "type_v=28": "type_v must be a type that a cache can have",
    "type_v='q8_0'": NO_NUMBER,
    "rope_freq_base=nan": "rope_freq_base must be a finite number, not nan",
    "rope_freq_base=-1.0": "rope_freq_base must be at least 0",
    "rope_freq_scale=inf": "rope_freq_scale must be a finite number, not inf",
    "rope_freq_scale=1e300": "rope_freq_scale must be at least 0 and within C's range",
    "rope_scaling_type=77": "rope_scaling_type must be between -1 and 3",
    "rope_scaling_type='yarn'": NO_NUMBER,
    "yarn_ext_factor=nan": "yarn_ext_factor must be a finite number",
    "yarn_attn_factor='1'": "yarn_attn_factor must be a number, not '1'",
    "yarn_beta_slow=inf": "yarn_beta_slow must be a finite number",
    "yarn_orig_ctx=-5": "yarn_orig_ctx must be between 0 and",
    "pooling_type=99": "pooling_type must be between -1 and 4",
    "attention_type=99": "attention_type must be between -1 and 1",
    "seed=huge": "seed must be between -2147483648 and 4294967296",
    "seed='a'": NO_NUMBER,
    "last_n_tokens_size=-1": "last_n_tokens_size must be between 0 and",
    "numa=77": "numa must be between 0 and 4",
    "use_mmap='no'": "use_mmap must be True or False, not 'no'",
    "flash_attn='yes'": "flash_attn must be True or False",
    "chat_format='nope'": "unknown chat_format 'nope'; choose from llama-2,",
    "chat_format=5": "chat_format must be a text, not 5",
    "chat_handler='x'": "chat_handler must be callable",
    "draft_model='x'": "draft_model must be callable",
    "tokenizer='x'": "tokenizer.tokenize must be callable",
    "model_info='x'": "model_info must be a ModelInfo",
    "lora_path=5": "lora_path must be a path, not 5",
    "lora_scale=nan": "lora_scale must be a finite number",
    "adapters=5": "adapters must be a dictionary, not 5",
    "adapters={5: 1}": "a key of adapters must be a path, not 5",
    "adapters={'a': nan}": "adapters['a'] must be a finite number",
    "kv_overrides=[1]": "kv_overrides must be a dictionary, not [1]",
    "kv_overrides={5: 1}": "a key of kv_overrides must be a text, not 5",
    "kv_overrides={'a': None}": "kv_overrides['a'] must be a truth value, a number or a text, not None",
    "kv_overrides={'a' * 200: 1}": "a key of kv_overrides must have at most 127 bytes",
    "kv_overrides={'a': 'b' * 200}": "kv_overrides['a'] must have at most 127 bytes",
    "kv_overrides={'a': huge}": "kv_overrides['a'] must be between",
    "grp_attn_n=4": "",
}


def test_wrong_arguments():
    outcomes = attempt(SETUP, {argument: f"load({argument})" for argument in WRONG_ARGUMENTS})
    kinds = {"grp_attn_n=4": "UnknownArgumentError"}
    check(
        outcomes, {argument: (kinds.get(argument, "ConfigError"), words) for argument, words in WRONG_ARGUMENTS.items()}
    )


def test_whole_numbers_of_any_kind_are_taken():
    llm = Llama(MODEL, n_ctx=np.int64(512), n_batch=np.uint16(64), max_distance=np.int32(200), verbose=False)
    assert (llm.n_ctx(), llm.n_batch, llm.self_extend.max_distance) == (512, 64, 200)
    assert type(llm.self_extend.max_distance) is int


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"max_distance": 100000000000000000000}', "max_distance must be between 8 and 256"),
        ('{"max_distance": NaN}', "max_distance must be a whole number, not nan"),
        ('{"max_distance": 1e400}', "max_distance must be a whole number, not inf"),
        ('{"neighbor_window": -5}', "neighbor_window must be between 1 and"),
        ('{"neighbor_window": true}', "neighbor_window must be a whole number, not True"),
        ('{"block_size": "64"}', "block_size must be a whole number, not '64'"),
        ('{"group_size": 2.5}', "group_size must be a whole number, not 2.5"),
        ('{"group_size": [4]}', "group_size must be a whole number, not [4]"),
        ('{"schedule": 5}', "unknown schedule 5; choose from"),
        ('["group_size"]', "it holds no JSON object"),
        ("[" * 100000, "is no file that `sx-gguf tune` wrote"),
    ],
)
def test_numbers_of_a_config_file_are_those_of_the_command_line(content, words, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(content)
    result = CliRunner().invoke(main, ["run", MODEL, "hello", "-c", "1024", "--config", str(path)])
    assert result.exit_code in (1, 2)
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", [["eval", "passkey"], ["bench"], ["serve", "--port", "0"]])
def test_numbers_for_llama_cpps_own_class(command):
    result = CliRunner().invoke(main, [*command, MODEL, "-t", "100000"])
    assert (result.exit_code, result.stderr) == (1, "Error: n_threads must be between 0 and 512, not 100000\n")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--max-distance=100000000000000000000", "max_distance must be between 8 and 256"),
        ("--neighbor-window=-5", "neighbor_window must be between 1 and"),
        ("--threads=100000", "n_threads must be between 0 and 512"),
        ("--temp=nan", "temperature must be a finite number, not nan"),
        ("--repeat-penalty=0", "repeat_penalty must be at least 1e-06"),
        ("--top-k=100000000000", "top_k must be between"),
        ("--seed=100000000000000000000", "seed must be between"),
        ("--ctx=100000000000000000000", "n_ctx must be between"),
        ("--gpu-layers=-7", "n_gpu_layers must be between -1 and"),
    ],
)
def test_numbers_of_the_command_line(option, words):
    result = CliRunner().invoke(main, ["run", MODEL, "hello", "-n", "2", option])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {words}")
    assert result.stderr.count("\n") == 1


# ---- calls -----------------------------------------------------------------------------------------------------

NO_LOGITS = "there are no logits to sample from: evaluate a token first"
NO_TOKENS = "tokens must be a list of whole numbers"
WRONG_TEXTS = {
    "load().eval([-1])": "-1 is no token of the model (0 to 255)",
    "load(256).eval([5, 256])": "256 is no token of the model (0 to 255)",
    "load().eval([2**40])": "1099511627776 is no token of the model",
    "load().eval([2**70])": NO_TOKENS,
    "load().eval([1.5])": NO_TOKENS,
    "load().eval([True])": NO_TOKENS,
    "load().eval([[1, 2]])": NO_TOKENS,
    "load().eval([1, None])": NO_TOKENS,
    "load().eval('abc')": "tokens must be a list of whole numbers, not 'abc'",
    "load().eval(None)": NO_TOKENS,
    "load().detokenize([-1])": "-1 is no token of the model (0 to 255)",  # std::out_of_range
    "load().detokenize([10**6])": "1000000 is no token of the model",
    "next(load().generate([10**6]))": "1000000 is no token of the model",
    "g = load().generate(BYTES); next(g); g.send([10**6])": "1000000 is no token of the model",
    "load(draft_model=lambda _: np.array([10**6])).create_completion('ab', max_tokens=5)": "1000000 is no token",
    "complete([10**6])": "1000000 is no token of the model",
    "complete('\\ud800')": "prompt is not Unicode: half a character at position 0",
}
WRONG_CALLS = {
    "load().tokenize('abc')": "the text must be bytes, not 'abc'",
    # The length of the text
    "load().n_tokens = -1": "n_tokens must be between 0 and 0, the number of cached tokens, not -1",
    "load().n_tokens = 1": "n_tokens must be between 0 and 0",
    "load().n_tokens = 1.5": "n_tokens must be a whole number",
    "llm = load(256); llm.eval(BYTES); llm.n_tokens = 17": "n_tokens must be between 0 and 16",
    # Sampling
    "load(256).sample()": NO_LOGITS,
    "llm = load(); llm.eval(BYTES); llm.n_tokens = 5; llm.sample()": NO_LOGITS,
    "llm = load(); llm.eval(BYTES); llm.reset(); llm.sample()": NO_LOGITS,
    "llm = load(); llm.eval(BYTES); llm.restore_prompt(llm.copy_prompt()); llm.sample()": NO_LOGITS,
    "llm = load(); llm.eval(BYTES); llm.load_state(llm.save_state()); llm.sample()": NO_LOGITS,
    "llm = load(256); llm.eval(BYTES); llm.sample(idx=3)": "idx must be between 15 and 15, not 3",  # GGML_ASSERT
    "llm = load(); llm.eval(BYTES); llm.sample(idx=300)": "idx must be between 15 and 15, not 300",
    "complete(temperature=nan)": "temperature must be a finite number, not nan",
    "complete(temperature='a')": "temperature must be a number",
    "complete(top_k=2**32)": "top_k must be between",
    "complete(top_k=1.5)": "top_k must be a whole number",
    "complete(top_p=2.0)": "top_p must be between 0 and 1, not 2.0",
    "complete(min_p=nan)": "min_p must be a finite number",
    "complete(typical_p=-1.0)": "typical_p must be between 0 and 1",
    "complete(repeat_penalty=0.0)": "repeat_penalty must be at least 1e-06",
    "complete(presence_penalty=-inf)": "presence_penalty must be a finite number",
    "complete(mirostat_mode=9)": "mirostat_mode must be between 0 and 2",
    "complete(mirostat_mode=1, mirostat_tau=nan)": "mirostat_tau must be a finite number",
    "complete(seed=2**40)": "seed must be between",
    "load().set_seed('x')": "seed must be a whole number",
    # Completions
    "complete('')": "the prompt is empty, and the model has no BOS token to begin with",  # an AssertionError
    "complete([])": "the prompt is empty",
    "next(load().generate([]))": "the prompt is empty",
    "complete(None)": "prompt must be a text or a list of tokens, not None",
    "complete(b'ab')": "prompt must be a text or a list of tokens, not b'ab'",
    "complete(stop=5)": "stop must be a text or a list of texts, not 5",
    "complete(stop=[5])": "stop must be a text, not 5",
    "complete(logprobs=-1)": "logprobs must be at least 0, not -1",
    "complete(logprobs=1)": "logprobs need the logits of all tokens: give logits_all=True",
    "load().create_completion('ab', max_tokens=nan)": "max_tokens must be a whole number",
    "complete(logit_bias={10**6: 1.0})": "a token of logit_bias must be between 0 and 255, not 1000000",
    "complete(logit_bias={-5: 1.0})": "a token of logit_bias must be between 0 and 255, not -5",
    "complete(logit_bias={'a': 1.0})": "a token of logit_bias must be a whole number, not 'a'",
    "complete(logit_bias={65: nan})": "logit_bias[65] must be a finite number",
    "complete(logit_bias=[1])": "logit_bias must be a dictionary",
    "processed(5)": "a logits processor must be callable",
    "processed(lambda ids, scores: scores[:5])": "a logits processor returned the shape (5,), not (256,)",
    "processed(lambda ids, scores: scores * nan)": "the logits processors leave no token to choose",
    "processed(lambda ids, scores: scores * 0 - inf)": "the logits processors leave no token to choose",
    "load().set_cache('x')": "cache must be one of llama_cpp's caches, not 'x'",
    "load().create_chat_completion(None)": "messages must be a list, not None",
    "load().create_chat_completion(['a'])": "message 1 must be a dictionary with a role, not 'a'",
    "load().create_chat_completion([{'content': 'a'}])": "message 1 must be a dictionary with a role",
    "load().create_chat_completion([{'role': 'user'}])": "message 1 has no content",
    # Embeddings
    "load().embed('a')": "the model was not loaded for embeddings: give embedding=True to Llama",
    "load(256, embedding=True).embed('')": "a text without tokens cannot be evaluated",  # wrote outside of the batch
    "load(256, embedding=True, pooling_type=1).embed(['abc', ''])": "a text without tokens cannot be evaluated",
    "load(256, embedding=True).embed([])": "input must be a text or a list of texts, not []",
    "load(256, embedding=True).embed(5)": "input must be a text or a list of texts, not 5",
    "load(vocab_only=True, embedding=True).embed('a')": "the model was not loaded for embeddings",  # GGML_ASSERT
    # Files, schedules
    "load().load_prompt(None)": "path must be a path, not None",
    "load().save_prompt(5)": "path must be a path, not 5",
    "Llama(None)": "model_path must be a path, not None",
    "Llama('a\\0b')": "model_path must be a path",
    "ModelInfo(5)": "path must be a path, not 5",
    "schedule_positions(plan(256, 1024), nan, 5)": "n_cached must be a whole number, not nan",
    "schedule_positions('x', 4, 5)": "config must be what `plan` returns, not 'x'",
    "Engine(2**40)": "n_ctx must be between 1 and",
}
OTHER_KINDS = {
    "complete(grammar='root ::= [a]')": ("GrammarError", "grammar must be made by LlamaGrammar.from_string"),
    "complete(unknown=1)": ("UnknownArgumentError", "create_completion: got an unexpected keyword argument 'unknown'"),
    "load(256, embedding=True, pooling_type=4).embed('a')": ("UnsupportedModelError", "the model ranks texts"),
    "load(512, attention_type=1)": ("UnsupportedModelError", "attention in both directions"),
    "load(vocab_only=True).eval([1])": (
        "UnsupportedModelError",
        "was loaded with vocab_only=True: it cannot read a text",
    ),
    "load(vocab_only=True).copy_prompt()": ("UnsupportedModelError", "was loaded with vocab_only=True"),
    "load().load_state(None)": ("StateError", "the saved state cannot be restored: None is none"),
    "load().restore_prompt(None)": ("PromptCacheError", "None is no copy of a prompt"),
    "Engine(512).attach(None)": ("EngineError", "there is no context"),
    "watch_interrupts(None)": ("EngineError", "there is no context"),
    "load(kv_overrides={'llama.context_length': 'abc'})": ("ModelFileError", "which is no number of the right kind"),
    "load(kv_overrides={'llama.attention.layer_norm_rms_epsilon': -1.0})": (
        "ModelFileError",
        "layer_norm_rms_epsilon = -1.0, which must not be negative",
    ),
}


def test_wrong_calls():
    wanted = {call: ("ConfigError", words) for call, words in WRONG_CALLS.items()} | OTHER_KINDS
    wanted |= {call: ("TextError", words) for call, words in WRONG_TEXTS.items()}
    check(attempt(SETUP, {call: call for call in wanted}), wanted)


RIGHT_CALLS = [
    "load(256, attention_type=1, n_batch=256, n_ubatch=64).eval([5] * 200)",  # GGML_ASSERT: tokens computed apart
    "load(256, embedding=True, pooling_type=1, n_batch=256, n_ubatch=64).embed('a' * 200)",
    "llm = load(); llm.n_batch = 10**6; llm.eval([5] * 300)",  # written outside of the batch
    "load(256, n_batch=4, draft_model=lambda ids: ids[-40:]).create_completion('ab' * 20, max_tokens=20)",
    "llm = load(logits_all=True, n_batch=16); llm.eval(BYTES); llm.sample(idx=3)",
    "complete(stop=[''])",
    "complete(logit_bias={'65': -inf, 66: 2})",
    "load(type_k=20, type_v=20).eval(BYTES)",  # iq4_nl
]


def test_calls_that_ended_the_process_and_are_right():
    outcomes = attempt(SETUP, {call: call for call in RIGHT_CALLS})
    assert outcomes == dict.fromkeys(RIGHT_CALLS, ("passed", ""))


def test_what_a_processor_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        Llama(MODEL, n_ctx=256, verbose=False).create_completion("ab", logits_processor=[lambda ids, scores: 1 / 0])


# ---- adapters --------------------------------------------------------------------------------------------------


def test_adapters_that_are_none(tmp_path):
    """llama_cpp takes a null pointer for an adapter."""
    files = {
        "missing": (str(tmp_path / "missing.gguf"), "does not exist"),
        "folder": (str(tmp_path), "is a directory, not a GGUF file"),
        "empty": (str(tmp_path / "empty.gguf"), "is empty"),
        "junk": (str(tmp_path / "junk.gguf"), "is no LoRA adapter for this model"),
        "text": (str(tmp_path / "text.gguf"), "is not a GGUF file"),
        "model": (MODEL, "is no LoRA adapter for this model: failed to apply lora adapter: expect general.type"),
        "arch": (str(write_adapter(tmp_path / "arch.gguf", arch="qwen2")), "model arch and LoRA arch mismatch"),
        "shape": (str(write_adapter(tmp_path / "shape.gguf", n_in=100)), "has incorrect shape"),
        "tensor": (
            str(write_adapter(tmp_path / "tensor.gguf", tensor="blk.99.x.weight")),
            "does not exist in base model",
        ),
    }
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    (tmp_path / "text.gguf").write_text("a text")
    outcomes = attempt(SETUP, {name: f"load(lora_path={path!r})" for name, (path, _) in files.items()})
    check(outcomes, {name: ("ModelFileError", words) for name, (_, words) in files.items()})


# ---- after close -----------------------------------------------------------------------------------------------

AFTER_CLOSE = [
    "llm.eval([1])",
    "llm.tokenize(b'abc')",
    "llm.tokenizer().tokenize(b'abc')",
    "llm.tokenizer_.tokenize(b'abc')",
    "llm.create_completion('ab')",
    "list(llm.create_completion('ab', stream=True))",
    "llm.create_chat_completion([{'role': 'user', 'content': 'a'}])",
    "llm('ab')",
    "next(llm.generate([1, 2]))",
    "next(running)",
    "llm.reset()",
    "llm.save_state()",
    "llm.load_state(state)",
    "llm.save_prompt(file)",
    "llm.load_prompt(file)",
    "llm.copy_prompt()",
    "llm.restore_prompt(copy)",
    "llm.n_ctx()",
    "llm.n_embd()",
    "llm.n_vocab()",
    "llm.token_eos()",
    "llm.pooling_type()",
    "llm.ctx",
    "llm.model",
    "llm._model.metadata()",
    "llm._ctx.kv_cache_clear()",
    "llm._ctx.get_logits()",
    "llm._batch.reset()",
    "watch_interrupts(llm.ctx)",
    "info.tokenizer.tokens('abc')",
    "info.model.tokenize(b'abc', False, True)",
    "info.rope",
    "info.has_sliding_windows",
    "engine.n_tokens",
    "engine.key_positions",
    "engine.stats",
]
WITH_SELF_EXTEND = [
    "llm.key_positions",
    "llm.rewrite_stats",
    "llm.saved_prompt()",
    "KeptPrompts(10**8).prepare(llm, [9] * 100)",
]


@pytest.mark.parametrize("n_ctx", [256, 512])
def test_after_close_everything_says_so(n_ctx, tmp_path):
    opened = f"""
file = {str(tmp_path / "prompt.kv")!r}
llm, info, engine = load({n_ctx}, chat_format="chatml"), ModelInfo({MODEL!r}), Engine(100)
llm.eval(BYTES)
state, copy = llm.save_state(), llm.copy_prompt()
llm.save_prompt(file)
running = llm.generate(BYTES, grammar=LlamaGrammar.from_string("root ::= [a-z ]+"))
next(running)
for owner in (llm, info, engine, llm, info, engine):
    owner.close()
"""
    calls = AFTER_CLOSE + WITH_SELF_EXTEND * (n_ctx > 256)
    outcomes = attempt(SETUP + opened, {call: call for call in calls})
    check(outcomes, dict.fromkeys(calls, ("ClosedError", "the model is closed")))


# ---- several threads -------------------------------------------------------------------------------------------

THREADS = {
    "completions": """
def answer(llm, i):
    return llm.create_completion(f"hello {i}", max_tokens=12, temperature=0)["choices"][0]["text"]
for n_ctx in (256, 512):
    llm = load(n_ctx)
    wanted, found = [answer(llm, i) for i in range(3)], {}
    def work(i):
        found[i] = [answer(llm, i) for _ in range(5)]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert found == {i: [wanted[i]] * 5 for i in range(3)}, found
""",
    "embeddings": """
llm = load(256, embedding=True, pooling_type=1)
wanted, found = llm.embed(["abc", "defg"]), []
threads = [threading.Thread(target=lambda: found.append(llm.embed(["abc", "defg"]))) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
assert found == [wanted] * 4
""",
    "close": """
llm, errors, begun = load(), [], threading.Event()
llm.progress = lambda *_: begun.set()
def work():
    try:
        while True:
            llm.create_completion("ab", max_tokens=30)
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
thread = threading.Thread(target=work)
thread.start()
begun.wait()
llm.close()
thread.join()
assert errors == ["ClosedError: the model is closed"], errors
""",
    "close in a callback": """
llm = load()
llm.progress = lambda *_: llm.close()
llm.eval([5] * 300)
""",
}


def test_threads_wait_for_each_other():
    """It was a GGML_ASSERT, a wrong answer or a process that hung."""
    outcomes = attempt(SETUP, THREADS)
    wanted = ("ClosedError", "the model is closed")
    assert outcomes == {**dict.fromkeys(THREADS, ("passed", "")), "close in a callback": wanted}


def test_a_generator_notices_that_its_text_was_changed():
    llm = Llama(MODEL, n_ctx=512, verbose=False)
    first, second = llm.generate(list(b"In the beginning")), llm.generate(list(b"And it came"))
    next(first), next(second)
    with pytest.raises(TextChangedError, match="another call has changed the text"):
        next(first)
    assert isinstance(next(second), int)
    stream = llm.create_completion("In the beginning", max_tokens=9, stream=True)
    next(stream)
    llm.n_tokens -= 1
    with pytest.raises(TextChangedError):
        next(stream)


def test_an_abandoned_generator_keeps_nobody_waiting():
    """Neither in this thread nor in another, where a lock that a generator holds could never be taken."""
    llm = Llama(MODEL, n_ctx=512, verbose=False)
    abandoned = llm.create_completion("In the beginning", max_tokens=9, stream=True)
    next(abandoned)
    wanted = llm.create_completion("And it came", max_tokens=3, temperature=0)["choices"][0]["text"]
    answers = []

    def ask() -> None:
        answers.append(llm.create_completion("And it came", max_tokens=3, temperature=0)["choices"][0]["text"])

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(60)
    assert answers == [wanted]


def test_a_stream_can_be_read_in_several_threads():
    """As web servers do it: each piece in whichever thread is free."""
    llm = Llama(MODEL, n_ctx=512, verbose=False)
    wanted = llm.create_completion("In the beginning", max_tokens=9, temperature=0)["choices"][0]["text"]
    stream, pieces = llm.create_completion("In the beginning", max_tokens=9, temperature=0, stream=True), []
    for _ in range(11):
        thread = threading.Thread(target=lambda: pieces.extend([next(stream, None)]))
        thread.start()
        thread.join(60)
    assert "".join(piece["choices"][0]["text"] for piece in pieces if piece) == wanted


# ---- split models ----------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A model in three parts."""
    usual = gguf.GGUFWriter
    monkeypatch.setattr(gguf, "GGUFWriter", lambda path, arch: usual(path, arch, split_max_tensors=8))
    shape = LlamaShape(n_layer=2)
    write_llama(tmp_path / "m.gguf", shape, random_tensors(shape, seed=1))
    return sorted(tmp_path.glob("m-*.gguf"))


def run_error(path: Path) -> str:
    result = CliRunner().invoke(main, ["run", str(path), "hello", "-n", "2"])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("Error: ").rstrip("\n")


def test_parts_of_a_model(parts):
    first, second, third = parts
    assert CliRunner().invoke(main, ["run", str(first), "hello", "-n", "2"]).exit_code == 0
    assert run_error(third) == f"{third} is part 3 of 3 of a split model: give the first, {first}"
    assert run_error(second.rename(first.with_name("b.gguf"))) == (
        f"{first.with_name('b.gguf')} is part 2 of a split model: give the first"
    )
    assert run_error(first) == f"{first} is part 1 of 3, and part 2 is missing: {second}"


def test_parts_joined_by_cat(parts, tmp_path):
    joined = tmp_path / "joined.gguf"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    message = run_error(joined)
    assert message.startswith(
        f"{joined} is the first part of a split model under another name, or all of them in one file"
    )
    assert "joined-00001-of-00003.gguf and so on, or let llama-gguf-split --merge join them" in message


def test_a_damaged_part(parts):
    content = parts[2].read_bytes()
    parts[2].write_bytes(content[: len(content) // 2])
    assert "data is not within the file bounds, model is corrupted or incomplete" in run_error(parts[0])
