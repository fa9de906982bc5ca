"""Schedules: C equals numpy, integer for integer, and both keep what they promise."""

from __future__ import annotations

import dataclasses
import re
import zlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfextend_gguf import plan, schedule_positions
from selfextend_gguf._native import schedule_step
from selfextend_gguf.errors import ConfigError
from selfextend_gguf.schedule import RULES, SCHEDULES, SelfExtendConfig, adagrope_map, schedule_positions_numpy


def steps_of(config: SelfExtendConfig) -> list[tuple[int, int]]:
    """The steps [n_cached, n_total) in which the longest text is read."""
    steps, at = [], 0
    while at < config.n_ctx:
        steps.append((at, at + schedule_step(config, at, config.n_ctx - at)))
        at = steps[-1][1]
    return steps


# ---- by hand -------------------------------------------------------------------------------------------------------


def test_positions_by_hand():
    # L = D = 32, W = 8, G = 4, block 4; 40 tokens are cached, 4 more come: n0 = 40, n1 = 44.
    # The oldest key must move up by at least n1 - D = 12. g - g//4 >= 12 first holds at g = 15 (15 - 3 = 12);
    # the next multiple of the block is g = 16, and 40 - 16 = 24 >= W.
    config = plan(32, 64, group_size=8, neighbor_window=8, max_distance=32, block_size=4)
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


def test_rerope_positions_by_hand():
    # W = 8, block 4: g = (40 - 8)//4*4 = 32 again; P(k) = max(k, 32).
    config = plan(32, 64, neighbor_window=8, block_size=4, schedule="rerope")
    assert np.array_equal(schedule_positions(config, 40, 44), np.r_[[32] * 32, 32:40])
    # Farthest distance: 43 - 32 = 11 = W + block - 1, and so it stays for any text.
    assert np.array_equal(schedule_positions(config, 10_000, 10_004), np.r_[[9992] * 9992, 9992:10_000])


def test_leaky_rerope_positions_by_hand():
    # L = D = 32, W = 8, block 4, and n_batch = (32 - 8)//6 = 4. Of the 32 distances, 8 + 4 + 4 - 1 = 15 are taken by
    # window, block and largest step; 17 are left for the 64 - 8 = 56 tokens beyond the window: slope 17/56.
    config = plan(32, 64, neighbor_window=8, block_size=4, schedule="leaky-rerope")
    # g = 32, 32 * 17/56 = 9.7: P(k) = 32 - 9 + floor(k * 17/56).
    #   k          0 1 2 3  4 5 6  7 ...
    #   k * 17/56  0 .3 .6 .9  1.2 1.5 1.8  2.1
    positions = schedule_positions(config, 40, 44)
    assert positions[:8].tolist() == [23, 23, 23, 23, 24, 24, 24, 25]
    assert positions[31:].tolist() == [32, *range(32, 40)]  # 31 * 17/56 = 9.4


def test_restart_positions_by_hand():
    # L = D = 32, W = 8, r = 4, block 4, n_batch 4. Far keys are seen from 4 on, up to 4 - 1 + 4 - 1 = 6 later, so that
    # 31 - 4 - 6 = 21 positions after the first are left for them.
    config = plan(32, 64, neighbor_window=8, block_size=4, max_distance=32, schedule="restart")
    # g = 32 > 21: groups of 2, P(k) = 32 + 4 - 16 + k//2.
    wanted = np.r_[np.repeat(range(20, 36), 2), 32:40]
    assert np.array_equal(schedule_positions(config, 40, 44), wanted)
    # Token 40 sees token 31 at 40 - 35 = 5 and token 32, the first of the window, at 8. With g = 44 groups of 3 begin.
    assert schedule_positions(config, 52, 53)[:4].tolist() == [44 + 4 - 14] * 3 + [44 + 4 - 13]


def test_dca_positions_by_hand():
    # W = 8, block 8: g = (45 - 8)//8*8 = 32, and all chunks of 8 before it lie on [24, 32).
    config = plan(32, 64, neighbor_window=8, block_size=8, schedule="dca")
    assert np.array_equal(schedule_positions(config, 45, 47), np.r_[np.tile(range(24, 32), 4), 32:45])
    # Farthest distance: 46 - 24 = 22 < 32, and so it stays for any text.
    assert schedule_positions(config, 10_005, 10_006).min() == 9992 - 8


