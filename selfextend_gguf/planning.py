"""Choosing Self-Extend's numbers from the trained context and the wanted one, and how far given numbers reach."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from selfextend_gguf.checks import Check, check_all, optional, shown, whole_number
from selfextend_gguf.errors import ConfigError, ContextFullError, OutOfReachError
from selfextend_gguf.schedule import LONGEST, RULES, SCHEDULES, Schedule, SelfExtendConfig

TIMES_TRAINED = 4  #: the context where none is asked for, in trained contexts
TIMES_MEASURED = 16  #: trained contexts up to which docs/results.md measured every schedule
CELL_MULTIPLE = 256  #: llama.cpp rounds contexts up to it
PARAMETERS = ("group_size", "neighbor_window", "max_distance", "block_size", "schedule")  #: of `plan` and `Llama`


@dataclass(frozen=True)
class _Numbers:
    """Everything of a plan but the group size and the wanted context; block_size None = by the group size."""

    rule: Schedule
    n_ctx_train: int
    max_distance: int
    neighbor_window: int
    block_size: int | None

    @property
    def free(self) -> int:
        """Positions beside the window."""
        return self.rule.room(self.max_distance) - self.neighbor_window

    @property
    def n_batch(self) -> int:
        return min(512, max(1, self.free // 6))

    def config(self, n_ctx: int, group_size: int, block_for: int | None = None) -> SelfExtendConfig:
        """A plan with these numbers; its block is the one for groups of `block_for`."""
        block = self.block_size
        if block is None:
            block = self.rule.default_block(self.free, self.n_batch, block_for or group_size)
        return SelfExtendConfig(
            self.n_ctx_train,
            n_ctx,
            self.rule.name,
            group_size,
            self.neighbor_window,
            self.max_distance,
            block,
            self.n_batch,
        )

    def reach(self, group_size: int) -> int:
        """Longest text in tokens while at most `group_size` tokens share a key position: the one answer to how far
        numbers reach."""
        if group_size < 2:
            return self.n_ctx_train
        return min(LONGEST, max(self.n_ctx_train, self.rule.reach(self.config(LONGEST, group_size))))


def _schedule_name(_: str, value: Any) -> str:
    if not isinstance(value, str) or value not in SCHEDULES:
        raise ConfigError(f"unknown schedule {shown(value)}; choose from {', '.join(SCHEDULES)}")
    return value


_CHECKS: dict[str, Check] = {
    name: optional(_schedule_name if name == "schedule" else whole_number) for name in PARAMETERS
}


def check_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of `plan`, from wherever they come, as the kinds of values they must be. Raises ConfigError.

    What range a number must lie in depends on the model and the other numbers: `plan` decides.
    """
    return check_all(_CHECKS, parameters)


def _rule(parameters: dict[str, Any]) -> Schedule:
    """The schedule that checked parameters name. ConfigError for a parameter that it has no use for."""
    name = parameters.get("schedule") or SCHEDULES[0]
    rule = RULES[name]
    for parameter, why in rule.without.items():
        if parameters.get(parameter) is not None:
            raise ConfigError(f"schedule {name} has no use for {parameter}: {why}; leave it out")
    return rule


def _numbers(rule: Schedule, n_ctx_train: int, parameters: dict[str, Any], distance: int) -> _Numbers:
    """The numbers with a given largest distance; ConfigError for parameters that are out of range."""
    trained = f" (the model is trained on {n_ctx_train} tokens)"
    size, window, block = (parameters.get(name) for name in ("group_size", "neighbor_window", "block_size"))
    if size is not None:
        whole_number("group_size", size, 1, rule.largest_group(n_ctx_train), trained)
    distance = whole_number("max_distance", distance, 8, n_ctx_train, trained)
    room = rule.room(distance)
    if window is not None:
        # Two positions must be left: one for a new token, one for the grouped keys.
        window = whole_number("neighbor_window", window, 1, room - 2, trained)
    window = rule.default_window(room) if window is None else window
    numbers = _Numbers(rule, n_ctx_train, distance, window, block)
    if block is not None:
        most = rule.largest_block(numbers.free, numbers.n_batch)
        whole_number("block_size", block, 1, most, f" with a neighbor window of {numbers.neighbor_window}")
    return numbers


