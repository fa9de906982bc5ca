"""Parameters: automatic ones reach the context, impossible ones are refused with a way out."""

from __future__ import annotations

import re

import pytest

from selfextend_gguf import SelfExtendError, plan
from selfextend_gguf.config import longest_context


@pytest.mark.parametrize("train", [256, 2048, 4096, 8192])
@pytest.mark.parametrize("times", [1.01, 2, 4, 16])
def test_automatic_parameters_reach_the_context(train, times):
    config = plan(train, int(train * times))
    assert config.is_active
    assert config.longest_context >= config.n_ctx
    assert 0 < config.neighbor_window < config.max_distance <= train


def test_within_the_trained_context_nothing_is_grouped():
    config = plan(4096, 4096)
    assert not config.is_active
    assert config.group_size == 1
    assert "plain llama.cpp" in str(config)


def test_the_config_explains_itself():
    assert str(plan(4096, 16384, group_size=8, neighbor_window=1024)) == (
        "Up to 16384 tokens (4x the trained 4096): beyond 4096 tokens, "
        "older tokens share key positions in groups of 8, at least the latest 1024 keep their exact distance, "
        "and no distance reaches 4096 (schedule selfextend, block 586)."
    )


def test_the_smallest_group_size_that_fits_is_chosen():
    config = plan(256, 4096)
    smaller = config.group_size - 1
    with pytest.raises(SelfExtendError, match=f"take a group size of at least {config.group_size}"):
        plan(256, 4096, group_size=smaller)


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
        ({"schedule": "yarn"}, "unknown schedule 'yarn'; choose from selfextend, paper"),
    ],
)
@pytest.mark.parametrize("n_ctx", [100, 1024])
def test_bad_parameters_are_refused_even_where_they_would_not_be_used(arguments, message, n_ctx):
    with pytest.raises(SelfExtendError, match=message):
        plan(256, n_ctx, **arguments)
