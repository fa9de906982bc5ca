"""A few of the wrong files of `fuzz_files`, and that it would see what goes wrong."""

from __future__ import annotations

import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import fuzz_files
import pytest
from click.testing import CliRunner
from fuzz_files import KINDS, gguf_kind, slots_of
from processes import run_python

from selfextend_gguf.cli import main
from selfextend_gguf.models import TINY_MODEL

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
SOURCE = TINY_MODEL.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_files_are_one_line(kind):
    program = [sys.executable, fuzz_files.__file__, "--kind", kind, "--files", "60", "--seed", "20"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("60 files, 0 faults")


def test_faults_are_seen():
    """In a process without threads, which can be forked."""
    done = run_python(
        f"import sys; sys.path.insert(0, {str(Path(fuzz_files.__file__).parent)!r})\n"
        """
import os, tempfile, time
import fuzz_files
kind = fuzz_files.Kind("file", lambda rng: (b"", ""), lambda path: [])
with tempfile.TemporaryDirectory() as folder:
    for does in (
        lambda _: os.abort(),
        lambda _: time.sleep(60),
        lambda _: sys.exit(len(b"x" * (700 << 20)) & 0),
        lambda _: 1 / 0,
        lambda _: os._exit(1),
    ):
        fuzz_files.sx_gguf, fuzz_files.SECONDS = does, 5
        print(fuzz_files.fault_of(kind, folder + "/file", folder + "/output").split(":")[0])
"""
    )
    said = re.sub(r"^\d{3} MiB", "some MiB", done.stdout, flags=re.MULTILINE).splitlines()
    assert said == [
        "ended by SIGABRT",
        "not done in 5 s",
        "some MiB of memory",
        "status 99",
        "status 1 without an error",
    ], done.stderr


def test_the_numbers_of_a_file_are_found():
    slots = {slot.about: slot for slot in slots_of(SOURCE)}
    layers = slots["llama.block_count"]
    assert struct.unpack_from("<I", SOURCE, layers.at) == (4,)
    assert {"version", "number of tensors", "type of token_embd.weight", "offset of output_norm.weight"} <= set(slots)
    made = gguf_kind().make(random.Random(3))
    assert made == gguf_kind().make(random.Random(3)) != gguf_kind().make(random.Random(4))


def changed(about: str, number: int) -> bytes:
    slot = next(slot for slot in slots_of(SOURCE) if slot.about == about)
    data = bytearray(SOURCE)
    struct.pack_into(f"<{slot.kind}", data, slot.at, number)
    return bytes(data)


# Each of them ended the process: smallest changes to the bundled model.
@pytest.mark.parametrize(
    ("about", "number", "message"),
    [
        ("a letter of tokenizer.ggml.tokens", 0x80, "is damaged: its vocabulary is no UTF-8"),
        ("llama.block_count", 1028, "has 1028 layers; llama.cpp knows 512 at most"),
        ("llama.block_count", 2**24, "has 16777216 layers"),
    ],
)
def test_what_once_ended_the_process(tmp_path, about, number, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(changed(about, number))
    result = CliRunner().invoke(main, ["run", str(path), "Once"])
    assert result.exit_code == 1
    assert message in result.output


def test_an_assertion_of_llama_cpp_in_loading_is_an_error(tmp_path):
    """Two tokens of the same text."""
    at = SOURCE.index(b"tokenizer.ggml.tokens")
    data = bytearray(SOURCE)
    slots = [s for s in slots_of(SOURCE) if s.about == "a letter of tokenizer.ggml.tokens" and s.at > at]
    data[slots[1].at] = data[slots[0].at]
    if len({bytes(data[s.at - 8 : s.at + 2]) for s in slots[:2]}) > 1:
        begin, end = slots[0].at - 8, slots[1].at - 8
        data[end : end + (end - begin)] = data[begin:end]
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(data))
    result = CliRunner().invoke(main, ["run", str(path), "Once"])
    assert result.exit_code == 1
    assert "GGML_ASSERT(id_to_token.size() == token_to_id.size()) failed" in result.output
