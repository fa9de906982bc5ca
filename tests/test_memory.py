"""What a model and a context need, held against llama.cpp's own account; and what users are told."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner

from selfextend_gguf import Llama
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
