"""What a model and a context need, held against llama.cpp's own account; and what users are told."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner
from helpers import write_adapter
from processes import run_python

from selfextend_gguf import Llama, memory
from selfextend_gguf.cli import main
from selfextend_gguf.errors import MemoryTightWarning, NotEnoughMemoryError
from selfextend_gguf.evaluation.bench import write_random_model
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.memory import Demand, weights_bytes
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.tiny.model_file import LlamaShape

MODEL = str(TINY_MODEL)
MIB = 2**20


def demand_of(path, n_ctx: int, **changes) -> Demand:
    with ModelInfo(path) as info:
        f16 = KV_TYPES["f16"]
        settings = {"n_batch": 512, "type_k": f16, "type_v": f16, "flash_attn": False, "is_mapped": True}
        return Demand(dict(info.metadata), weights_bytes(path), n_ctx, **{**settings, **changes})


@pytest.mark.parametrize("flash_attn", [False, True])
def test_the_estimate_is_near_what_llama_cpp_allocates(flash_attn, tmp_path):
    path = tmp_path / "m.gguf"
    shape = LlamaShape(n_ctx_train=4096, n_layer=2, n_embd=1024, n_head=16, n_head_kv=4, head_dim=64, n_ff=4096)
    write_random_model(path, shape)
    code = f"from selfextend_gguf import Llama\nLlama({str(path)!r}, n_ctx=8192, flash_attn={flash_attn}, verbose=True)"
    log = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    computing = float(re.search(r"CPU compute buffer size = +([\d.]+) MiB", log)[1])
    kv_cache = float(re.search(r"CPU KV buffer size = +([\d.]+) MiB", log)[1])
    demand = demand_of(path, 8192, flash_attn=flash_attn)
    assert demand.kv_cache / MIB == pytest.approx(kv_cache, abs=0.01)
    # 16 heads: scores of 512 x 8192 x 16 x 4 bytes = 256 MiB, which flash attention does without
    assert computing > 256 if not flash_attn else computing < 100
    assert demand.compute / MIB == pytest.approx(computing, rel=0.25)


@pytest.fixture(scope="module")
def wordy_model(tmp_path_factory):
    """A small model with a large vocabulary: the logits of 512 tokens are 32000 x 512 x 4 bytes = 62.5 MiB."""
    path = tmp_path_factory.mktemp("wordy") / "m.gguf"
    shape = LlamaShape(n_ctx_train=1024, n_layer=1, n_embd=64, n_head=2, n_head_kv=2, head_dim=32, n_ff=64)
    write_random_model(path, replace(shape, n_vocab=32000))
    return path


MORE_MEMORY = {
    "plain": ("", 0),
    "logits_all": (", logits_all=True", 62.5 + 62.5),  # llama.cpp's, and those that are kept: the context is as long
    "drafts": (", draft_model=LlamaPromptLookupDecoding()", 0),
    "embedding": (", embedding=True", 62.5),
}


def test_logits_of_more_than_one_token_are_counted(wordy_model):
    """Against the memory that a process takes."""
    code = f"""
