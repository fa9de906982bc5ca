"""The C tests, built with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    assert cmake, "cmake comes with the extra [test]"
    subprocess.run(
        [cmake, "-S", ROOT, "-B", folder, "-DSELFEXTEND_NATIVE_TESTS=ON", f"-DPython_EXECUTABLE={sys.executable}"],
        check=True,
    )
    subprocess.run([cmake, "--build", folder, "--target", "test_schedule", "test_engine"], check=True)
    return folder / "tests" / "native"


def run(*command: str | Path) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[-3000:]


def test_schedule(build):
    run(build / "test_schedule")


@pytest.mark.parametrize("key_type", [0, 1, 30], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", ["norm-32", "neox-64"])
def test_engine(build, model, name, key_type):
    run(build / "test_engine", model(name), str(key_type))
