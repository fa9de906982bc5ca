"""Models the tests make for themselves, once a run."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

ABOUT_TESTS = ("SX_GGUF_TEST_", "SX_GGUF_TEMPLATES")  # variables that begin so

# Tiny models are read fastest on one thread: several mostly wait for each other, and for whatever else the machine
# does. The libraries read this when they are loaded, those of child processes as well.
for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):
    os.environ.setdefault(name, "1")

# What a user has set must not change what is tested, nor tests what a user finds in the history of a chat.
for name in [name for name in os.environ if name.startswith("SX_GGUF_") and not name.startswith(ABOUT_TESTS)]:
    del os.environ[name]
os.environ |= {"SX_GGUF_CONFIG": os.devnull, "SX_GGUF_NO_HISTORY": "1"}

# `python -m pytest` puts the source tree in front of the installed package, which alone has the compiled library.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from families import FAMILIES, write_family  # noqa: E402
from helpers import CHAT_TEMPLATE, SHAPES, TOOLS_TEMPLATE, with_slow_keys  # noqa: E402

from selfextend_gguf.cli import main  # noqa: E402
from selfextend_gguf.models import TINY_MODEL  # noqa: E402
from selfextend_gguf.reference import Reference  # noqa: E402
from selfextend_gguf.tiny.model_file import LlamaShape, random_tensors, write_llama  # noqa: E402

# What a shell starts in the background ignores Ctrl-C, and so would the programs whose Ctrl-C is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=["gpu", "rpc"], help="run the device tests: on the GPU, or on a ggml RPC server on loopback"
    )


# The bundled model's weights in F32 (for its Q8_0 file, llama.cpp rounds activations to 8 bits), and chat templates.
BUNDLED = {"bundled": None, "bundled-chat": CHAT_TEMPLATE, "bundled-tools": TOOLS_TEMPLATE}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of the F32 model of a name: one of BUNDLED, or random weights in one of SHAPES or FAMILIES, or "slow-keys":
    keys that hardly turn (see helpers)."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def make(name: str) -> Path:
        path = folder / f"{name}.gguf"
        if name in BUNDLED:
            weights = {key: w.astype(np.float32) for key, w in Reference(TINY_MODEL).weights.items()}
            write_llama(path, LlamaShape(), weights, chat_template=BUNDLED[name])
        elif name == "slow-keys":
            shape = SHAPES["neox-64"]
            write_llama(path, shape, with_slow_keys(random_tensors(shape, seed=0), shape))
        elif name in SHAPES:
            write_llama(path, SHAPES[name], random_tensors(SHAPES[name], seed=len(name)))
        else:
            write_family(FAMILIES[name], path)
        return path

    return make


@pytest.fixture
def model_says(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let served models, whose tokens are bytes, say what a test wants."""
    from selfextend_gguf.server.logprobs import Chosen
    from selfextend_gguf.server.models import ServedLlama

    def says(text: str) -> None:
        def generate(self, *args, **kwargs):
            self.answer = []
            for byte in text.encode():
                self.answer.append(Chosen(byte, bytes([byte])))
                yield byte
            yield 0  # which ends an answer

        monkeypatch.setattr(ServedLlama, "generate", generate)

    return says


@pytest.fixture(scope="session")
def heldout_text() -> str:
    return (Path(__file__).parent / "data" / "heldout.txt").read_text(encoding="ascii")


@pytest.fixture
def one_line_error(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that fails, for the line that says why. In this process, which llama.cpp must neither abort nor
    use the file descriptors of."""

    def run(*arguments: str, stdin: bytes = b"") -> str:
        result = CliRunner(env={"SX_GGUF_API_KEY": None}).invoke(main, list(arguments), input=stdin)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code in (1, 2)
        lines = [line for line in result.stderr.splitlines() if line and not line.startswith(("Usage: ", "Try "))]
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("Error: ")
        assert result.stdout == ""
        assert capfd.readouterr() == ("", "")
        return lines[0]

    return run