def test_adagrope_map_by_hand():
    # P = 16, N = 24. G = 1: 16 < 24, a power of two, int(0.25 * 16 / 1) = 4 positions are fixed; 12 left for 20.
    # G = 2: 12 * 2 = 24 >= 20, so the 12 are reused once or twice: 20 - 12 = 8 far ones twice, 4 near ones once.
    assert adagrope_map(16, 24).tolist() == [*range(8), *np.repeat(range(8, 16), 2)]
    # P = 16, N = 64.  G   fixed   left   uncovered   left * G before fixing
    #                  1   4       12     60          16
    #                  2   2       10     56          24
    #                  3   -                          30
    #                  4   1       9      52          40
    #                  5   -                          45
    #                  6: 54 >= 52, so 52 - 9 * 5 = 7 far ones six times, 2 near ones five times.
    wanted = np.repeat(range(16), [1] * 4 + [2] * 2 + [4] + [5] * 2 + [6] * 7)
    assert adagrope_map(16, 64).tolist() == wanted.tolist()


def test_adagrope_positions_by_hand():
    # L = P = 16: W = 1, n_batch = 1, block 2. Token 62 is in the block that ends with token 63: the map for N = 64,
    # P(k) = 63 - f(63 - k), with the f above.
    config = plan(16, 64, max_distance=16, schedule="adagrope")
    assert (config.neighbor_window, config.n_batch, config.block_size, config.group_size) == (1, 1, 2, 6)
    f = np.repeat(range(16), [1] * 4 + [2] * 2 + [4] + [5] * 2 + [6] * 7)
    assert np.array_equal(schedule_positions(config, 62, 64), 63 - f[63 - np.arange(62)])


