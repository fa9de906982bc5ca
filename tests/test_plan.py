"""Parameters: automatic ones reach the context, impossible ones are refused with a way out."""

from __future__ import annotations

import re

import numpy as np
import pytest

from selfextend_gguf import SelfExtendError, plan, schedule_positions
from selfextend_gguf._native import schedule_step
from selfextend_gguf.planning import context_within, default_context, longest_context
from selfextend_gguf.schedule import SCHEDULES


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("train", [8, 256, 2048, 4096, 8192])
@pytest.mark.parametrize("times", [1.2, 2, 4, 16])
def test_automatic_parameters_reach_the_context(train, times, schedule):
    config = plan(train, int(train * times), schedule=schedule)
    assert config.is_active
    assert config.longest_context >= config.n_ctx
    assert 0 < config.neighbor_window < config.max_distance <= train


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_within_the_trained_context_nothing_is_grouped(schedule):
    config = plan(4096, 4096, schedule=schedule)
    assert not config.is_active
    assert config.group_size == 1
    assert config.n_moves == 0
    assert config.longest_context >= 4096
    assert "plain llama.cpp" in str(config)


def test_the_config_explains_itself():
    assert str(plan(4096, 16384, group_size=8, neighbor_window=1024)) == (
        "Up to 16384 tokens (4x the trained 4096): beyond 4096 tokens, "
        "older tokens share key positions in groups of 8, at least the latest 1024 keep their exact distance, "
        "and no distance reaches 4096 (schedule selfextend, block 586)."
    )


@pytest.mark.parametrize(
    ("schedule", "begins", "sharing", "promise", "block"),
    [
        (
            "paper",
            "beyond the neighbor window of 1024 tokens",
            "older tokens share key positions in groups of 7",
            "the latest 1024 keep their exact distance, and no distance reaches 4096",
            512,
        ),
        (
            "adagrope",
            "beyond 4096 tokens",
            "older tokens share key positions in groups that grow with the distance and with the text, up to 14",
            "the latest 128 keep their exact distance, and no distance reaches 2048",
            192,
        ),
        (
            "rerope",
            "beyond 4096 tokens",
            "all older tokens share one key position",
            "the latest 1024 keep their exact distance, and no distance reaches 4096",
            512,
        ),
        (
            # 16384 - 1024 tokens beyond the window, 4096 - 1024 - 512 - 512 + 1 = 2049 positions: 7.496 a position.
            "leaky-rerope",
            "beyond 4096 tokens",
            "the distance of older tokens grows by 1 every 7.5 tokens",
            "the latest 1024 keep their exact distance, and no distance reaches 4096",
            512,
        ),
    ],
)
def test_every_schedule_explains_itself(schedule, begins, sharing, promise, block):
    assert str(plan(4096, 16384, schedule=schedule)) == (
        f"Up to 16384 tokens (4x the trained 4096): {begins}, {sharing}, at least {promise} "
        f"(schedule {schedule}, block {block})."
    )


@pytest.mark.parametrize("schedule", ["adagrope", "rerope", "leaky-rerope"])
@pytest.mark.parametrize("n_ctx", [100, 1024])
def test_a_parameter_without_use_is_refused(schedule, n_ctx):
    with pytest.raises(SelfExtendError, match=f"schedule {schedule} has no use for group_size: .*; leave it out"):
        plan(256, n_ctx, schedule=schedule, group_size=8)