def _choices(rule: Schedule, n_ctx_train: int, parameters: dict[str, Any]) -> Iterator[_Numbers]:
    """The numbers to try, one largest distance after the other; ConfigError if not even the last one is possible."""
    given = parameters.get("max_distance")
    distances = rule.default_distances(n_ctx_train) if given is None else (given,)
    for distance in distances[:-1]:
        try:
            yield _numbers(rule, n_ctx_train, parameters, distance)
        except ConfigError:
            continue  # a given window needs more
    yield _numbers(rule, n_ctx_train, parameters, distances[-1])


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

    None = automatic:
    - distances below 3/4 of the trained context, or all where only that reaches `n_ctx` (restart: likewise; adagrope:
      half of it, the others: all of it);
    - a quarter of the room for the neighbor window (restart: half); the room is all distances (adagrope: the quarter of
      them that it keeps exact);
    - five ninths of the rest for the tokens between two moves of the boundary (adagrope: half of it, the others: a
      third), but at most 512 or, where that is more, a sixth of the rest (adagrope: at most 512; dca: half of the rest,
      however much that is);
    - the smallest groups that reach `n_ctx` with these.

    Raises ConfigError for values out of range, for parameters that the schedule has no use for, and for a combination
    that cannot reach `n_ctx`; the message names the smallest change that would.

    Sources: arXiv 2401.01325, section 3 (group size, neighbor window, longest text); those of the other schedules are
    in `selfextend_gguf.schedule`.

    >>> from selfextend_gguf import plan
    >>> config = plan(n_ctx_train=4096, n_ctx=16384)
    >>> config.group_size, config.neighbor_window, config.max_distance
    (11, 768, 3072)
    >>> config.longest_context  # what these numbers reach
    16642
    >>> plan(n_ctx_train=4096, n_ctx=2048).is_active  # fits: plain llama.cpp
    False
    >>> plan(n_ctx_train=4096, n_ctx=16384, group_size=4)
    Traceback (most recent call last):
    selfextend_gguf.errors.OutOfReachError: group size 4 with a neighbor window of 1024 reaches 9730 tokens...
    """
    n_ctx_train = whole_number("n_ctx_train", n_ctx_train, 8, LONGEST)
    n_ctx = whole_number("n_ctx", n_ctx, 1, LONGEST)
    given = (group_size, neighbor_window, max_distance, block_size, schedule)
    parameters = check_parameters(dict(zip(PARAMETERS, given, strict=True)))
    group_size, neighbor_window = parameters["group_size"], parameters["neighbor_window"]
    rule = _rule(parameters)
    largest = rule.largest_group(n_ctx_train)
    for numbers in _choices(rule, n_ctx_train, parameters):
        if n_ctx > n_ctx_train and numbers.reach(largest if group_size is None else group_size) >= n_ctx:
            break
    # Else the last ones: all distances.
    if n_ctx <= n_ctx_train:
        return numbers.config(n_ctx, 1, block_for=largest)
    needed = 2 + bisect_left(range(2, largest + 1), n_ctx, key=numbers.reach)
    window = numbers.neighbor_window
    if needed > largest:
        raise OutOfReachError(
            f"{n_ctx} tokens are beyond the reach of Self-Extend for a trained context of {n_ctx_train}: even with the "
            f"largest group size ({largest}) a neighbor window of {window} reaches {numbers.reach(largest)}; "
            f"ask for at most {numbers.reach(largest)} tokens"
            + (" or a smaller neighbor window" if neighbor_window is not None else ""),
            numbers.reach(largest),
        )
    size = needed if group_size is None else group_size
    if size < needed:
        raise OutOfReachError(
            f"group size {size} with a neighbor window of {window} reaches {numbers.reach(size)} tokens, not {n_ctx}: "
            f"take a group size of at least {needed}, or at most {numbers.reach(size)} tokens",
            numbers.reach(size),
        )
    return numbers.config(n_ctx, size)


def plan_if_beyond(n_ctx_train: int, n_ctx: int, **parameters: Any) -> SelfExtendConfig | None:
    """The plan of a context that llama.cpp makes for `n_ctx` tokens, None within the trained one; but not before all
    given parameters are right. Raises ConfigError as `plan` does."""
    if n_ctx > n_ctx_train:
        return plan(n_ctx_train, whole_cells(n_ctx), **parameters)
    if any(value is not None for value in parameters.values()):
        plan(n_ctx_train, n_ctx_train, **parameters)
    return None


def longest_context(n_ctx_train: int, **parameters: Any) -> int:
    """The largest `n_ctx` that `plan` accepts with these parameters, in tokens.

    Raises ConfigError as `plan` does.
    """
    n_ctx_train = whole_number("n_ctx_train", n_ctx_train, 8, LONGEST)
    parameters = check_parameters(parameters)
    rule = _rule(parameters)
    size = parameters.get("group_size")
    size = rule.largest_group(n_ctx_train) if size is None else size
    return max(numbers.reach(size) for numbers in _choices(rule, n_ctx_train, parameters))


def whole_cells(n_ctx: int) -> int:
    """Size in tokens of the context that llama.cpp makes for `n_ctx`."""
    return -(-n_ctx // CELL_MULTIPLE) * CELL_MULTIPLE


def context_within(n_ctx_train: int, limit: int, **parameters: Any) -> int:
    """The largest context of at most `limit` tokens that llama.cpp can make and parameters of `plan` reach; the trained
    one if that is more. Raises ConfigError as `plan` does."""
    reached = min(limit, longest_context(n_ctx_train, **parameters))
    return max(n_ctx_train, reached // CELL_MULTIPLE * CELL_MULTIPLE)


def default_context(n_ctx_train: int, **parameters: Any) -> int:
    """Context in tokens for who asks for none: TIMES_TRAINED trained contexts, or what parameters of `plan` reach if
    that is less. Raises ConfigError as `plan` does."""
    return context_within(n_ctx_train, whole_cells(TIMES_TRAINED * n_ctx_train), **parameters)


def check_room(n_tokens: int, n_ctx: int, *, n_answer: int = 0) -> None:
    """Raise ContextFullError when a context has no room for so many tokens, and an answer."""
    if n_tokens + n_answer > n_ctx:
        raise ContextFullError(f"Requested tokens ({n_tokens}) exceed context window of {n_ctx}", n_ctx)