# ---- the published maps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1.3, 5, 40])
@pytest.mark.parametrize("n_positions", [8, 24, 100, 256])
def test_adagrope_covers_every_distance_with_the_positions_it_has(n_positions, times):
    n = int(n_positions * times)
    f = adagrope_map(n_positions, n)
    assert len(f) == n
    assert np.isin(np.diff(f), [0, 1]).all()
    assert (f[0], f[-1]) == (0, n_positions - 1)
    exact = n_positions // 4
    assert np.array_equal(f[:exact], range(exact))
    reuse = np.bincount(f)
    assert (np.diff(reuse) >= 0).all()  # farther positions are reused more
    assert reuse[-1] <= -(-2 * n // n_positions)  # half of the positions at least are reused most or once less


def test_adagrope_sees_what_the_paper_says_at_the_end_of_each_block():
    config = plan(64, 900, schedule="adagrope")
    for n0, n1 in steps_of(config)[1:-1]:
        last = n1 - 1
        ours = last - schedule_positions(config, n0, n1)
        assert np.array_equal(ours, adagrope_map(config.max_distance, n1)[last - np.arange(n0)])


def test_rerope_caps_the_distance():
    config = plan(64, 900, schedule="rerope")
    for n0, n1 in steps_of(config)[1:]:
        for q in range(n0, n1):
            cap = q - schedule_positions(config, n0, n1)[0]
            assert config.neighbor_window <= cap < config.neighbor_window + config.block_size
            assert np.array_equal(q - schedule_positions(config, n0, n1), np.minimum(q - np.arange(n0), cap))


def test_leaky_rerope_is_less_than_one_off():
    """Published: w + (q - k - w) / k' beyond a window w, with a real factor k'. The window is that of the boundary."""
    config = plan(64, 900, schedule="leaky-rerope")
    left = config.max_distance - config.neighbor_window - config.block_size - config.n_batch + 1
    slope = Fraction(left, config.n_ctx - config.neighbor_window)
    for n0, n1 in steps_of(config)[1:]:
        positions = schedule_positions(config, n0, n1)
        g = int(np.flatnonzero(positions != np.arange(n0))[-1]) + 1
        w = n0 - g
        for k in range(0, g, 7):
            published = w + (n0 - k - w) * slope
            assert abs(int(n0 - positions[k]) - published) < 1


# ---- what every schedule promises ----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
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
        # Monotone, in steps of 0 or 1, but for two schedules; keys move towards the queries only, and never reach them;
        # never a distance of max_distance or more.
        back = 1 + np.flatnonzero(~np.isin(np.diff(positions), [0, 1]))
        if schedule == "restart":
            assert len(back) <= 1 and not grouped[back].any()  # where the window begins
        elif schedule == "dca":
            assert (back % config.block_size == 0).all()
        else:
            assert len(back) == 0
        assert (positions >= k).all() and (positions < n_cached).all()
        if n_total > train and n_cached:
            assert n_total - 1 - positions.min() < config.max_distance
        # No more tokens share a position than the config says; restart's share those of the window too.
        if n_cached:
            assert np.bincount(positions[grouped] if schedule == "restart" else positions, minlength=1).max() <= (
                config.group_size
            )
        # The latest neighbor_window tokens are exact.
        if grouped.any():
            assert n_cached - 1 - np.flatnonzero(grouped)[-1] >= config.neighbor_window
        if schedule != "paper" and n_total <= train:
            assert not grouped.any()


def outcome(function, *arguments):
    """What a function returns, as a list; "refused" if it raises ConfigError."""
    try:
        return function(*arguments).tolist()
    except ConfigError:
        return "refused"


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_every_plan_reaches_what_it_says(data):
    """Whatever can be planned can be read to the end, in steps of any size up to n_batch; C and numpy agree on which
    larger ones can be done."""
    train = data.draw(st.integers(8, 400))
    distance = data.draw(st.none() | st.integers(8, train))
    schedule = data.draw(st.sampled_from(SCHEDULES))
    arguments = {
        "max_distance": distance,
        "neighbor_window": data.draw(st.none() | st.integers(1, RULES[schedule].room(distance or train) - 2)),
        "block_size": data.draw(st.none() | st.integers(1, train)),
        "schedule": schedule,
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
        assert n_total <= train or n_cached == 0 or n_total - 1 - positions.min() < config.max_distance
        n_cached = data.draw(st.integers(0, n_total))
        wanted = outcome(schedule_positions_numpy, config, n_cached, n_total)
        assert outcome(schedule_positions, config, n_cached, n_total) == wanted


@pytest.mark.parametrize("counts", [(-1, 5), (6, 5), (0, 2**31)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ConfigError, match="n_cached <= n_total"):
        schedule_positions(plan(64, 256), *counts)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("arguments", [{}, {"block_size": 4}, {"max_distance": 50, "neighbor_window": 9}])
def test_a_step_ends_where_the_key_positions_change(schedule, arguments):
    """Then every token has the key positions that it would have alone, however the text is cut."""
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


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("times", [1.1, 3, 20])
def test_the_number_of_moves_is_known_in_advance(times, schedule):
    config = plan(128, int(128 * times), schedule=schedule)
    if schedule == "selfextend":  # an upper bound, for its moves depend on how groups fall into blocks
        assert config.n_moves - 1 <= len(steps_of(config)) - 1 <= config.n_moves
    else:
        assert config.n_moves == len(steps_of(config)) - 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_how_often_a_key_is_rewritten(schedule):
    """Angles are stored in relation to the oldest key's (see native/selfextend.h): P(k) - P(0) is what counts."""
    config = plan(256, 4096, schedule=schedule)
    stored, n_rewrites = np.zeros(0), np.zeros(4096)
    for n0, n1 in steps_of(config):
        positions = schedule_positions(config, n0, n1)
        frame = positions[0] if n0 else 0
        n_rewrites[:n0] += stored != positions - frame
        stored = np.r_[positions, n0:n1] - frame
    average = n_rewrites[:2048].mean()  # the younger half has not lived its life yet
    if schedule == "restart":  # all grouped keys whenever their group size grows
        assert 10 < average < n_rewrites.max() <= config.n_regroupings + 5
    elif config.n_regroupings:
        # A key's place in relation to the oldest only falls, from at most P - 1 to 0.
        assert 10 < average < n_rewrites.max() < config.max_distance < config.n_moves
    else:
        assert average < 3.5
        assert n_rewrites.max() <= 5


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "paper"])
def test_a_step_that_is_too_large_is_refused(schedule):
    config = plan(64, 256, schedule=schedule)
    with pytest.raises(ConfigError, match="neighbor window"):
        schedule_positions(config, 60, 200)
    with pytest.raises(ConfigError, match="neighbor window"):
        schedule_positions_numpy(config, 60, 200)


@pytest.mark.parametrize("n_cached", [0, 10, 63, 64, 65, 90, 200])
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name not in ("selfextend", "paper")])
def test_the_suggestion_of_a_refused_step_works(schedule, n_cached):
    config = plan(64, 256, schedule=schedule)
    with pytest.raises(ConfigError) as error:
        schedule_positions(config, n_cached, 256)
    most = int(re.search(r"decode at most (\d+)", str(error.value)).group(1))
    assert most >= (config.n_batch if n_cached >= 64 else 64 - n_cached)
    assert len(schedule_positions(config, n_cached, n_cached + most)) == n_cached
    with pytest.raises(ConfigError):
        schedule_positions(config, n_cached, n_cached + most + 1)


def test_numbers_that_fit_no_step_are_refused():
    """plan does not make such; they are what a C program may ask for."""
    config = dataclasses.replace(plan(64, 256, schedule="rerope"), neighbor_window=60, block_size=20)
    with pytest.raises(ConfigError, match="take smaller blocks or a smaller window"):
        schedule_positions(config, 159, 160)
    config = dataclasses.replace(plan(64, 256, schedule="adagrope"), neighbor_window=60)
    with pytest.raises(ConfigError, match="take smaller blocks or a smaller window"):
        schedule_positions(config, 159, 160)
    for schedule in ("leaky-rerope", "adagrope", "restart"):
        config = dataclasses.replace(plan(64, 256, schedule=schedule), max_distance=65)
        with pytest.raises(Exception, match="max_distance <= n_ctx_train"):
            schedule_positions(config, 159, 160)