def test_parameters_of_the_other_schedules():
    # adagrope: P = 128 positions; room 128//4 + 1 = 33, a quarter for the window: 8. Of the other 25, a sixth is for
    # the largest step (4) and half between two moves (12). Beyond 256 tokens, 15 blocks of 12 reach 436:
    #   32 once (G = 1), 16 twice (G = 2), 128 - 48 = 80 three times: 32 + 32 + 240 = 304 < 436
    #   and, three not being a power of two, those 80 four times: 32 + 32 + 320 = 384 < 436
    #   8 four times (G = 4), 72 five times: 32 + 32 + 32 + 360 = 456 >= 436.
    config = plan(256, 430, schedule="adagrope")
    assert (config.max_distance, config.neighbor_window, config.n_batch, config.block_size) == (128, 8, 4, 12)
    assert config.group_size == 5
    assert config.n_moves == 15
    assert config.longest_context == 256 + (456 - 256) // 12 * 12
    # All positions for perplexity, as the paper does.
    assert plan(256, 1024, schedule="adagrope", max_distance=256).max_distance == 256

    # rerope reaches any length: its farthest distance is W + block - 1. All but the latest W tokens share a position.
    config = plan(256, 2**30, schedule="rerope")
    assert config.longest_context == 2**30
    assert config.group_size == 2**30 - 64

    # leaky-rerope: 256 - 64 - 64 - 32 + 1 = 97 positions for the 1024 - 64 = 960 tokens beyond the window, 9.9 each.
    config = plan(256, 1024, schedule="leaky-rerope")
    assert (config.neighbor_window, config.block_size, config.n_batch, config.group_size) == (64, 64, 32, 10)
    assert config.longest_context == 1024


@pytest.mark.parametrize("schedule", ["selfextend", "paper", "adagrope", "leaky-rerope"])
def test_the_reach_of_every_schedule_is_named(schedule):
    with pytest.raises(SelfExtendError, match="beyond the reach") as error:
        plan(256, 10**6, schedule=schedule)
    longest = int(re.search(r"at most (\d+) tokens", str(error.value)).group(1))
    assert plan(256, longest, schedule=schedule).group_size == 256
    with pytest.raises(SelfExtendError, match="beyond the reach"):
        plan(256, longest + 1, schedule=schedule)


def test_the_smallest_group_size_that_fits_is_chosen():
    config = plan(256, 4096)
    smaller = config.group_size - 1
    with pytest.raises(SelfExtendError, match=f"take a group size of at least {config.group_size}"):
        plan(256, 4096, group_size=smaller, max_distance=config.max_distance)


def test_larger_distances_are_used_only_where_it_takes_them():
    assert plan(256, 4096).max_distance == 192  # 3/4
    assert plan(256, longest_context(256)).max_distance == 256
    # Groups of 42 reach 4096 tokens with all distances only.
    assert plan(256, 4096, group_size=42).max_distance == 256
    assert plan(256, 256).max_distance == 256


def test_the_suggestion_of_a_refusal_works():
    with pytest.raises(SelfExtendError) as error:
        plan(256, 4096, group_size=4, neighbor_window=100)
    size, longest = re.search(r"at least (\d+), or at most (\d+) tokens", str(error.value)).groups()
    assert plan(256, 4096, group_size=int(size), neighbor_window=100)
    assert plan(256, int(longest), group_size=4, neighbor_window=100)
    with pytest.raises(SelfExtendError):
        plan(256, int(longest) + 1, group_size=4, neighbor_window=100)


def test_beyond_the_reach_of_the_method():
    longest = longest_context(256)
    assert plan(256, longest).group_size == 256
    with pytest.raises(SelfExtendError, match=f"at most {longest} tokens"):
        plan(256, longest + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 0}, "group_size must be between 1 and 256"),
        ({"group_size": -3}, "group_size must be between 1 and 256"),
        ({"group_size": 2.5}, "group_size must be a whole number"),
        ({"neighbor_window": 300}, r"neighbor_window must be between 1 and 254 \(the model is trained on 256 tokens\)"),
        ({"neighbor_window": 0}, "neighbor_window must be between"),
        ({"max_distance": 257}, "max_distance must be between 8 and 256"),
        ({"block_size": 0}, "block_size must be between"),
        ({"schedule": "adagrope", "neighbor_window": 32}, "neighbor_window must be between 1 and 31"),
        ({"schedule": "adagrope", "block_size": 22}, "block_size must be between 1 and 21 with a neighbor window of 8"),
        (
            {"schedule": "yarn"},
            "unknown schedule 'yarn'; choose from selfextend, paper, adagrope, rerope, leaky-rerope",
        ),
    ],
)
@pytest.mark.parametrize("n_ctx", [100, 1024])
def test_bad_parameters_are_refused_even_where_they_would_not_be_used(arguments, message, n_ctx):
    with pytest.raises(SelfExtendError, match=message):
        plan(256, n_ctx, **arguments)