import sys, psutil
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from selfextend_gguf import Llama
llm = Llama({str(wordy_model)!r}, n_ctx=512, n_batch=512, verbose=False%s)
before = psutil.Process().memory_info().rss
llm.embed("a" * 512) if llm.context_params.embeddings else llm.eval([5] * 512)
print(psutil.Process().memory_info().rss - before)
"""
    taken = {name: int(run_python(code % argument).stdout) / MIB for name, (argument, _) in MORE_MEMORY.items()}
    with ModelInfo(wordy_model) as info:
        for name, (argument, wanted) in MORE_MEMORY.items():
            arguments = eval(f"dict({argument.removeprefix(', ')})", {"LlamaPromptLookupDecoding": object})
            demand = memory.demand_of(info, 512, 512, **arguments)
            assert demand.logits / MIB == wanted, name
            # Beside them the logits of all tokens are computed in llama.cpp's buffer, which is always counted.
            assert wanted - 5 <= taken[name] - taken["plain"] <= wanted + demand.compute / MIB, name


def test_gemma_3_with_all_logits_is_refused(monkeypatch):
    """The vocabulary of Gemma 3 has 262144 tokens: 16384 of them are 16 GiB of logits, and 512 more in llama.cpp."""
    demand = demand_of(TINY_MODEL, 16384, n_vocab=262144, all_logits=True, keeps_logits=True)
    assert demand.logits == 2**30 * (16 + 0.5)
    with_memory(monkeypatch, 16 * 2**30)
    with pytest.raises(NotEnoughMemoryError, match=r"logits of all tokens 16\.5 GiB"):
        memory.check_memory(demand)


def test_what_else_is_counted(tmp_path):
    adapter, second = (write_adapter(tmp_path / name) for name in ("adapter.gguf", "second.gguf"))
    with ModelInfo(TINY_MODEL) as info:
        plain = memory.demand_of(info, 4096, 512)
        assert memory.demand_of(info, 4096, 512, lora_path=str(adapter)).weights == (
            plain.weights + adapter.stat().st_size
        )
        assert memory.demand_of(info, 4096, 512, lora_path=str(adapter), adapters={str(second): 1.0}).weights == (
            plain.weights + 2 * adapter.stat().st_size
        )
        assert memory.demand_of(info, 4096, 2048, n_ubatch=2048).compute == pytest.approx(4 * plain.compute)
        # One page for each token of a batch, whose list of sequences is as long as the context.
        assert memory.demand_of(info, 65536, 65536).batch == 65536 * 4096


def test_a_state_has_no_room_for_logits_that_nobody_wrote(wordy_model):
    llm = Llama(str(wordy_model), n_ctx=512, verbose=False)
    llm.eval([5] * 400)
    tracemalloc.start()
    state = llm.save_state()
    assert tracemalloc.get_traced_memory()[1] < 2 * MIB  # not 49: 400 x 32000 x 4 bytes
    tracemalloc.stop()
    other = Llama(str(wordy_model), n_ctx=512, verbose=False)
    other.load_state(state)
    assert other.n_tokens == 400


def test_states_and_copies_that_do_not_fit(monkeypatch):
    llm = Llama(MODEL, n_ctx=512, verbose=False)
    llm.eval([5] * 400)
    with_memory(monkeypatch, 1000)
    for copy, what in ((llm.save_state, "a state"), (llm.copy_prompt, "a copy of the text")):
        with pytest.raises(NotEnoughMemoryError, match=rf"{what} takes .* of memory, 0\.0 MiB are available"):
            copy()


def with_memory(monkeypatch, available: float, total: float = 2**40) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(available), total=int(total)))


def test_what_does_not_fit_is_refused_with_options_that_would(monkeypatch):
    demand = demand_of(TINY_MODEL, 4096)
    with_memory(monkeypatch, 0.8 * demand.allocated_beside)
    with pytest.raises(NotEnoughMemoryError, match="4096 tokens need") as caught:
        Llama(MODEL, n_ctx=4096, flash_attn=False, verbose=False)
    advised = re.search(r"it would fit with -ctk (\w+) -ctv (\w+) or --ctx (\d+)", str(caught.value))
    quantised = {"type_k": KV_TYPES[advised[1]], "type_v": KV_TYPES[advised[2]], "flash_attn": True}
    Llama(MODEL, n_ctx=4096, verbose=False, **quantised)
    n_ctx = int(advised[3])
    Llama(MODEL, n_ctx=n_ctx, flash_attn=False, verbose=False)
    with pytest.raises(NotEnoughMemoryError):
        Llama(MODEL, n_ctx=n_ctx + 256, flash_attn=False, verbose=False)


def test_nothing_is_loaded_before(monkeypatch):
    import llama_cpp._internals as internals

    with_memory(monkeypatch, 1000)
    loaded = []
    load = internals.LlamaModel.__init__

    def noted(self, *, path_model, params, verbose=True):
        loaded.append(params.vocab_only)
        load(self, path_model=path_model, params=params, verbose=verbose)

    monkeypatch.setattr(internals.LlamaModel, "__init__", noted)
    with pytest.raises(NotEnoughMemoryError, match="take a smaller model, or close other programs"):
        Llama(MODEL, n_ctx=1024, verbose=False)
    assert loaded == [True]  # the vocabulary and the metadata alone


def test_weights_that_exceed_the_machine_are_refused(monkeypatch):
    with_memory(monkeypatch, 2**40, total=weights_bytes(TINY_MODEL))
    with pytest.raises(NotEnoughMemoryError, match="smaller model"):
        Llama(MODEL, n_ctx=256, verbose=False)


def test_weights_that_are_mapped_may_be_tight(monkeypatch):
    demand = demand_of(TINY_MODEL, 1024)
    with_memory(monkeypatch, demand.allocated_beside + 0.5 * demand.weights)
    with pytest.warns(MemoryTightWarning, match="read from disk again"):
        Llama(MODEL, n_ctx=1024, flash_attn=False, verbose=False)
    with pytest.raises(NotEnoughMemoryError):
        Llama(MODEL, n_ctx=1024, flash_attn=False, use_mmap=False, verbose=False)


def test_enough_memory_is_no_message(recwarn):
    Llama(MODEL, n_ctx=1024, verbose=False)
    assert not recwarn.list


def test_the_command_says_it_in_one_line(monkeypatch):
    with_memory(monkeypatch, 30 * MIB)
    result = CliRunner().invoke(main, ["run", MODEL, "hello", "--ctx", "16384"])
    assert result.exit_code == 1
    assert re.fullmatch(
        r"Error: 16384 tokens need .* \(weights .*\), .* available: it would fit with .*--ctx \d+.*\n", result.stderr
    )


def test_all_parts_of_a_split_file_count(tmp_path):
    for i in (1, 2, 3):
        (tmp_path / f"m-0000{i}-of-00003.gguf").write_bytes(bytes(100 * i))
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(bytes(7))
    assert weights_bytes(tmp_path / "m-00001-of-00003.gguf") == 600
    assert weights_bytes(tmp_path / "m-00001-of-00002.gguf") == 7
