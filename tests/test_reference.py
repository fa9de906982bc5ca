"""The engine against the float64 reference, on models it did not expect."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from helpers import F32, SHAPES, random_tokens, relative_error

from selfextend_gguf import Llama, plan, schedule_positions
from selfextend_gguf._native import schedule_step
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.reference import Reference
from selfextend_gguf.schedule import SCHEDULES

MODELS = [*SHAPES, "bundled"]


def steps_of(llm: Llama, n: int) -> list[int]:
    """The steps `eval` decodes n tokens in, if not asked for smaller ones."""
    steps = []
    while sum(steps) < n:
        steps.append(schedule_step(llm.self_extend, sum(steps), min(llm.n_batch, n - sum(steps))))
    return steps


@cache
def logits_with_cache(path: Path, llama: type, kind: str, flash_attn: bool, times: int = 4) -> np.ndarray:
    """Logits of random tokens, `times` the trained context."""
    n = times * Reference(path).n_ctx_train
    llm = llama(
        str(path),
        n_ctx=-(-n // 256) * 256,
        n_batch=32,  # flash attention on the CPU adds up in f16 for less than 64 queries at once, else in f32
        logits_all=True,
        verbose=False,
        flash_attn=flash_attn,
        type_k=KV_TYPES[kind],
        type_v=KV_TYPES["f32" if kind == "f32" else "f16"],
    )
    llm.eval(random_tokens(n, seed=5))
    return llm.scores[:n].astype(np.float64)


# The bundled model takes the reference ten seconds a schedule: the two of Self-Extend's paper must do for it.
@pytest.mark.parametrize(
    ("name", "schedule"),
    [(name, schedule) for name in MODELS for schedule in (SCHEDULES[:2] if name == "bundled" else SCHEDULES)],
)
def test_logits_equal_the_reference_at_eight_times_the_trained_context(model, name, schedule):
    path = model(name)
    reference = Reference(path)
    n = 8 * reference.n_ctx_train
    tokens = random_tokens(n, seed=5)
    llm = Llama(str(path), n_ctx=n, schedule=schedule, logits_all=True, verbose=False, **F32)
    llm.eval(tokens)
    wanted = reference.logits(tokens, steps_of(llm, n), llm.self_extend)
    assert relative_error(llm.scores[:n], wanted) < 1e-4
    # The comparison means something only if keys moved and moving them matters.
    assert llm.rewrite_stats.n_rewrites > 5
    assert relative_error(llm.scores[:n], logits_with_cache(path, llama_cpp.Llama, "f32", False, 8)) > 1e-2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rolling_back_leaves_no_trace(model, schedule):
    """However often a text is cut and rolled back, within a stage and across several: the logits of an uncut run."""
    path = model("norm-32")
    n = 6 * Reference(path).n_ctx_train
    tokens = random_tokens(n, seed=8)
    llm = Llama(str(path), n_ctx=n, schedule=schedule, logits_all=True, verbose=False, **F32)
    rng = np.random.default_rng(9)
    rollbacks = 0
    while llm.n_tokens < n:
        if rollbacks < 40 and rng.random() < 0.5:
            llm.n_tokens = max(0, llm.n_tokens - int(rng.choice([1, 3, 20, 150])))
            rollbacks += 1
        llm.eval(tokens[llm.n_tokens : llm.n_tokens + int(rng.integers(1, 60))])
    wanted = Reference(path).logits(tokens, steps_of(llm, n), llm.self_extend)
    assert relative_error(llm.scores[:n], wanted) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_any_chunking_and_pinned_parameters(model, name):
    """Cut at random, the text gets the logits of the uncut one: a token's keys depend on its index alone."""
    path = model(name)
    reference = Reference(path)
    train = reference.n_ctx_train
    n = 5 * train + 7
    tokens = random_tokens(n, seed=1)
    rng = np.random.default_rng(2)
    llm = Llama(
        str(path),
        n_ctx=6 * train,
        group_size=24,
        neighbor_window=train // 3,
        max_distance=train - 3,
        block_size=5,
        logits_all=True,
        verbose=False,
        **F32,
    )
    sizes = rng.integers(1, 40, n).tolist()
    at = 0
    for size in sizes:
        llm.eval(tokens[at : at + size])
        at += size
        if at >= n:
            break
    wanted = reference.logits(tokens, steps_of(llm, n), llm.self_extend)
    assert relative_error(llm.scores[:n], wanted) < 1e-4


