"""Choosing the four numbers of Self-Extend from the trained context and the wanted one."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.schedule import LONGEST, RULES, Schedule

TIMES_TRAINED = 4  #: the context where none is asked for, in trained contexts
CELL_MULTIPLE = 256  #: llama.cpp rounds contexts up to it
PARAMETERS = ("group_size", "neighbor_window", "max_distance", "block_size", "schedule")  #: of `plan` and `Llama`
SCHEDULES = tuple(RULES)  #: names, in the order of `enum sx_schedule`


@dataclass(frozen=True)
class SelfExtendConfig:
    """Resolved parameters; all lengths in tokens. `str(config)` explains them in a sentence.

    With `n_ctx` within the trained context `group_size` is 1 and nothing is ever rewritten.
    """

    n_ctx_train: int  #: trained context L
    n_ctx: int  #: longest text
    schedule: str  #: one of SCHEDULES
    group_size: int  #: G: tokens outside the window that share one key position; where they differ, the most that do
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
        return RULES[self.schedule].longest_context(self)

    @property
    def n_moves(self) -> int:
        """How often keys move while `n_ctx` tokens are read."""
        return RULES[self.schedule].n_moves(self) if self.is_active else 0

    @property
    def regroups(self) -> bool:
        """Whether a key is rewritten again and again as the text grows, and not only when it enters a group."""
        return RULES[self.schedule].regroups

    def __str__(self) -> str:
        if not self.is_active:
            return (
                f"{self.n_ctx} tokens fit the trained context of {self.n_ctx_train}: "
                "plain llama.cpp, nothing is grouped."
            )
        rule = RULES[self.schedule]
        return (
            f"Up to {self.n_ctx} tokens ({self.n_ctx / self.n_ctx_train:.3g}x the trained {self.n_ctx_train}): "
            f"{rule.begins(self)}, {rule.sharing(self)}, "
            f"at least the latest {self.neighbor_window} keep their exact distance, "
            f"and no distance reaches {self.max_distance} (schedule {self.schedule}, "
            f"block {self.block_size})."
        )


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

    None = automatic: distances below 3/4 of the trained context, or all where only that reaches `n_ctx` (adagrope:
    half of it, the others: all of it), a quarter of the room for the neighbor window, a third of the rest (at most 512)
    for the tokens between two moves of the boundary (adagrope: half of the rest), and the smallest groups that reach
    `n_ctx` with these. The room is all distances; adagrope's is the quarter of them that it keeps exact.

    Raises ConfigError for values out of range, for parameters that the schedule has no use for, and for a combination
    that cannot reach `n_ctx`; the message names the smallest change that would.

    Sources: arXiv 2401.01325, section 3 (group size, neighbor window, longest text); those of the other schedules are
    in `selfextend_gguf.schedule`.
    """
    _check_range("n_ctx_train", n_ctx_train, 8, LONGEST, "")
    _check_range("n_ctx", n_ctx, 1, LONGEST, "")
    schedule = SCHEDULES[0] if schedule is None else schedule
    if schedule not in SCHEDULES:
        raise ConfigError(f"unknown schedule {schedule!r}; choose from {', '.join(SCHEDULES)}")
    rule = RULES[schedule]
    given = {
        "group_size": group_size,
        "neighbor_window": neighbor_window,
        "max_distance": max_distance,
        "block_size": block_size,
    }
    for name, why in rule.without.items():
        if given[name] is not None:
            raise ConfigError(f"schedule {schedule} has no use for {name}: {why}; leave it out")
    distances = rule.default_distances(n_ctx_train) if max_distance is None else (max_distance,)
    for distance in distances[:-1] if n_ctx > n_ctx_train else ():
        try:
            return _plan_within(distance, n_ctx_train, n_ctx, rule, group_size, neighbor_window, block_size)
        except ConfigError:
            continue  # too few positions for the context, or for a given window
    return _plan_within(distances[-1], n_ctx_train, n_ctx, rule, group_size, neighbor_window, block_size)


def _plan_within(
    distance: int,
    n_ctx_train: int,
    n_ctx: int,
    rule: Schedule,
    group_size: int | None,
    neighbor_window: int | None,
    block_size: int | None,
) -> SelfExtendConfig:
    """`plan` with a given largest distance."""
    largest = rule.largest_group(n_ctx_train)
    trained = f" (the model is trained on {n_ctx_train} tokens)"
    if group_size is not None:
        _check_range("group_size", group_size, 1, largest, trained)
    _check_range("max_distance", distance, 8, n_ctx_train, trained)
    room = rule.room(distance)
    if neighbor_window is not None:
        # Two positions must be left: one for a new token, one for the grouped keys.
        _check_range("neighbor_window", neighbor_window, 1, room - 2, trained)
    window = max(1, room // 4) if neighbor_window is None else neighbor_window
    free = room - window
    n_batch = min(512, max(1, free // 6))
    if block_size is not None:
        _check_range("block_size", block_size, 1, free - n_batch, f" with a neighbor window of {window}")

    def config_for(size: int, block_for: int) -> SelfExtendConfig:
        block = rule.default_block(free, n_batch, block_for) if block_size is None else block_size
        return SelfExtendConfig(n_ctx_train, n_ctx, rule.name, size, window, distance, block, n_batch)

    if n_ctx <= n_ctx_train:
        return config_for(1, block_for=largest)

    def reach(size: int) -> int:
        return rule.reach(config_for(size, block_for=size)) if size > 1 else n_ctx_train

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
    return config_for(size, block_for=size)


def largest_group_size(n_ctx_train: int) -> int:
    """Largest group size that is accepted for a trained context."""
    return RULES[SCHEDULES[0]].largest_group(n_ctx_train)


def longest_context(n_ctx_train: int, **parameters: Any) -> int:
    """Longest text that parameters of `plan` reach for a trained context, in tokens; automatic where not given.

    Raises ConfigError as `plan` does.
    """
    rule = RULES[parameters.get("schedule") or SCHEDULES[0]]
    if parameters.get("group_size") is None and "group_size" not in rule.without:
        parameters["group_size"] = rule.largest_group(n_ctx_train)
    if parameters.get("max_distance") is None and len(distances := rule.default_distances(n_ctx_train)) > 1:
        parameters["max_distance"] = distances[-1]
    return plan(n_ctx_train, n_ctx_train + 1, **parameters).longest_context


def whole_cells(n_ctx: int) -> int:
    """Size in tokens of the context that llama.cpp makes for `n_ctx`."""
    return -(-n_ctx // CELL_MULTIPLE) * CELL_MULTIPLE


def default_context(n_ctx_train: int, **parameters: Any) -> int:
    """Context in tokens for who asks for none: TIMES_TRAINED trained contexts, or what parameters of `plan` reach if
    that is less. Raises ConfigError as `plan` does."""
    wanted = whole_cells(TIMES_TRAINED * n_ctx_train)
    try:
        plan(n_ctx_train, wanted, **parameters)
        return wanted
    except ConfigError:
        reached = longest_context(n_ctx_train, **parameters)  # raises if something else is wrong
        return max(n_ctx_train, reached // CELL_MULTIPLE * CELL_MULTIPLE)
