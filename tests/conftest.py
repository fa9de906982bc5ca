"""Models the tests make for themselves, once a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

# `python -m pytest` puts the source tree in front of the installed package, which alone has the compiled library.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from helpers import SHAPES, with_slow_keys  # noqa: E402

from selfextend_gguf.models import TINY_MODEL  # noqa: E402
from selfextend_gguf.reference import Reference  # noqa: E402
from selfextend_gguf.tiny.model_file import LlamaShape, random_tensors, write_llama  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=["gpu", "rpc"], help="run the device tests: on the GPU, or on a ggml RPC server on loopback"
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def model(model_folder: Path) -> Callable[[str], Path]:
    """Path of an F32 model: random weights in one of SHAPES, "slow-keys": keys that hardly turn (see helpers), or
    "bundled": the bundled model's weights in F32 (for its Q8_0 file, llama.cpp rounds activations to 8 bits)."""

    def make(name: str) -> Path:
        path = model_folder / f"{name}.gguf"
        if path.exists():
            return path
        if name == "bundled":
            weights = Reference(TINY_MODEL).weights
            write_llama(path, LlamaShape(), {key: w.astype(np.float32) for key, w in weights.items()})
        elif name == "slow-keys":
            shape = SHAPES["neox-64"]
            write_llama(path, shape, with_slow_keys(random_tensors(shape, seed=0), shape))
        else:
            write_llama(path, SHAPES[name], random_tensors(SHAPES[name], seed=len(name)))
        return path

    return make


@pytest.fixture(scope="session")
def heldout_text() -> str:
    return (Path(__file__).parent / "data" / "heldout.txt").read_text(encoding="ascii")
