"""Schedules: how each chooses its numbers, what they reach, and its key positions in numpy.

A *schedule* is a pure function. Before tokens [n_cached, n_total) are decoded it says which *key position*
P(k) each cached token k gets; queries always stand at their token index, so they see key k at distance q - P(k).
Positions follow from a *stage*, which is the same for many steps; stage 0 is the plain text, P(k) = k.

The positions here are the twin of `native/schedule.c`: the same integers found by plainer means, for the reference,
for tests and for reading. To add a schedule, write a class and add it to `RULES`, in the order of `enum sx_schedule`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from selfextend_gguf.errors import ConfigError

Integers = TypeVar("Integers", int, npt.NDArray[np.int64])
LONGEST = 2**30  #: tokens; no text may be longer
#: Of the trained context, the distances that are used where they suffice: the largest ones are those that a model has
#: seen least. docs/schedules.md tells what they cost.
TRUSTED_DISTANCES = Fraction(3, 4)
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
    def n_regroupings(self) -> int:
        """How often keys that are grouped already are rewritten while `n_ctx` tokens are read, because their places in
        relation to each other change."""
        return RULES[self.schedule].n_regroupings(self) if self.is_active else 0

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


def whole_tiles(n: int, most: int) -> int:
    """Tokens between two moves of the boundary: at most n and at most `most`, in the tiles of 64 queries that
    llama.cpp's CPU flash attention computes at once."""
    n = max(1, min(n, most))
    return n if n < _TILE else n // _TILE * _TILE


