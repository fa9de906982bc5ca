"""Numpy twin of `native/schedule.c`: the same integers, for the reference, for tests and for reading.

A *schedule* is a pure function. Before tokens [n_cached, n_total) are decoded it says which *key position*
P(k) each cached token k gets; queries always stand at their token index, so they see key k at distance q - P(k).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from selfextend_gguf.config import SelfExtendConfig
from selfextend_gguf.errors import ConfigError


def grouped_positions(n_cached: int, boundary: int, group_size: int) -> npt.NDArray[np.int32]:
    """P(0..n_cached-1) for a boundary g: g - g//G + k//G for k < g, else k."""
    k = np.arange(n_cached, dtype=np.int32)
    return np.where(k < boundary, boundary - boundary // group_size + k // group_size, k).astype(np.int32)


def boundary(config: SelfExtendConfig, n_cached: int, n_total: int) -> int:
    """Boundary g of a step over tokens [n_cached, n_total), found by trying multiples of the block in order.

    Raises ConfigError when no boundary keeps the distances below `max_distance` and the neighbor window.
    """
    if not 0 <= n_cached <= n_total:
        raise ConfigError(f"a step needs 0 <= n_cached <= n_total, not {n_cached} and {n_total}")
    size, window, block = config.group_size, config.neighbor_window, config.block_size

    def reaches(g: int) -> bool:
        return n_total - (g - g // size) <= config.max_distance

    if config.schedule == "paper":
        g = max(0, (n_cached - window) // block * block)
        if n_total > config.n_ctx_train and not reaches(g):
            raise ConfigError(f"group size {size} does not reach {n_total} tokens")
        return g
    if n_total <= config.n_ctx_train:
        return 0
    for g in range(0, n_cached + 1, block):
        if reaches(g):
            if g > 0 and n_cached - g < window:
                break
            return g
    raise ConfigError(f"{n_total - n_cached} tokens at once after {n_cached} leave no neighbor window of {window}")


def schedule_positions_numpy(config: SelfExtendConfig, n_cached: int, n_total: int) -> npt.NDArray[np.int32]:
    """Key positions P(0..n_cached-1), int32, for a step over tokens [n_cached, n_total)."""
    return grouped_positions(n_cached, boundary(config, n_cached, n_total), config.group_size)
