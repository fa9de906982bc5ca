"""What `info` foresees is what `Llama` does: with every family and every type of cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
from families import EXTENDED, FAMILIES, write_family
from helpers import foreseen, happening

from selfextend_gguf import Llama
from selfextend_gguf.errors import SelfExtendError
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.tiny.model_file import LlamaShape, random_tensors, write_llama


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_info_and_llama_agree(family, tmp_path):
    path = tmp_path / "model.gguf"
    write_family(family, path)
    for types in [("f16", "f16"), ("q4_0", "f16"), ("q8_0", "q8_0")]:
        assert foreseen(path, 256, *types) == happening(path, 256, *types)
    assert foreseen(path, 256, "f16", "f16").startswith("not possible") == (family not in EXTENDED)


@pytest.mark.parametrize("kind", KV_TYPES)
def test_keys_that_hardly_turn_are_extended_with_every_type(model, kind):
    """Where rounding is as large as the move of a first token's key."""
    for n_ctx in (256, 512):
        assert foreseen(model("slow-keys"), n_ctx, kind, "f16").startswith("Up to")
        assert foreseen(model("slow-keys"), n_ctx, kind, "f16") == happening(model("slow-keys"), n_ctx, kind, "f16")


def test_within_the_trained_context_any_model_is_read(tmp_path):
    path = tmp_path / "model.gguf"
    write_family(FAMILIES["hunyuan-dense"], path)
    assert foreseen(path, 64, "f16", "f16") == happening(path, 64, "f16", "f16")
    assert happening(path, 64, "f16", "f16").startswith("not needed")


# ---- where llama.cpp would end the process ---------------------------------------------------------------------------


def test_heads_that_are_no_whole_blocks(tmp_path):
    path = tmp_path / "model.gguf"
    shape = LlamaShape(n_ctx_train=64, n_layer=2, n_embd=80, n_head=2, n_head_kv=1, head_dim=40, n_ff=64)
    write_llama(path, shape, random_tensors(shape, seed=1))
    for n_ctx in (64, 256):
        for keys, values in [("q4_0", "f16"), ("q8_0", "q8_0"), ("f16", "q8_0")]:
            reason = happening(path, n_ctx, keys, values)
            assert "come in blocks of 32 elements, and a head of this model has 40: take " in reason
            assert foreseen(path, n_ctx, keys, values) == reason
        assert not happening(path, n_ctx, "bf16", "f16").startswith("not possible")


@pytest.fixture
def plm(tmp_path) -> str:
    """Long enough a trained context for steps of 512 tokens, for which flash attention is taken where it can be."""
    plm = FAMILIES["plm"]
    longer = replace(plm, metadata={**plm.metadata, "context_length": 4096, "attention.value_length": 32})
    write_family(longer, tmp_path / "model.gguf")
    return str(tmp_path / "model.gguf")


def test_models_without_flash_attention(plm):
    for n_ctx in (2048, 8192):
        assert not happening(plm, n_ctx, "f16", "f16").startswith("not possible")
        assert foreseen(plm, n_ctx, "f16", "f16") == happening(plm, n_ctx, "f16", "f16")
        reason = "not possible: llama.cpp has no flash attention for plm models, and q8_0 values need it"
        assert happening(plm, n_ctx, "f16", "q8_0").startswith(reason)
    with pytest.raises(SelfExtendError, match=r"no flash attention for plm models$"):
        Llama(plm, n_ctx=256, flash_attn=True, verbose=False)
