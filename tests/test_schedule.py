"""Schedules: C equals numpy, integer for integer, and both keep what they promise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfextend_gguf import plan, schedule_positions
from selfextend_gguf._native import schedule_step
from selfextend_gguf.errors import ConfigError
from selfextend_gguf.schedule import schedule_positions_numpy


def test_positions_by_hand():
    # L = D = 32, W = 8, G = 4, block 4; 40 tokens are cached, 4 more come: n0 = 40, n1 = 44.
    # The oldest key must move up by at least n1 - D = 12. g - g//4 >= 12 first holds at g = 15 (15 - 3 = 12);
    # the next multiple of the block is g = 16, and 40 - 16 = 24 >= W.
    config = plan(32, 64, group_size=8, neighbor_window=8, block_size=4)
    config = dataclasses.replace(config, group_size=4)
    # P(k) = 16 - 4 + k//4 for k < 16: four times 12, 13, 14, 15; then 16, 17, ... 39.
    wanted = np.r_[np.repeat([12, 13, 14, 15], 4), 16:40]
    assert np.array_equal(schedule_positions(config, 40, 44), wanted)
    # Farthest distance: token 43 sees token 0 at 43 - 12 = 31 < D.


def test_paper_positions_by_hand():
    # W = 8, block 4: g = (40 - 8)//4*4 = 32; P(k) = 32 - 32//8 + k//8 = 28 + k//8 for k < 32.
    config = plan(32, 64, group_size=8, neighbor_window=8, block_size=4, schedule="paper")
    wanted = np.r_[np.repeat([28, 29, 30, 31], 8), 32:40]
    assert np.array_equal(schedule_positions(config, 40, 44), wanted)


@pytest.mark.parametrize("schedule", ["selfextend", "paper"])
@pytest.mark.parametrize("times", [1.1, 2, 7, 20])
@pytest.mark.parametrize("train", [16, 100, 256])
def test_c_equals_numpy_and_keeps_its_promises(train, times, schedule):
    config = plan(train, int(train * times), schedule=schedule)
    rng = np.random.default_rng(int(train * times))
    n_total = 0
    while n_total < config.n_ctx:
        n_cached = n_total
        n_total = min(config.n_ctx, n_cached + int(rng.integers(1, config.n_batch + 1)))
        positions = schedule_positions(config, n_cached, n_total)
        assert positions.dtype == np.int32
        assert np.array_equal(positions, schedule_positions_numpy(config, n_cached, n_total))
        k = np.arange(n_cached)
        grouped = positions != k
        # Monotone, in steps of 0 or 1; never a distance of max_distance or more.
        assert np.isin(np.diff(positions), [0, 1]).all()
        if n_total > train and n_cached:
            assert n_total - 1 - positions[0] < config.max_distance
        # The latest neighbor_window tokens are exact.
        if grouped.any():
            assert n_cached - 1 - np.flatnonzero(grouped)[-1] >= config.neighbor_window
        if schedule == "selfextend" and n_total <= train:
            assert not grouped.any()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_plan_reaches_what_it_says(data):
    """Whatever can be planned can be read to the end, in steps of any size up to n_batch."""
    train = data.draw(st.integers(8, 400))
    distance = data.draw(st.none() | st.integers(8, train))
    window = data.draw(st.none() | st.integers(1, (distance or train) - 2))
    arguments = {
        "max_distance": distance,
        "neighbor_window": window,
        "block_size": data.draw(st.none() | st.integers(1, train)),
        "schedule": data.draw(st.sampled_from(["selfextend", "paper"])),
    }
    n_ctx = data.draw(st.integers(train + 1, 30 * train))
    try:
        config = plan(train, n_ctx, **arguments)
    except ConfigError:
        return
    assert config.longest_context >= n_ctx
    for n_total in [*data.draw(st.lists(st.integers(1, n_ctx), min_size=1, max_size=20)), n_ctx]:
        n_cached = max(0, n_total - data.draw(st.integers(1, config.n_batch)))
        positions = schedule_positions(config, n_cached, n_total)
        assert np.array_equal(positions, schedule_positions_numpy(config, n_cached, n_total))


@pytest.mark.parametrize("counts", [(-1, 5), (6, 5), (0, 2**31)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ConfigError, match="n_cached <= n_total"):
        schedule_positions(plan(64, 256), *counts)


@pytest.mark.parametrize("schedule", ["selfextend", "paper"])
@pytest.mark.parametrize("arguments", [{}, {"block_size": 5}, {"max_distance": 50, "neighbor_window": 9}])
def test_a_step_ends_where_the_boundary_moves(schedule, arguments):
    """Then every token has the boundary that it would have alone, however the text is cut."""
    config = plan(64, 700, schedule=schedule, **arguments)

    def alone(n: int) -> list[int]:
        return schedule_positions_numpy(config, n, n + 1).tolist()

    at = 0
    while at < 700:
        step = schedule_step(config, at, 700 - at)
        together = schedule_positions(config, at, at + step).tolist()
        for i in range(step):
            assert alone(at + i) == together + list(range(at, at + i))
        if at + step < 700 and at + step >= 64:
            assert alone(at + step) != together + list(range(at, at + step))
        # From the middle of a step, the rest of it.
        assert schedule_step(config, at + step // 2, 700 - at - step // 2) == step - step // 2
        assert schedule_step(config, at, 1) == 1
        at += step


def test_a_step_that_is_too_large_is_refused():
    config = plan(64, 256)
    with pytest.raises(ConfigError, match="neighbor window"):
        schedule_positions(config, 60, 200)
    with pytest.raises(ConfigError, match="neighbor window"):
        schedule_positions_numpy(config, 60, 200)