def usual_block(free: int) -> int:
    """Tokens between two moves, with `free` positions beside the window: a third of them, but not more than 512
    (llama.cpp's usual batch) or, where that is more, a sixth. A key of the window is rewritten at each move: eight
    times at most before it is grouped, however many tokens the model was trained on."""
    return whole_tiles(free // 3, max(512, free // 6))


def slack(config: SelfExtendConfig) -> int:
    """Positions left for grouped keys in the worst step: just before the boundary moves, n_batch tokens at once."""
    return config.max_distance - config.neighbor_window - config.n_batch - config.block_size + 1


class Schedule(ABC):
    """One schedule; all lengths in tokens. The methods here are those that most schedules share."""

    name: ClassVar[str]
    #: Parameters of `plan` that the schedule has no use for, and why.
    without: ClassVar[Mapping[str, str]] = {}
    #: Whether it may move keys of a text that fits the trained context.
    groups_within_trained: ClassVar[bool] = False

    # ---- automatic parameters and reach ------------------------------------------------------------------------

    def default_distances(self, n_ctx_train: int) -> tuple[int, ...]:
        """Largest distance + 1, D: the first that reaches the context is taken."""
        return (n_ctx_train,)

    def room(self, distance: int) -> int:
        """Positions that neighbor window, block and largest step divide among themselves (and grouped keys, if the
        schedule fixes no part for them)."""
        return distance

    def default_window(self, room: int) -> int:
        """Latest tokens that keep their exact distance, with `room` positions."""
        return max(1, room // 4)

    def default_block(self, free: int, n_batch: int, size: int) -> int:
        """Tokens between two moves, with `free` positions beside the window."""
        return usual_block(free)

    def largest_block(self, free: int, n_batch: int) -> int:
        """Most tokens between two moves that leave distances for every step of `n_batch`."""
        return free - n_batch

    def largest_group(self, n_ctx_train: int) -> int:
        """Most tokens that may share one key position."""
        return max(n_ctx_train, _SMALLEST_LIMIT)

    @abstractmethod
    def reach(self, config: SelfExtendConfig) -> int:
        """Longest text while at most `config.group_size` tokens share one key position, whatever `config.n_ctx` is;
        grows with the group size."""

    def longest_context(self, config: SelfExtendConfig) -> int:
        """Longest text that `config` as it is reaches."""
        return self.reach(config)

    @abstractmethod
    def n_moves(self, config: SelfExtendConfig) -> int:
        """How often the stage changes while the tokens of an active `config` are read."""

    def n_regroupings(self, config: SelfExtendConfig) -> int:
        """See `SelfExtendConfig.n_regroupings`; of an active `config`."""
        return 0

    # ---- words -------------------------------------------------------------------------------------------------

    def begins(self, config: SelfExtendConfig) -> str:
        """From where on keys are moved, for `str(config)`."""
        return f"beyond {config.n_ctx_train} tokens"

    def sharing(self, config: SelfExtendConfig) -> str:
        """What happens to the tokens outside the window, for `str(config)`."""
        return f"older tokens share key positions in groups of {config.group_size}"

    # ---- key positions -----------------------------------------------------------------------------------------

    @abstractmethod
    def stage(self, config: SelfExtendConfig, n_cached: int, n_total: int) -> int:
        """Stage of a step over tokens [n_cached, n_total), n_total > n_ctx_train unless `groups_within_trained`.

        Raises ConfigError when the step cannot keep its distances below `max_distance` and the neighbor window.
        """

    @abstractmethod
    def positions(self, config: SelfExtendConfig, stage: int, n_cached: int) -> npt.NDArray[np.int32]:
        """P(0..n_cached-1), int32, of a stage."""


class SelfExtend(Schedule):
    """Plain up to the trained context; beyond it groups of G (arXiv 2401.01325) before the smallest boundary g that
    keeps all distances below D. The stage is g."""

    name = "selfextend"

    def default_distances(self, n_ctx_train: int) -> tuple[int, ...]:
        return (max(8, int(TRUSTED_DISTANCES * n_ctx_train)), n_ctx_train)

    def default_block(self, free: int, n_batch: int, size: int) -> int:
        # Moving the boundary by one block makes room for block - block//size tokens: as many as whole tiles.
        # Its distances leave less room than others' do: more of it goes to steps as large as llama.cpp's own batches,
        # smaller ones are slower.
        most = 5 * free // 9
        tiles = usual_block(free) if most < _TILE else whole_tiles(most, max(512, free // 6))
        return min(tiles + -(-tiles // (size - 1)), free - n_batch)

    def reach(self, config: SelfExtendConfig) -> int:
        # g is a multiple of the block with g - g//G >= n1 - D and g <= n1 - n_batch - W. The smallest such g is at
        # most (n1 - D) + ceil((n1 - D) / (G - 1)) + block - 1, so every step up to n1 = D + (G - 1) * slack works.
        return config.max_distance + (config.group_size - 1) * slack(config)

    def n_moves(self, config: SelfExtendConfig) -> int:
        # Each move wins the positions that a block of grouped tokens does without.
        won = config.block_size - config.block_size / config.group_size
        # The first comes at the trained context, and may be one of many blocks.
        return min(
            ceil((config.n_ctx - config.max_distance) / won), 1 + ceil((config.n_ctx - config.n_ctx_train) / won)
        )

    def stage(self, config: SelfExtendConfig, n_cached: int, n_total: int) -> int:
        size, window = config.group_size, config.neighbor_window
        for g in range(0, n_cached + 1, config.block_size):
            if n_total - (g - g // size) <= config.max_distance:
                if g > 0 and n_cached - g < window:
                    break
                return g
        raise ConfigError(f"{n_total - n_cached} tokens at once after {n_cached} leave no neighbor window of {window}")

    def positions(self, config: SelfExtendConfig, stage: int, n_cached: int) -> npt.NDArray[np.int32]:
        k = np.arange(n_cached)
        shared = stage - stage // config.group_size + k // config.group_size
        return np.where(k < stage, shared, k).astype(np.int32)


class FixedWindow(Schedule):
    """Schedules whose boundary g follows the text at the window, in blocks. The stage is g."""

    def boundary(self, config: SelfExtendConfig, n_cached: int) -> int:
        """The last multiple of the block that leaves the window exact, 0 if there is none."""
        return max(0, (n_cached - config.neighbor_window) // config.block_size * config.block_size)

    def n_moves(self, config: SelfExtendConfig) -> int:
        # Once at the trained context, and then whenever the boundary of the next token is another one.
        first, last = (self.boundary(config, n) for n in (config.n_ctx_train, config.n_ctx - 1))
        return 1 + (last - first) // config.block_size

    def stage(self, config: SelfExtendConfig, n_cached: int, n_total: int) -> int:
        g = self.boundary(config, n_cached)
        oldest = min(g, self.far(config, g, 0)) if g > 0 else 0
        if n_total > config.n_ctx_train and n_total - oldest > config.max_distance:
            raise ConfigError(
                f"{n_total - n_cached} tokens at once after {n_cached} leave no neighbor window of "
                f"{config.neighbor_window}, or reach a distance of {config.max_distance}"
            )
        return g

    def positions(self, config: SelfExtendConfig, stage: int, n_cached: int) -> npt.NDArray[np.int32]:
        k = np.arange(n_cached, dtype=np.int64)
        return np.where(k < stage, self.far(config, stage, k), k).astype(np.int32)

    @abstractmethod
    def far(self, config: SelfExtendConfig, g: int, k: Integers) -> Integers:
        """P(k) of tokens k < g outside the window; the oldest one's is the smallest."""


class Paper(FixedWindow):
    """The paper's rule (arXiv 2401.01325): groups of G outside the window, also within the trained context."""

    name = "paper"
    groups_within_trained = True

    def reach(self, config: SelfExtendConfig) -> int:
        # g > n0 - W - block, so the farthest distance is below e + (n1 - e) / G with e = n_batch + W + block - 1,
        # which is D - slack.
        return config.max_distance + (config.group_size - 1) * slack(config)

    def n_moves(self, config: SelfExtendConfig) -> int:
        return max(0, config.n_ctx - 1 - config.neighbor_window) // config.block_size

    def begins(self, config: SelfExtendConfig) -> str:
        return f"beyond the neighbor window of {config.neighbor_window} tokens"

    def far(self, config: SelfExtendConfig, g: int, k: Integers) -> Integers:
        return g - g // config.group_size + k // config.group_size


class AdaGroPE(Schedule):
    """Groups that grow with the distance and with the text (ACL 2025, long paper 28, Algorithm 1).

    P = `max_distance` positions, by default half of the trained context (the paper takes all of it for perplexity,
    max_distance=n_ctx_train); the nearest quarter, r = 0.25, is exact. Stage j > 0 is the map for a text of
    N = L + j * block tokens, the end of the j-th block after the trained context.
    """

    name = "adagrope"
    without: ClassVar[Mapping[str, str]] = {"group_size": "its groups follow from the length of the text"}

    def default_distances(self, n_ctx_train: int) -> tuple[int, ...]:
        return (max(8, n_ctx_train // 2),)

    def room(self, distance: int) -> int:
        # A step of n_batch tokens whose last one begins a block still sees distance//4 - block - n_batch + 1 exactly.
        return distance // 4 + 1

    def default_block(self, free: int, n_batch: int, size: int) -> int:
        return whole_tiles(free // 2, 512)  # larger than others', since each move rewrites many keys

    def reach(self, config: SelfExtendConfig) -> int:
        size, left, text = config.group_size, config.max_distance, 0
        for reuse in (2**i for i in range(size.bit_length()) if 2**i < size):
            fixed = config.max_distance // (4 * reuse)
            left -= fixed
            text += fixed * reuse
        text += left * size
        beyond = text - config.n_ctx_train
        return config.n_ctx_train + beyond // config.block_size * config.block_size

    def longest_context(self, config: SelfExtendConfig) -> int:
        return max(config.n_ctx_train, self.reach(config))

    def n_moves(self, config: SelfExtendConfig) -> int:
        return ceil((config.n_ctx - config.n_ctx_train) / config.block_size)

    def n_regroupings(self, config: SelfExtendConfig) -> int:
        return self.n_moves(config)

    def sharing(self, config: SelfExtendConfig) -> str:
        return (
            "older tokens share key positions in groups that grow with the distance and with the text, "
            f"up to {config.group_size}"
        )

    def stage(self, config: SelfExtendConfig, n_cached: int, n_total: int) -> int:
        stage = ceil((n_total - config.n_ctx_train) / config.block_size)
        first_exact = self._text(config, stage) - config.max_distance // 4
        if n_cached - first_exact < config.neighbor_window:
            raise ConfigError(
                f"{n_total - n_cached} tokens at once after {n_cached} leave no neighbor window of "
                f"{config.neighbor_window}"
            )
        return stage

    def positions(self, config: SelfExtendConfig, stage: int, n_cached: int) -> npt.NDArray[np.int32]:
        text = self._text(config, stage)
        position_of = adagrope_map(config.max_distance, text)
        last = text - 1
        positions: npt.NDArray[np.int64] = last - position_of[last - np.arange(n_cached)]
        return positions.astype(np.int32)

    def _text(self, config: SelfExtendConfig, stage: int) -> int:
        return config.n_ctx_train + stage * config.block_size


def adagrope_map(n_positions: int, n_tokens: int) -> npt.NDArray[np.int64]:
    """Positions (n_tokens,) of the distances 0, 1, ...: Algorithm 1 of AdaGroPE, step by step as it reads.

    `n_positions` = P, below `n_tokens` = N.
    """
    reuse: list[int] = []  # how many distances each position stands for, from the nearest on
    size, left, uncovered = 1, n_positions, n_tokens
    while left * size < uncovered:
        if size & (size - 1) == 0:  # a power of two
            fixed = int(0.25 * n_positions / size)
            reuse += [size] * fixed
            left -= fixed
            uncovered -= fixed * size
        size += 1
    far = uncovered - left * (size - 1)
    reuse += [size - 1] * (left - far) + [size] * far
    return np.repeat(np.arange(n_positions), reuse)


class ReRoPE(FixedWindow):
    """All tokens outside the window share one position (Su 2023, ReRoPE, https://kexue.fm/archives/9708)."""

    name = "rerope"
    without: ClassVar[Mapping[str, str]] = {
        "group_size": "all tokens outside the window are one group, however long the text"
    }

    def largest_group(self, n_ctx_train: int) -> int:
        return LONGEST

    def reach(self, config: SelfExtendConfig) -> int:
        return config.neighbor_window + config.group_size

    def longest_context(self, config: SelfExtendConfig) -> int:
        return LONGEST

    def sharing(self, config: SelfExtendConfig) -> str:
        return "all older tokens share one key position"

    def far(self, config: SelfExtendConfig, g: int, k: Integers) -> Integers:
        return g + 0 * k


class LeakyReRoPE(FixedWindow):
    """Outside the window distances grow with a fractional slope (Su 2023, Leaky ReRoPE, https://kexue.fm/archives/9708).

    The slope 1/k is the largest that keeps the distances of `n_ctx` tokens below D. Positions being whole numbers, they
    are rounded down.
    """

    name = "leaky-rerope"
    without: ClassVar[Mapping[str, str]] = {
        "group_size": "its slope follows from n_ctx, neighbor_window and max_distance"
    }

    def reach(self, config: SelfExtendConfig) -> int:
        return config.neighbor_window + config.group_size * slack(config)

    def longest_context(self, config: SelfExtendConfig) -> int:
        return max(config.n_ctx_train, config.n_ctx)

    def sharing(self, config: SelfExtendConfig) -> str:
        left, beyond = self._slope(config)
        return f"the distance of older tokens grows by 1 every {beyond / left:.3g} tokens"

    def stage(self, config: SelfExtendConfig, n_cached: int, n_total: int) -> int:
        if n_total > config.n_ctx:
            raise ConfigError(f"the slope of leaky-rerope is that for {config.n_ctx} tokens, not {n_total}")
        return super().stage(config, n_cached, n_total)

    def far(self, config: SelfExtendConfig, g: int, k: Integers) -> Integers:
        left, beyond = self._slope(config)
        return g - g * left // beyond + k * left // beyond

    def _slope(self, config: SelfExtendConfig) -> tuple[int, int]:
        return slack(config), config.n_ctx - config.neighbor_window


class Restart(FixedWindow):
    """Distances of the tokens outside the window begin again, at half of the window (r), in groups of G.

    Near and far tokens share the distances from r on, so neither takes positions from the other: with r = W it were
    Self-Extend, r = W/G is Jet-Long (arXiv 2607.07740), G = 1 and r = 128 STRING (arXiv 2410.18745). G is the smallest
    that the text so far needs.
    """

    name = "restart"
    without: ClassVar[Mapping[str, str]] = {"group_size": "its groups grow with the text"}

    def default_distances(self, n_ctx_train: int) -> tuple[int, ...]:
        return (max(8, int(TRUSTED_DISTANCES * n_ctx_train)), n_ctx_train)

    def default_window(self, room: int) -> int:
        return max(1, room // 2)

    def reach(self, config: SelfExtendConfig) -> int:
        # g <= n1 - 1 - W, in groups of G at most G times the far positions.
        return config.neighbor_window + 1 + config.group_size * self._far_positions(config)

    def n_regroupings(self, config: SelfExtendConfig) -> int:
        return config.group_size - 1

    def sharing(self, config: SelfExtendConfig) -> str:
        return (
            f"the distances of older tokens begin again at {self._again(config)}, "
            f"in groups that grow with the text up to {config.group_size}"
        )

    def far(self, config: SelfExtendConfig, g: int, k: Integers) -> Integers:
        size = max(1, ceil(g / self._far_positions(config)))
        return g + config.neighbor_window - self._again(config) - g // size + k // size

    def _again(self, config: SelfExtendConfig) -> int:
        """r: the distance of the nearest token outside the window."""
        return (config.neighbor_window + 1) // 2

    def _far_positions(self, config: SelfExtendConfig) -> int:
        return slack(config) + config.neighbor_window - self._again(config)


class DualChunk(FixedWindow):
    """All chunks of `block_size` tokens but the latest lie on top of each other (dual chunk attention, arXiv
    2402.17463, in the form that one position a key allows): the window and one whole chunk are exact, and an older
    token stands where its like stands in that chunk."""

    name = "dca"
    without: ClassVar[Mapping[str, str]] = {"group_size": "one token of each chunk shares a position"}

    def default_block(self, free: int, n_batch: int, size: int) -> int:
        most = self.largest_block(free, n_batch)
        return whole_tiles(most, most)

    def largest_block(self, free: int, n_batch: int) -> int:
        # In the worst step a window, nearly two blocks and n_batch tokens lie between a query and the chunk's first.
        return (free - n_batch + 1) // 2

    def largest_group(self, n_ctx_train: int) -> int:
        return LONGEST

    def reach(self, config: SelfExtendConfig) -> int:
        return config.neighbor_window + config.group_size * config.block_size

    def longest_context(self, config: SelfExtendConfig) -> int:
        return LONGEST

    def sharing(self, config: SelfExtendConfig) -> str:
        return f"older tokens share key positions with those before them in steps of {config.block_size}"

    def far(self, config: SelfExtendConfig, g: int, k: Integers) -> Integers:
        return g - config.block_size + k % config.block_size


#: Schedules by name, in the order of `enum sx_schedule`.
RULES: dict[str, Schedule] = {
    rule.name: rule for rule in (SelfExtend(), Paper(), AdaGroPE(), ReRoPE(), LeakyReRoPE(), Restart(), DualChunk())
}
SCHEDULES = tuple(RULES)


def schedule_positions_numpy(config: SelfExtendConfig, n_cached: int, n_total: int) -> npt.NDArray[np.int32]:
    """Key positions P(0..n_cached-1), int32, for a step over tokens [n_cached, n_total).

    Raises ConfigError when the step cannot keep its distances below `max_distance` and the neighbor window.
    """
    if not 0 <= n_cached <= n_total:
        raise ConfigError(f"a step needs 0 <= n_cached <= n_total, not {n_cached} and {n_total}")
    rule = RULES[config.schedule]
    if n_total <= config.n_ctx_train and not rule.groups_within_trained:
        return np.arange(n_cached, dtype=np.int32)
    return rule.positions(config, rule.stage(config, n_cached, n_total), n_cached)
