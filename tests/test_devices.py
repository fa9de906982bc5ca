"""Where a model is put: -ngl auto, --device, --rpc. The devices themselves are tested in test_device.py."""

from __future__ import annotations

import json
import sys
from contextlib import closing

import llama_cpp
import pytest
from click.testing import CliRunner

from selfextend_gguf import Llama, devices
from selfextend_gguf.cli import main
from selfextend_gguf.cli.options import llama_arguments
from selfextend_gguf.devices import Device, placement
from selfextend_gguf.errors import ConfigError, NotEnoughMemoryError
from selfextend_gguf.memory import can_foresee
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import TINY_MODEL

GPUS = [Device("CUDA0", "a card", 3 << 30, 4 << 30, 1), Device("CUDA1", "another", 1 << 30, 2 << 30, 2)]


@pytest.fixture
def gpus(monkeypatch):
    """Two devices that do not exist, so nothing can be loaded onto them."""
    monkeypatch.setattr(devices, "devices", lambda: GPUS)


@pytest.fixture
def no_gpus(monkeypatch):
    monkeypatch.setattr(devices, "devices", list)


def run(*arguments: str):
    return CliRunner().invoke(main, arguments)


def given(monkeypatch, *options: str) -> dict:
    """The arguments of `Llama` that `run` makes of options."""
    seen = {}

    def keep(**values):
        seen.update(llama_arguments(**values))
        raise ConfigError("enough")

    monkeypatch.setattr(sys.modules["selfextend_gguf.cli.run"], "llama_arguments", keep)
    assert "enough" in run("run", str(TINY_MODEL), "Once", *options).output
    return seen


@pytest.mark.parametrize(("options", "layers"), [([], 0), (["-ngl", "all"], -1), (["-ngl", "7"], 7)])
def test_layers_without_a_gpu(monkeypatch, no_gpus, options, layers):
    assert given(monkeypatch, *options)["n_gpu_layers"] == layers


@pytest.mark.parametrize(
    ("options", "layers"), [([], -1), (["-ngl", "auto"], -1), (["-ngl", "0"], 0), (["-dev", "none"], 0)]
)
def test_layers_with_a_gpu(monkeypatch, gpus, options, layers):
    arguments = given(monkeypatch, *options)
    assert arguments["n_gpu_layers"] == layers
    assert "devices" not in arguments


def test_flags_of_llama_cpp_become_arguments(monkeypatch, gpus):
    arguments = given(monkeypatch, "--device", "CUDA1, CUDA0", "-sm", "row", "-ts", "3,1", "-mg", "1")
    assert arguments["devices"] == ["CUDA1", "CUDA0"]
    assert arguments["split_mode"] == llama_cpp.LLAMA_SPLIT_MODE_ROW
    assert (arguments["tensor_split"], arguments["main_gpu"]) == ([3.0, 1.0], 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-dev", "CUDA7"], "there is no device 'CUDA7'; there is CUDA0, CUDA1"),
        (["-dev", ""], "there is no device ''"),
        (["-ngl", "many"], "'many' is not a valid integer"),
        (["-ngl", "-7"], "n_gpu_layers must be between -1 and"),
        (["-ts", "3,x"], "'x' is not a valid float"),
        (["-ts", "-1"], "tensor_split[0] must be"),
        (["-sm", "column"], "'column' is not one of 'none', 'layer', 'row'"),
    ],
)
def test_nonsense_is_a_line(gpus, options, words):
    result = run("run", str(TINY_MODEL), "Once", *options)
    assert words in result.output
    assert result.exit_code != 0
    assert "Traceback" not in result.output


@pytest.mark.skipif(llama_cpp.llama_cpp.llama_supports_rpc(), reason="built with RPC")
def test_a_build_without_rpc_says_how_to_get_one():
    result = run("run", str(TINY_MODEL), "Once", "--rpc", "localhost:50052")
    assert "CMAKE_ARGS=-DGGML_RPC=ON pip install" in result.output
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("localhost", "named HOST:PORT, not 'localhost'"),
        (":50052", "named HOST:PORT"),
        ("localhost:0", "named HOST:PORT"),
        ("localhost:port", "named HOST:PORT"),
        ("127.0.0.1:1", "no RPC server answers at 127.0.0.1:1"),
    ],
)
def test_servers_that_are_not_there(monkeypatch, endpoint, words):
    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_supports_rpc", lambda: True)
    with pytest.raises(ConfigError, match=words):
        devices.add_rpc_server(endpoint)


def test_placement_in_words(gpus):
    assert placement(0) == "CPU"
    assert placement(-1) == placement(99, n_layers=30) == "all layers on CUDA0, CUDA1"
    assert placement(12, ["CUDA1"], 30) == "12 layers on CUDA1"
    assert placement(5, []) == "CPU"


def test_placement_of_a_model_without_gpus(no_gpus):
    with closing(Llama(str(TINY_MODEL), n_gpu_layers=-1, verbose=False)) as llm:
        assert llm.placement == "CPU"
    with pytest.raises(ConfigError, match="there is no device 'CUDA0'; there is none but the CPU"):
        Llama(str(TINY_MODEL), devices=["CUDA0"])
    for wrong in ("CUDA0", [1], {"CUDA0"}):
        with pytest.raises(ConfigError, match="devices"):
            Llama(str(TINY_MODEL), devices=wrong)


def test_memory_of_the_machine_is_checked_unless_a_device_holds_the_cache(gpus):
    with ModelInfo(TINY_MODEL) as info:
        assert can_foresee(info, {"n_gpu_layers": 0})
        assert not can_foresee(info, {"n_gpu_layers": -1})
        assert can_foresee(info, {"n_gpu_layers": -1, "devices": []})


def test_memory_is_checked_where_layers_have_no_device_to_go_to(no_gpus):
    with ModelInfo(TINY_MODEL) as info:
        assert can_foresee(info, {"n_gpu_layers": -1})


@pytest.mark.parametrize("refused", ["model", "context"])
def test_a_device_that_is_full_is_a_line_with_the_flag(monkeypatch, gpus, refused):
    said = "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 5000.00 MiB on device 0: out of memory"
    monkeypatch.setattr("selfextend_gguf.safe_llama.last_error", lambda: said)
    name = {"model": "llama_model_load_from_file", "context": "llama_init_from_model"}[refused]
    with ModelInfo(TINY_MODEL) as info:
        monkeypatch.setattr(llama_cpp.llama_cpp, name, lambda *_: None)
        with pytest.raises(NotEnoughMemoryError, match=r"all layers on CUDA0, CUDA1 .* out of memory; fewer .* -ngl"):
            Llama(str(TINY_MODEL), n_gpu_layers=-1, verbose=False, model_info=info)


def test_info_names_the_devices(monkeypatch, gpus):
    monkeypatch.setattr(sys.modules["selfextend_gguf.cli.info"], "devices", lambda: GPUS)
    result = run("info", str(TINY_MODEL))
    assert "all layers on CUDA0 (a card, 3.0 GiB free), CUDA1 (another, 1.0 GiB free)" in result.output
    record = json.loads(run("info", str(TINY_MODEL), "--json").output)
    assert [device["name"] for device in record["devices"]] == ["CUDA0", "CUDA1"]


def test_timings_say_where(no_gpus):
    result = run("run", str(TINY_MODEL), "Once", "-n", "2", "--timings")
    assert result.stderr.rstrip().endswith("| CPU")
    record = json.loads(run("run", str(TINY_MODEL), "Once", "-n", "2", "--json").stdout)
    assert record["placement"] == "CPU"
