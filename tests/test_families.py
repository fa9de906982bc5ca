"""Every family of models: the keys turn as declared, and the engine either gets them right or says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import llama_cpp
import numpy as np
import pytest
from families import EXTENDED, FAMILIES, REFUSED, Family
from helpers import random_tokens, relative_error
from kv_state import read_keys, write_keys
from llama_cpp._internals import LlamaModel
from models_table import DOCUMENT, current_published, document
from oracle import Verdict, decode, examine, get_state, load, new_context, set_state, turn

TOKENS = random_tokens(24)  # more than a sliding window
N_CACHED = len(TOKENS) - 1
FAR, FAR_BY = np.arange(N_CACHED) < 12, 10  # the first 12 keys, moved 10 positions away from what follows


@pytest.fixture(scope="module")
def verdict_of(model) -> Callable[[str], Verdict]:
    return cache(lambda name: examine(FAMILIES[name], model(name)))


@pytest.mark.parametrize("family", EXTENDED, ids=lambda family: family.name)
def test_the_engine_equals_every_other_road(family, verdict_of):
    verdict = verdict_of(family.name)
    assert verdict.refused is None
    assert verdict.n_rewritten == family.kinds.count("R")
    assert set(verdict.errors) == {"state", "shift"} if family.k_shift else {"state"}
    assert max(verdict.errors.values()) < 1e-4
    assert verdict.rollback < 1e-3
    if verdict.n_rewritten:
        assert verdict.grouping > 1e-2  # the test would see keys that were not moved
    else:
        assert verdict.grouping == 0


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_refused_families_say_why(family, verdict_of):
    assert family.refused in verdict_of(family.name).refused


def test_the_documentation_says_what_the_engine_does(verdict_of):
    assert DOCUMENT.read_text(encoding="utf-8") == document(verdict_of, current_published())


# ---- what the families declare -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=EXTENDED, ids=lambda family: family.name)
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def loaded(family, model) -> Iterator[LlamaModel]:
    loaded = load(model(family.name))
    yield loaded
    loaded.close()


def test_logits_are_finite_and_depend_on_order(loaded):
    logits = decode(new_context(loaded), TOKENS)
    swapped = decode(new_context(loaded), [*TOKENS[:12][::-1], *TOKENS[12:]])
    assert np.isfinite(logits).all()
    assert 1 < np.abs(logits).max() < 20
    assert relative_error(swapped, logits) > 0.01


def test_keys_turn_as_declared(family, loaded):
    shift = 31
    here, there = new_context(loaded), new_context(loaded)
    decode(here, TOKENS)
    decode(there, TOKENS, position=shift)
    keys = read_keys(get_state(here))
    wanted = turn(keys, family, np.full(len(TOKENS), shift))
    for layer, (want, got) in enumerate(zip(wanted, read_keys(get_state(there)), strict=True)):
        first = layer == 0 and family.kinds[0] != "L"  # its input is the same at all positions, bit for bit
        if first or family.relative:
            assert relative_error(got, want) < (1e-5 if first else 1e-4), f"global layer {layer}"


def test_moved_keys(family, loaded):
    """Keys turned here give the logits of llama.cpp's K-shift, exactly if the family says so."""
    context = new_context(loaded)
    decode(context, TOKENS[:-1])
    state = get_state(context)
    near = decode(context, TOKENS[-1:], N_CACHED)

    keys = turn(read_keys(state), family, np.where(FAR, -FAR_BY, 0))
    turned = new_context(loaded)
    set_state(turned, write_keys(state, keys))
    far = decode(turned, TOKENS[-1:], N_CACHED)
    assert (relative_error(far, near) > 0.01) == any(family.global_layers)

    shifted = new_context(loaded)
    set_state(shifted, state)
    # The other keys move the other way, and the last token with them: the same distances.
    llama_cpp.llama_memory_seq_add(shifted.memory, 0, 12, -1, FAR_BY)
    by_shift = decode(shifted, TOKENS[-1:], N_CACHED + FAR_BY)
    assert (relative_error(by_shift, far) < 1e-4) == family.k_shift