@pytest.mark.parametrize("name", ["norm-32", "neox-64"])
def test_any_key_positions(model, name):
    """Positions that follow no schedule, forwards and backwards, with gaps and long runs."""
    path = model(name)
    reference = Reference(path)
    n = 600
    tokens = random_tokens(n, seed=3)
    llm = Llama(str(path), n_ctx=n, logits_all=True, verbose=False, **F32)
    engine = llm._engine
    rng = np.random.default_rng(4)
    asked: dict[int, np.ndarray] = {}
    steps, at = [], 0
    while at < n:
        size = int(min(n - at, rng.integers(20, 120)))
        positions = np.arange(at, dtype=np.int32)
        if at:
            kind = len(steps) % 3
            if kind == 0:
                positions = np.sort(rng.integers(0, at, at)).astype(np.int32)
            elif kind == 1:
                positions[: at // 2] = positions[: at // 2] // 3 + at // 4
        asked[at] = positions
        engine.set_key_positions(positions)
        llm._batch.set_batch(batch=tokens[at : at + size], n_past=at, logits_all=True)
        engine.decode(llm._batch.batch)
        assert np.array_equal(engine.key_positions, [*positions, *range(at, at + size)])
        shape = (size, llm.n_vocab())
        llm.scores[at : at + size] = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=shape)
        steps.append(size)
        at += size
    wanted = reference.logits(tokens, steps, lambda n0, n1: asked[n0])
    assert relative_error(llm.scores[:n], wanted) < 1e-4


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KV_TYPES if kind != "f32"])
@pytest.mark.parametrize("name", MODELS)
def test_rounded_caches_are_at_most_twice_as_far_off_as_plain_llama_cpp(model, name, kind, flash_attn):
    """Rewritten keys are rounded again; a key is rewritten a few times only, so the error stays bounded. For heads of
    64 and 128, llama.cpp multiplies quantised keys with a Hadamard matrix; for heads of 32 it does not."""
    times = 16 if kind in ("f16", "bf16") and not flash_attn else 4

    def error(llama: type, kind: str) -> float:
        exact = logits_with_cache(model(name), llama, "f32", False, times)
        rounded = logits_with_cache(model(name), llama, kind, flash_attn, times)
        return float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact))

    # Flash attention has an error of its own, which f32 keys show as well.
    assert error(Llama, kind) < 2 * max(error(llama_cpp.Llama, kind), error(Llama, "f32"))


def test_quantised_keys_without_hadamard_matrix(model, monkeypatch):
    """llama.cpp's own switch turns it off; keys of heads of 64 are then stored as heads of 32 are."""
    mixed = logits_with_cache(model("neox-64"), Llama, "q8_0", False)
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    unmixed = logits_with_cache.__wrapped__(model("neox-64"), Llama, "q8_0", False)
    exact = logits_with_cache(model("neox-64"), Llama, "f32", False)
    assert not np.array_equal(mixed, unmixed)
    assert relative_error(unmixed, exact) < 0.05


def test_reference_equals_llama_cpp_within_the_trained_context(model):
    """The oracle itself, checked against plain llama.cpp where neither groups anything."""
    for name in MODELS:
        reference = Reference(model(name))
        tokens = random_tokens(reference.n_ctx_train, seed=6)
        llm = llama_cpp.Llama(str(model(name)), n_ctx=512, logits_all=True, verbose=False, **F32)
        llm.eval(tokens)
        wanted = reference.logits(tokens, [len(tokens)], lambda n0, n1: np.arange(n0))
        assert relative_error(llm.scores[: len(tokens)], wanted) < 1e-4


def test_paper_attention_differs_by_the_window_rounding_only(model):
    """With one token a step and a block of one, schedule `paper` sees almost the distances of the paper.

    Paper, key outside the window:  q//G + W - W//G - k//G
    Here, boundary g = q - W:       q - (g - g//G + k//G) = W + (q - W)//G - k//G
    The two differ by at most one position, because q//G - W//G and (q - W)//G round differently.
    """
    size, window = 4, 24
    config = plan(96, 270, group_size=size, neighbor_window=window, block_size=1, schedule="paper")
    for q in range(window + 1, 270):
        ours = q - schedule_positions(config, q, q + 1)
        k = np.arange(q)
        paper = np.where(q - k < window, q - k, q // size + window - window // size - k // size)
        assert np.abs(ours - paper).max() <= 1
        assert np.array_equal(ours[q - window + 1 :], paper[q - window + 1 :])

    reference = Reference(model("neox-64"))
    tokens = random_tokens(120, seed=7)
    ours = reference.logits(tokens, [1] * 120, config)
    paper = reference.paper_logits(tokens, size, window)
    plain = reference.logits(tokens, [120], lambda n0, n1: np.arange(n0))
    # Before anything is grouped they are the same; afterwards ours is closer to the paper than plain attention is.
    assert relative_error(ours[: window + 1], paper[: window + 1]) < 1e-12
    assert np.linalg.norm(ours - paper) < np.linalg.norm(plain - paper)
