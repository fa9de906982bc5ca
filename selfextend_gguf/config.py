"""Choosing the four numbers of Self-Extend from the trained context and the wanted one."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from math import ceil

from selfextend_gguf.errors import ConfigError

SCHEDULES = ("selfextend", "paper")
_TILE = 64
# Groups of more tokens than the model ever saw at once have lost any order that its distances could express.
# Models trained on next to nothing (tests have some) may group this many all the same.
_SMALLEST_LIMIT = 256


@dataclass(frozen=True)
class SelfExtendConfig:
    """Resolved parameters; all lengths in tokens. `str(config)` explains them in a sentence.

    With `n_ctx` within the trained context `group_size` is 1 and nothing is ever rewritten.
    """

    n_ctx_train: int  #: trained context L
    n_ctx: int  #: longest text
    schedule: str  #: "selfextend" or "paper"
    group_size: int  #: G: tokens outside the window that share one key position
    neighbor_window: int  #: W: latest tokens that always keep their exact distance
    max_distance: int  #: D: no query sees a distance of D or more
    block_size: int  #: the boundary between grouped and exact tokens moves in such steps
    n_batch: int  #: a step of so many tokens works wherever it starts

    @property
    def is_active(self) -> bool:
        """Whether keys are ever grouped."""
        return self.group_size > 1

    @property
    def longest_context(self) -> int:
        """Longest text these numbers reach, in tokens."""
        return _reach(
            self.schedule, self.max_distance, self.neighbor_window, self.n_batch, self.block_size, self.group_size
        )

    @property
    def n_moves(self) -> int:
        """How often the boundary between grouped and exact tokens moves while `n_ctx` tokens are read."""
        if not self.is_active:
            return 0
        if self.schedule == "paper":
            return max(0, self.n_ctx - 1 - self.neighbor_window) // self.block_size
        # Each move wins the positions that a block of grouped tokens does without.
        won = self.block_size - self.block_size / self.group_size
        return ceil((self.n_ctx - self.max_distance) / won)

    def __str__(self) -> str:
        if not self.is_active:
            return (
                f"{self.n_ctx} tokens fit the trained context of {self.n_ctx_train}: "
                "plain llama.cpp, nothing is grouped."
            )
        start = (
            f"beyond the neighbor window of {self.neighbor_window} tokens"
            if self.schedule == "paper"
            else f"beyond {self.n_ctx_train} tokens"
        )
        return (
            f"Up to {self.n_ctx} tokens ({self.n_ctx / self.n_ctx_train:.3g}x the trained {self.n_ctx_train}): "
            f"{start}, older tokens share key positions in groups of {self.group_size}, "
            f"at least the latest {self.neighbor_window} keep their exact distance, "
            f"and no distance reaches {self.max_distance} (schedule {self.schedule}, "
            f"block {self.block_size})."
        )


def _slack(max_distance: int, window: int, n_batch: int, block: int) -> int:
    """Positions left for grouped keys in the worst step: just before the boundary moves, n_batch tokens at once."""
    return max_distance - window - n_batch - block + 1


def _reach(schedule: str, max_distance: int, window: int, n_batch: int, block: int, group_size: int) -> int:
    """Longest text for a group size.

    selfextend: the boundary g is a multiple of the block with g - g//G >= n1 - D and g <= n1 - n_batch - W.
    The smallest such g is at most (n1 - D) + ceil((n1 - D) / (G - 1)) + block - 1, so every step up to
    n1 = D + (G - 1) * slack works.
    paper: g > n0 - W - block, so the farthest distance is below e + (n1 - e) / G with e = n_batch + W + block - 1.
    """
    slack = _slack(max_distance, window, n_batch, block)
    if schedule == "paper":
        exact = max_distance - slack
        return exact + group_size * slack
    return max_distance + (group_size - 1) * slack


def _whole_tiles(free: int) -> int:
    """Tokens between two moves of the boundary: a third of the free positions, at most 512 (llama.cpp's usual batch),
    in the tiles of 64 queries that its CPU flash attention computes at once."""
    third = max(1, free // 3)
    return third if third < _TILE else min(512, third // _TILE * _TILE)


def _check_range(name: str, value: int, low: int, high: int, why: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a whole number, not {value!r}")
    if not low <= value <= high:
        raise ConfigError(f"{name} must be between {low} and {high}{why}, not {value}")


def plan(
    n_ctx_train: int,
    n_ctx: int,
    *,
    group_size: int | None = None,
    neighbor_window: int | None = None,
    max_distance: int | None = None,
    block_size: int | None = None,
    schedule: str | None = None,
) -> SelfExtendConfig:
    """Resolve the parameters for reading `n_ctx` tokens with a model trained on `n_ctx_train`.

    None = automatic: distances below the trained context, a quarter of them for the neighbor window, a third of
    the rest (at most 512) for the tokens between two moves of the boundary, and the smallest group size that reaches
    `n_ctx` with these.

    Raises ConfigError for values out of range, and for a combination that cannot reach `n_ctx`; the message
    names the smallest change that would.

    Source: arXiv 2401.01325, section 3 (group size, neighbor window, longest text).
    """
    _check_range("n_ctx_train", n_ctx_train, 8, 2**30, "")
    _check_range("n_ctx", n_ctx, 1, 2**30, "")
    schedule = SCHEDULES[0] if schedule is None else schedule
    if schedule not in SCHEDULES:
        raise ConfigError(f"unknown schedule {schedule!r}; choose from {', '.join(SCHEDULES)}")
    largest = largest_group_size(n_ctx_train)
    trained = f" (the model is trained on {n_ctx_train} tokens)"
    if group_size is not None:
        _check_range("group_size", group_size, 1, largest, trained)
    if max_distance is not None:
        _check_range("max_distance", max_distance, 8, n_ctx_train, trained)
    distance = n_ctx_train if max_distance is None else max_distance
    if neighbor_window is not None:
        # Two positions must be left: one for a new token, one for the grouped keys.
        _check_range("neighbor_window", neighbor_window, 1, distance - 2, trained)
    window = distance // 4 if neighbor_window is None else neighbor_window
    free = distance - window
    step = min(512, max(1, free // 6))
    if block_size is not None:
        _check_range("block_size", block_size, 1, free - step, f" with a neighbor window of {window}")

    def block_for(size: int) -> int:
        if block_size is not None:
            return block_size
        tiles = _whole_tiles(free)
        # Moving the boundary by one block makes room for block - block//size tokens: as many as whole tiles.
        return tiles if schedule == "paper" else min(tiles + -(-tiles // (size - 1)), free - step)

    if n_ctx <= n_ctx_train:
        return SelfExtendConfig(n_ctx_train, n_ctx, schedule, 1, window, distance, block_for(largest), step)

    def reach(size: int) -> int:
        return _reach(schedule, distance, window, step, block_for(size), size) if size > 1 else n_ctx_train

    needed = 2 + bisect_left(range(2, largest + 1), n_ctx, key=reach)
    if needed > largest:
        raise ConfigError(
            f"{n_ctx} tokens are beyond the reach of Self-Extend for a trained context of {n_ctx_train}: even with the "
            f"largest group size ({largest}) a neighbor window of {window} reaches {reach(largest)}; "
            f"ask for at most {reach(largest)} tokens"
            + (" or a smaller neighbor window" if neighbor_window is not None else "")
        )
    size = needed if group_size is None else group_size
    if size < needed:
        raise ConfigError(
            f"group size {size} with a neighbor window of {window} reaches {reach(size)} tokens, not {n_ctx}: "
            f"take a group size of at least {needed}, or at most {reach(size)} tokens"
        )
    return SelfExtendConfig(n_ctx_train, n_ctx, schedule, size, window, distance, block_for(size), step)


def largest_group_size(n_ctx_train: int) -> int:
    """Largest group size that is accepted for a trained context."""
    return max(n_ctx_train, _SMALLEST_LIMIT)


def longest_context(n_ctx_train: int) -> int:
    """Longest text that automatic parameters reach for a trained context, in tokens."""
    limit = largest_group_size(n_ctx_train)
    return plan(n_ctx_train, n_ctx_train + 1, group_size=limit).longest_context
