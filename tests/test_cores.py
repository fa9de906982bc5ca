"""How many threads commands generate with."""

from __future__ import annotations

import os

import psutil
import pytest

from selfextend_gguf import cores
from selfextend_gguf.cli.options import llama_arguments
from selfextend_gguf.cores import fast_cores


@pytest.fixture
def machine(monkeypatch):
    """A machine of so many physical cores and threads, of which a process may use some."""

    def make(physical: int | None, logical: int, allowed: int, apples: int | None = None) -> None:
        monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: physical)
        monkeypatch.setattr(os, "cpu_count", lambda: logical)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(allowed)}, raising=False)
        monkeypatch.setattr(cores, "_apples", lambda: apples)

    return make


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((8, 16, 16), 8),
        ((8, 16, 2), 2),  # a container, taskset
        ((8, 8, 8), 8),
        ((None, 16, 16), 8),  # a kernel that does not say
        ((None, 1, 1), 1),
    ],
)
def test_one_thread_for_each_physical_core_that_is_there_for_us(machine, numbers, expected, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    machine(*numbers)
    assert fast_cores() == expected


@pytest.mark.parametrize(("apples", "expected"), [(4, 4), (None, 10)])
def test_on_a_mac_those_made_for_speed(machine, apples, expected, monkeypatch):
    machine(10, 10, 10, apples)
    monkeypatch.setattr("sys.platform", "darwin")
    assert fast_cores() == expected


def test_commands_take_them_unless_told_otherwise(machine):
    machine(6, 12, 12)
    options = {
        "gpu_layers": 0,
        "device": None,
        "split_mode": "layer",
        "tensor_split": None,
        "main_gpu": 0,
        "rpc": None,
        "cache_type_k": "f16",
        "cache_type_v": "f16",
        "verbose": False,
        "group_size": None,
        "neighbor_window": None,
        "max_distance": None,
        "block_size": None,
        "schedule": None,
    }
    chosen = llama_arguments(threads=None, **options)
    assert (chosen["n_threads"], chosen["n_threads_batch"]) == (6, None)
    told = llama_arguments(threads=3, **options)
    assert (told["n_threads"], told["n_threads_batch"]) == (3, 3)
