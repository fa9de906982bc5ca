"""Pictures of measurements. Needs the extra `[plot]` (matplotlib)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.perplexity import LengthResult, by_position


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'selfextend-gguf[plot]'") from error
    # Without pyplot: no window system, no state that outlives the picture.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def plot_perplexity(results: Sequence[LengthResult], file: BinaryIO | Path, title: str, n_ctx_train: int) -> None:
    """Perplexity against position, one line a method, as PNG: each method at the longest length it was measured at."""
    figure, axes = _figure(9, 5.5)
    longest = {r.method: r for r in sorted(results, key=lambda r: r.n_tokens)}
    for result in longest.values():
        axes.plot(*by_position(result.losses), label=result.method, linewidth=1.8)
    axes.axvline(n_ctx_train, color="gray", linestyle=":", label="trained context")
    axes.set(xscale="log", yscale="log", xlabel="position in the text (tokens)", ylabel="perplexity", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(file, dpi=130, format="png")


def plot_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    file: BinaryIO | Path,
    title: str,
    x_label: str,
    y_label: str,
) -> None:
    """One line a name, (x, y) each, x logarithmic to base 2, as PNG."""
    figure, axes = _figure(9, 5.5)
    for (name, (x, y)), marker in zip(curves.items(), itertools.cycle("osv^D*PX")):
        axes.plot(x, y, marker=marker, label=name, linewidth=1.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=130, format="png")


def plot_retrieval(
    scores: npt.NDArray[np.float64], lengths: Sequence[int], depths: Sequence[float], file: BinaryIO | Path, title: str
) -> None:
    """Heat map of mean scores (len(depths), len(lengths)), nan where there is none, as PNG."""
    figure, axes = _figure(2 + 0.9 * len(lengths), 1.8 + 0.45 * len(depths))
    image = axes.imshow(scores, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set(xlabel="text length (tokens)", ylabel="depth of the key", title=title)
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for row, column in np.ndindex(scores.shape):
        if not np.isnan(scores[row, column]):
            axes.text(column, row, f"{scores[row, column]:.2f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="score")
    figure.savefig(file, dpi=130, format="png")
