"""The C tests, built with the address and undefined-behaviour sanitizers, or as SX_GGUF_TEST_NATIVE says: "thread" for
another sanitizer, "coverage:FOLDER" for gcov (see native_coverage.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from families import EXTENDED, write_family
from helpers import SHAPES

from selfextend_gguf.kv_cache import KV_TYPES, is_quantised
from selfextend_gguf.models import TINY_MODEL

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    check, _, folder = os.environ.get("SX_GGUF_TEST_NATIVE", "").partition(":")
    folder = Path(folder) if folder else tmp_path_factory.mktemp("native")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    assert cmake, "cmake comes with the extra [test]"
    options = ["-DSELFEXTEND_NATIVE_TESTS=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    options += [f"-DSELFEXTEND_NATIVE_CHECK={check}"] if check else []
    subprocess.run([cmake, "-S", ROOT, "-B", folder, *options], check=True)
    targets = [source.stem for source in (ROOT / "tests" / "native").glob("test_*.c")]
    subprocess.run([cmake, "--build", folder, "--parallel", "2", "--target", *targets], check=True)
    return folder / "tests" / "native"


def run(*command: str | Path) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[-3000:]


def test_schedule(build):
    run(build / "test_schedule")


def test_the_graph_reader(build):
    run(build / "test_graph")


def test_threads(build, model):
    run(build / "test_threads", model("norm-32"))


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
@pytest.mark.parametrize("name", ["neox-64", "llama (Llama 3)", "gemma3"])
def test_every_request_for_memory_or_a_device_refused_once(build, model, name, kind):
    run(build / "test_failures", model(name), str(KV_TYPES[kind]))


def test_tokenize(build):
    run(build / "test_tokenize", TINY_MODEL)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["norm-32", "neox-64"])
def test_an_engines_life(build, model, name, kind):
    run(build / "test_engine", model(name), str(KV_TYPES[kind]))


@pytest.mark.parametrize("name", [*SHAPES, "slow-keys"])
def test_wrong_rotations_are_refused(build, model, name):
    run(build / "test_layers", model(name), *map(str, KV_TYPES.values()))


@pytest.mark.parametrize("family", EXTENDED, ids=lambda family: family.name)
def test_wrong_rotations_are_refused_in_every_family(build, family, tmp_path):
    write_family(family, tmp_path / "model.gguf")
    # llama.cpp keeps heads in whole blocks, and values of latent attention in the type of their keys.
    takes_blocks = family.key_length % 32 == 0 and "(MLA)" not in family.name
    kinds = [kind for kind, number in KV_TYPES.items() if takes_blocks or not is_quantised(number)]
    run(build / "test_layers", tmp_path / "model.gguf", *(str(KV_TYPES[kind]) for kind in kinds))