def test_leaky_rerope_does_not_leave_the_text_that_its_slope_is_for():
    config = plan(64, 256, schedule="leaky-rerope")
    for positions in (schedule_positions, schedule_positions_numpy):
        with pytest.raises(ConfigError, match="the slope of leaky-rerope is that for 256 tokens"):
            positions(config, 256, 257)


# ---- what must not change ------------------------------------------------------------------------------------------

# schedule, trained context, context, arguments of plan; then (group_size, neighbor_window, max_distance, block_size,
# n_batch, longest_context, n_moves), steps, checksum of the key positions.
PINNED = [
    ("selfextend", 16, 40, {}, (5, 4, 16, 5, 2, 40, 6), 7, 0xF587058D),
    ("selfextend", 100, 110, {}, (2, 25, 100, 50, 12, 114, 1), 2, 0xA415B683),
    ("selfextend", 256, 4096, {}, (42, 64, 256, 66, 32, 4151, 60), 61, 0xA8EA5190),
    ("selfextend", 256, 200, {}, (1, 64, 256, 65, 32, 256, 0), 1, 0x00000000),
    ("selfextend", 4096, 16384, {}, (8, 1024, 4096, 586, 512, 17921, 24), 25, 0x2ECC0C9F),
    ("selfextend", 2048, 32768, {}, (42, 512, 2048, 525, 256, 33044, 60), 61, 0x4A57B1C9),
    ("selfextend", 64, 700, {"block_size": 5}, (19, 16, 64, 5, 8, 712, 135), 136, 0x86F12EED),
    ("selfextend", 64, 700, {"max_distance": 50, "neighbor_window": 9}, (31, 9, 50, 14, 6, 710, 48), 48, 0xF85B1080),
    (
        "selfextend",
        256,
        1024,
        {"group_size": 40, "neighbor_window": 32},
        (40, 32, 256, 66, 37, 5014, 12),
        13,
        0x78B890E9,
    ),
    (
        "selfextend",
        96,
        480,
        {"group_size": 24, "neighbor_window": 32, "max_distance": 93, "block_size": 5},
        (24, 32, 93, 5, 10, 1174, 81),
        82,
        0x99621999,
    ),
    ("paper", 16, 40, {}, (5, 4, 16, 4, 2, 44, 8), 9, 0xAA5D2049),
    ("paper", 100, 110, {}, (2, 25, 100, 25, 12, 139, 3), 4, 0x5209CC72),
    ("paper", 256, 4096, {}, (41, 64, 256, 64, 32, 4136, 62), 63, 0xAC7FBC59),
    ("paper", 256, 200, {}, (1, 64, 256, 64, 32, 256, 0), 3, 0x14B2E31A),
    ("paper", 4096, 16384, {}, (7, 1024, 4096, 512, 512, 16390, 29), 30, 0x22179766),
    ("paper", 2048, 32768, {}, (41, 512, 2048, 512, 256, 32808, 62), 63, 0x51697BFC),
    ("paper", 64, 700, {"block_size": 5}, (19, 16, 64, 5, 8, 712, 136), 137, 0xFC197451),
    ("paper", 64, 700, {"max_distance": 50, "neighbor_window": 9}, (30, 9, 50, 13, 6, 717, 53), 54, 0x48582545),
    ("paper", 256, 1024, {"group_size": 40, "neighbor_window": 32}, (40, 32, 256, 64, 37, 5092, 15), 16, 0x59EA519B),
    (
        "paper",
        96,
        480,
        {"group_size": 24, "neighbor_window": 32, "max_distance": 93, "block_size": 5},
        (24, 32, 93, 5, 10, 1174, 89),
        90,
        0xF74FA018,
    ),
]


@pytest.mark.parametrize(("schedule", "train", "n_ctx", "arguments", "numbers", "n_steps", "checksum"), PINNED)
def test_the_first_two_schedules_stay_what_they_are(schedule, train, n_ctx, arguments, numbers, n_steps, checksum):
    """Published results depend on them: integer for integer what version 0.1.0 computed, with all distances."""
    c = plan(train, n_ctx, schedule=schedule, **{"max_distance": train, **arguments})
    got = (c.group_size, c.neighbor_window, c.max_distance, c.block_size, c.n_batch, c.longest_context, c.n_moves)
    assert got == numbers
    crc = 0
    for n0, n1 in steps_of(c):
        for step in (n1 - n0, (n1 - n0 + 1) // 2):
            crc = zlib.crc32(schedule_positions(c, n0, n0 + step).astype("<i4").tobytes(), crc)
    assert (len(steps_of(c)), crc) == (n_steps, checksum)
