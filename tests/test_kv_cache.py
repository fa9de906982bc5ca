"""Caches of few bits, and models whose sliding-window layers have a cache of their own."""

from __future__ import annotations

import warnings

import pytest
from helpers import F32, random_tokens, relative_error

from selfextend_gguf import Llama
from selfextend_gguf.errors import ConfigError, EngineError, KeyPrecisionWarning
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import TINY_MODEL


@pytest.mark.parametrize("number", [-1, 4, 31, 999, "f16"])
@pytest.mark.parametrize("which", ["type_k", "type_v"])
def test_the_size_of_a_cache_of_no_known_type(which, number):
    types = {"type_k": KV_TYPES["f16"], "type_v": KV_TYPES["f16"]} | {which: number}
    with ModelInfo(TINY_MODEL) as info, pytest.raises(ConfigError, match=which):
        info.kv_cache_bytes(512, **types)


@pytest.mark.parametrize("schedule", ["selfextend", "paper"])
@pytest.mark.parametrize("n_ctx", [256, 512, 1024])
def test_the_number_of_moves_is_known_in_advance(model, n_ctx, schedule):
    llm = Llama(str(model("gemma2")), n_ctx=n_ctx, schedule=schedule, verbose=False, **F32)
    llm.eval(random_tokens(n_ctx))
    assert llm.rewrite_stats.n_rewrites <= llm.self_extend.n_moves <= llm.rewrite_stats.n_rewrites + 1


def test_keys_of_few_bits_in_a_model_that_rewrites_often_are_warned_of(model):
    def moves(name: str, kind: str) -> int:
        llm = Llama(str(model(name)), n_ctx=512, type_k=KV_TYPES[kind], verbose=False)
        return llm.self_extend.n_moves

    with pytest.warns(
        KeyPrecisionWarning, match=r"rewrites the keys .* up to 37 times; q4_0 keys lose precision after 10"
    ):
        assert moves("gemma2", "q4_0") == 37
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moves("gemma2", "q8_0")
        moves("gemma2", "f16")
        moves("cohere2", "q4_0")  # rewrites nothing
        moves("llama", "q4_0")  # rewrites each key a few times


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "gemma3", "cohere2", "llama4"])
def test_the_small_cache_of_sliding_layers_gives_the_same_logits(model, name):
    n = 700
    tokens = random_tokens(n, seed=11)
    logits = []
    for full in (True, False):
        llm = Llama(str(model(name)), n_ctx=768, n_batch=64, swa_full=full, logits_all=True, verbose=False, **F32)
        llm.eval(tokens)
        logits.append(llm.scores[:n].copy())
    assert relative_error(logits[1], logits[0]) < 1e-4


def test_a_rollback_beyond_what_sliding_layers_remember_reads_the_text_again(model):
    """Not from keys that are no longer there: llama.cpp itself would go on, with wrong logits."""
    n = 700
    tokens = random_tokens(n, seed=12)
    arguments = {"n_ctx": 768, "n_batch": 64, "logits_all": True, "verbose": False, **F32}
    llm = Llama(str(model("gemma2")), swa_full=False, **arguments)
    llm.eval(tokens)
    fresh = llm.scores[:n].copy()

    llm.n_tokens = n - 20  # as far as they remember
    llm.eval(tokens[n - 20 :])
    assert relative_error(llm.scores[:n], fresh) < 1e-3

    llm.n_tokens = 100
    with pytest.raises(EngineError, match="no longer hold what came before token 100"):
        llm.eval(tokens[100:])

    read = []
    llm.n_tokens = n
    llm.progress = lambda done, total: read.append(total)
    next(iter(llm.generate(tokens[:100], temp=0.0)))
    assert read[0] == 100
    assert relative_error(llm.scores[:100], fresh[:100]) < 1e-4