@pytest.mark.parametrize(("n_ctx_train", "n_ctx"), [(256, 4096), (2048, 32768), (4096, 65536), (131072, 524288)])
def test_no_key_is_rewritten_more_than_eight_times(n_ctx_train, n_ctx):
    """The engine stores angles of P(k) - P(0): a key is rewritten when that changes."""
    config = plan(n_ctx_train, n_ctx)
    stored, rewrites = np.zeros(n_ctx, np.int64), np.zeros(n_ctx, np.int64)
    at = 0
    while at < n_ctx:
        step = schedule_step(config, at, n_ctx - at)
        angles = schedule_positions(config, at, at + step).astype(np.int64)
        frame = angles[0] if at else 0
        rewrites[:at] += angles - frame != stored[:at]
        stored[:at] = angles - frame
        stored[at : at + step] = np.arange(at, at + step) - frame
        at += step
    assert rewrites.max() <= 8
    assert 1 < rewrites[: n_ctx // 2].mean() < 7


def test_the_default_context():
    assert default_context(4096) == 4 * 4096
    assert default_context(256) == 1024
    # A group size of 2 reaches D + D - W - n_batch - block + 1 = 256 + 256 - 64 - 32 - 64 + 1 = 353 tokens: within the
    # 256 tokens trained on when rounded down to llama.cpp's multiple.
    assert default_context(256, group_size=2) == 256
    assert default_context(256, group_size=6) == 512
    assert default_context(256, schedule="rerope") == 1024
    with pytest.raises(SelfExtendError, match="neighbor_window must be between"):
        default_context(256, neighbor_window=1000)


# Reach has one definition: the longest context is what `plan` accepts, its refusal names, and default contexts respect.
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"group_size": 6},
        {"neighbor_window": 200},
        {"block_size": 7, "schedule": "paper"},
        {"schedule": "adagrope"},
        {"schedule": "adagrope", "max_distance": 256},
        {"schedule": "leaky-rerope"},
        {"schedule": "leaky-rerope", "neighbor_window": 252},
        {"schedule": "rerope", "neighbor_window": 252},
    ],
)
def test_the_longest_context_is_the_last_that_plan_accepts(parameters):
    longest = longest_context(256, **parameters)
    assert plan(256, longest, **parameters).n_ctx == longest
    with pytest.raises(SelfExtendError, match=rf"at most {longest} tokens|must be between 1 and {longest}\b"):
        plan(256, longest + 1, **parameters)


def test_contexts_of_schedules_that_choose_their_own_groups():
    # 256 distances, group size 256 at most: see the reach of each schedule.
    assert longest_context(256, schedule="adagrope") == 16828
    assert longest_context(256, schedule="leaky-rerope") == 24896
    # n_batch 1, block 1: 256 - 252 - 1 - 1 + 1 = 3 positions for the tokens beyond the window, 256 tokens each.
    assert longest_context(256, schedule="leaky-rerope", neighbor_window=252) == 252 + 256 * 3
    assert default_context(256, schedule="leaky-rerope", neighbor_window=252) == 1020 // 256 * 256
    assert default_context(256, schedule="adagrope") == 1024
    assert context_within(256, 4096, schedule="adagrope") == 4096
    assert context_within(256, 10**9, schedule="adagrope") == 16828 // 256 * 256
