"""The engine with its cache on a device that is not host memory: pytest tests/test_device.py --device gpu (or rpc)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import cache

import llama_cpp
import numpy as np
import pytest
import rpc
from helpers import SHAPES, random_tokens, relative_error

from selfextend_gguf import Llama
from selfextend_gguf.devices import add_rpc_server, devices
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.models import TINY_MODEL

ALL_LAYERS = -1
N = 500  # tokens: 4 to 8 trained contexts


@pytest.fixture(scope="module", autouse=True)
def device(request) -> Iterator[None]:
    chosen = request.config.getoption("--device")
    if chosen is None:
        pytest.skip("no --device chosen")
    with ExitStack() as opened:
        if chosen == "rpc":
            add_rpc_server(opened.enter_context(rpc.running()))
        assert llama_cpp.llama_supports_gpu_offload(), "this llama-cpp-python knows no device but the CPU"
        yield


def load(path: str, n_gpu_layers: int, kind: str, *, plain: bool = False, **arguments) -> llama_cpp.Llama:
    return (llama_cpp.Llama if plain else Llama)(
        path,
        n_ctx=1024,
        n_gpu_layers=n_gpu_layers,
        # else llama.cpp computes large batches on the device even with no layer there
        op_offload=arguments.pop("op_offload", n_gpu_layers != 0),
        logits_all=True,
        flash_attn=False,  # it would round f32 keys; and in Mesa 22.3, even plain llama.cpp crashes with it
        verbose=False,
        type_k=KV_TYPES[kind],
        type_v=KV_TYPES["f16" if kind == "q8_0" else kind],  # quantised values need flash attention
        **arguments,
    )


def on_cpu_only(llm: Llama) -> bool:
    return llm._engine.devices == ["CPU"]


TOLERANCE = {"f32": 1e-3, "f16": 1e-2, "q8_0": 3e-2}
MODELS = [*SHAPES, "gemma3", "deepseek2 (MLA)"]
# llama.cpp takes q8_0 keys of MLA with q8_0 values only, see `load`.
CASES = [(name, kind) for name in MODELS for kind in TOLERANCE if (name, kind) != ("deepseek2 (MLA)", "q8_0")]


@cache
def tolerance(path: str, kind: str) -> float:
    """Relative error allowed, or twice plain llama.cpp's on the device if that rounds more (some multiply in f16).
    A key that was not moved is off by more than 0.1."""
    tokens = random_tokens(N, seed=9)
    on_cpu, on_device = (load(path, n, kind, plain=True) for n in (0, ALL_LAYERS))
    on_cpu.eval(tokens)
    on_device.eval(tokens)
    return max(TOLERANCE[kind], 2 * relative_error(on_device.scores[:N], on_cpu.scores[:N]))


@pytest.mark.parametrize("n_gpu_layers", [ALL_LAYERS, 2], ids=["all", "split"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_logits_equal_the_cpus(model, name, kind, n_gpu_layers):
    """Reading far beyond the trained context, rolling back into grouped text, restoring into a new context."""
    path, kept = str(model(name)), 200
    tokens = random_tokens(N, seed=9)
    cpu, llm = load(path, 0, kind), load(path, n_gpu_layers, kind)
    assert on_cpu_only(cpu)
    assert not on_cpu_only(llm)
    cpu.eval(tokens)
    llm.eval(tokens)
    assert llm.rewrite_stats.n_rewrites > 5
    assert relative_error(llm.scores[:N], cpu.scores[:N]) < tolerance(path, kind)

    for each in (cpu, llm):
        each.n_tokens = kept
        each.eval(tokens[kept:])
    assert relative_error(llm.scores[kept:N], cpu.scores[kept:N]) < tolerance(path, kind)

    restored = load(path, n_gpu_layers, kind)
    restored.load_state(llm.save_state())
    assert np.array_equal(restored.key_positions, llm.key_positions)
    restored.eval(tokens[:100])
    cpu.eval(tokens[:100])
    assert relative_error(restored.scores[N : N + 100], cpu.scores[N : N + 100]) < tolerance(path, kind)


@pytest.mark.parametrize("name", MODELS)
def test_cache_on_the_host_and_layers_on_the_device(model, name):
    path, tokens = str(model(name)), random_tokens(N, seed=10)
    cpu, llm = load(path, 0, "f32"), load(path, ALL_LAYERS, "f32", offload_kqv=False)
    assert on_cpu_only(llm)
    cpu.eval(tokens)
    llm.eval(tokens)
    assert relative_error(llm.scores[:N], cpu.scores[:N]) < tolerance(path, "f32")


@pytest.mark.parametrize("n_gpu_layers", [ALL_LAYERS, 2, 0])
def test_steps_that_are_large_enough_for_a_device_to_take_what_is_on_the_cpu(n_gpu_layers):
    """The bundled model reads in steps of 64 tokens. From 32 on, llama.cpp has devices compute products with weights
    that are not there."""
    path, tokens = str(TINY_MODEL), random_tokens(1000, seed=12)
    cpu, llm = load(path, 0, "f16"), load(path, n_gpu_layers, "f16", op_offload=n_gpu_layers != 0 or None)
    cpu.eval(tokens)
    llm.eval(tokens)
    assert llm.rewrite_stats.n_rewrites > 5
    assert relative_error(llm.scores[: len(tokens)], cpu.scores[: len(tokens)]) < tolerance(path, "f16")


def test_a_model_over_two_servers_of_ones_choice(model, request):
    """What `--rpc A,B -dev RPC..., -ts 1,3` gives: half of it would be enough to be wrong."""
    if request.config.getoption("--device") != "rpc":
        pytest.skip("of RPC servers")
    path, tokens = str(model("norm-128")), random_tokens(N, seed=11)
    before = devices()
    with rpc.running() as first, rpc.running() as second:
        for endpoint in (first, second):
            add_rpc_server(endpoint)
        names = [device.name for device in devices() if device not in before]
        assert len(names) == 2
        with closing(load(path, 0, "f32")) as cpu:
            cpu.eval(tokens)
            wanted = cpu.scores[:N].copy()
        with closing(load(path, ALL_LAYERS, "f32", devices=names, tensor_split=[1, 3])) as split:
            assert split.placement == f"all layers on {names[0]}, {names[1]}"
            split.eval(tokens)
            assert set(split._engine.devices) == {f"RPC0[{first}]", f"RPC0[{second}]"}
            assert relative_error(split.scores[:N], wanted) < tolerance(path, "f32")
        with closing(load(path, ALL_LAYERS, "f32", devices=names[1:])) as one:
            one.eval(tokens)
            assert one._engine.devices == [f"RPC0[{second}]"]
            assert relative_error(one.scores[:N], wanted) < tolerance(path, "f32")


def test_the_command_line_uses_servers(model, request):
    if request.config.getoption("--device") != "rpc":
        pytest.skip("of RPC servers")
    with rpc.running() as endpoint:
        options = ["--temp", "0", "-n", "8", "--timings"]
        plain = run_sx("run", str(TINY_MODEL), *options, "-ngl", "0", "Once upon a time")
        over = run_sx("run", str(TINY_MODEL), *options, "--rpc", endpoint, "Once upon a time")
        assert over.stdout == plain.stdout
        assert plain.stderr.rstrip().endswith("| CPU")
        assert "| all layers on RPC0" in over.stderr
        info = run_sx("info", str(TINY_MODEL))
        assert "Devices:                        CPU" in info.stdout


def run_sx(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from selfextend_gguf.cli import main; main()"]
    return subprocess.run([*program, *arguments], capture_output=True, text=True, check=True, cwd=tempfile.gettempdir())
