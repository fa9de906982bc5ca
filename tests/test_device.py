"""The engine with its cache on a device that is not host memory: pytest tests/test_device.py --device gpu (or rpc)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import llama_cpp
import numpy as np
import pytest
import rpc
from families import FAMILIES, write_family
from helpers import SHAPES, random_tokens, relative_error

from selfextend_gguf import Llama
from selfextend_gguf.kv_cache import KV_TYPES

ALL_LAYERS = -1


@pytest.fixture(scope="module", autouse=True)
def device(request) -> Iterator[None]:
    chosen = request.config.getoption("--device")
    if chosen is None:
        pytest.skip("no --device chosen")
    with rpc.server() if chosen == "rpc" else nullcontext():
        assert llama_cpp.llama_supports_gpu_offload(), "this llama-cpp-python knows no device but the CPU"
        yield


@pytest.fixture(scope="module", params=[*SHAPES, "gemma3", "deepseek2 (MLA)"])
def path(request, model, tmp_path_factory) -> str:
    if request.param in SHAPES:
        return str(model(request.param))
    path = tmp_path_factory.mktemp("family") / "model.gguf"
    write_family(FAMILIES[request.param], path)
    return str(path)


def load(path: str, n_gpu_layers: int, kind: str, **arguments) -> Llama:
    return Llama(
        path,
        n_ctx=1024,
        n_gpu_layers=n_gpu_layers,
        logits_all=True,
        flash_attn=kind == "q8_0",  # quantised values need it, and it would round f32 ones
        verbose=False,
        type_k=KV_TYPES[kind],
        type_v=KV_TYPES[kind],
        **arguments,
    )


def on_cpu_only(llm: Llama) -> bool:
    return llm._engine.devices == ["CPU"]


# Devices add up in another order, and some round to f16 on the way; a key that was not moved is off by more than 0.1.
TOLERANCE = {"f32": 1e-3, "f16": 1e-2, "q8_0": 3e-2}


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("n_gpu_layers", [ALL_LAYERS, 2], ids=["all", "split"])
def test_logits_equal_the_cpus(path, n_gpu_layers, kind):
    """Reading far beyond the trained context, rolling back into grouped text, restoring into a new context."""
    n, kept = 900, 300
    tokens = random_tokens(n, seed=9)
    cpu, llm = load(path, 0, kind), load(path, n_gpu_layers, kind)
    assert on_cpu_only(cpu)
    assert not on_cpu_only(llm)
    cpu.eval(tokens)
    llm.eval(tokens)
    assert llm.rewrite_stats.n_rewrites > 5
    assert relative_error(llm.scores[:n], cpu.scores[:n]) < TOLERANCE[kind]

    for each in (cpu, llm):
        each.n_tokens = kept
        each.eval(tokens[kept:])
    assert relative_error(llm.scores[kept:n], cpu.scores[kept:n]) < TOLERANCE[kind]

    restored = load(path, n_gpu_layers, kind)
    restored.load_state(llm.save_state())
    assert np.array_equal(restored.key_positions, llm.key_positions)
    restored.eval(tokens[:100])
    cpu.eval(tokens[:100])
    assert relative_error(restored.scores[n : n + 100], cpu.scores[n : n + 100]) < TOLERANCE[kind]


def test_cache_on_the_host_and_layers_on_the_device(path):
    tokens = random_tokens(600, seed=10)
    cpu, llm = load(path, 0, "f32"), load(path, ALL_LAYERS, "f32", offload_kqv=False)
    assert on_cpu_only(llm)
    cpu.eval(tokens)
    llm.eval(tokens)
    assert relative_error(llm.scores[:600], cpu.scores[:600]) < TOLERANCE["f32"]
