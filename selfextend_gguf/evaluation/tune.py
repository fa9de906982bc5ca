"""Choosing Self-Extend's parameters by measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.perplexity import Estimate, perplexity_ratio, stretches
from selfextend_gguf.evaluation.readers import Losses, open_reader
from selfextend_gguf.evaluation.retrieval import ANSWER_ROOM, score
from selfextend_gguf.evaluation.tasks import TASKS, CountTokens, Task, Wish
from selfextend_gguf.llama import Llama
from selfextend_gguf.planning import plan
from selfextend_gguf.schedule import SCHEDULES, SelfExtendConfig

_N_KEYS = 12


@dataclass
class Trial:
    """One set of parameters and what was measured of it."""

    config: SelfExtendConfig
    is_default: bool
    losses: list[Losses] = field(default_factory=list)  # one array a text: the tokens beyond the trained context
    retrieval: float | None = None  # fraction of keys found; finalists only

    @property
    def parameters(self) -> dict[str, Any]:
        """Keyword arguments of `Llama` and `plan`."""
        return parameters_of(self.config)

    def mean_loss(self, n_texts: int) -> float:
        """Mean loss (nats) over the first `n_texts` texts."""
        return float(np.concatenate(self.losses[:n_texts]).mean())

    def ratio_to(self, other: Trial) -> Estimate:
        """Perplexity in relation to another trial's on the texts that both read, paired token by token."""
        n = min(len(self.losses), len(other.losses))
        return perplexity_ratio(np.concatenate(self.losses[:n]), np.concatenate(other.losses[:n]))


def parameters_of(config: SelfExtendConfig) -> dict[str, Any]:
    """What to give `plan` to get `config` again; numbers that its schedule has no use for are left out."""
    names = ("max_distance", "neighbor_window", "group_size", "block_size")  # each is checked against those before it
    parameters: dict[str, Any] = {"schedule": config.schedule}
    for name in names:
        attempt = parameters | {name: getattr(config, name)}
        try:
            plan(config.n_ctx_train, config.n_ctx, **attempt)
        except ConfigError:
            continue
        parameters = attempt
    return parameters


def candidates(n_ctx_train: int, n_ctx: int) -> Iterator[SelfExtendConfig]:
    """The default, the other schedules with automatic parameters, then every schedule with windows of an eighth to half
    of the largest distance, largest distances of half to all of the trained context, and groups as small as possible or
    half as large again."""
    seen = set()
    for config in _all_candidates(n_ctx_train, n_ctx):
        if config not in seen:
            seen.add(config)
            yield config


def _all_candidates(n_ctx_train: int, n_ctx: int) -> Iterator[SelfExtendConfig]:
    def attempt(**parameters: Any) -> SelfExtendConfig | None:
        try:
            return plan(n_ctx_train, n_ctx, **parameters)
        except ConfigError:
            return None  # does not reach n_ctx, or the schedule has no such parameter

    yield plan(n_ctx_train, n_ctx)
    # What differs most comes first: a slow model reads few candidates within the budget.
    for max_distance in (None, n_ctx_train, n_ctx_train // 2):
        for schedule in SCHEDULES:
            config = attempt(schedule=schedule, max_distance=max_distance)
            if config is not None:
                yield config
    for schedule in SCHEDULES:
        for max_distance in (n_ctx_train, 3 * n_ctx_train // 4, n_ctx_train // 2):
            for window in (max_distance // 4, max_distance // 8, max_distance // 2, None):
                config = attempt(schedule=schedule, max_distance=max_distance, neighbor_window=window)
                if config is None:
                    continue
                yield config
                wide = attempt(
                    schedule=schedule,
                    max_distance=max_distance,
                    neighbor_window=window,
                    group_size=config.group_size * 3 // 2,
                )
                if wide is not None:
                    yield wide


def key_tasks(n_ctx: int, text: str, count_tokens: CountTokens) -> list[Task]:
    """Keys at all depths of texts that fill a context of `n_ctx` tokens, cut from `text`."""
    rng, haystack = np.random.default_rng(0), text.encode("ascii", "replace").decode()
    depths = np.linspace(0.05, 0.95, _N_KEYS)
    return [TASKS["native"](rng, Wish(n_ctx - ANSWER_ROOM, count_tokens, float(d), text=haystack)) for d in depths]


def fraction_found(model_path: str, n_ctx: int, tasks: Sequence[Task], **arguments: Any) -> float:
    """Mean score of the tasks with given arguments of `Llama`."""
    llm = Llama(model_path, n_ctx=n_ctx, **arguments)
    try:
        return float(np.mean([score(llm, task) for task in tasks]))
    finally:
        llm.close()


def tune(
    model_path: str,
    tokens: Sequence[int],
    n_ctx: int,
    n_ctx_train: int,
    budget_seconds: float,
    *,
    bos: int | None = None,
    retrieval: Callable[[dict[str, Any]], float] | None = None,
    on_progress: Callable[[int, int, float], None] = lambda done, left, seconds: None,
    **arguments: Any,
) -> list[Trial]:
    """Trials from best to worst: by retrieval (where it is clearly worse than the best), then by paired perplexity.

    Successive halving: all candidates read one stretch of `n_ctx` tokens, the better half another, and so on until the
    texts or the time are used up. Losses are those of the tokens beyond the trained context.

    Args:
        tokens: The text to tune on; ConfigError if it is shorter than `n_ctx`.
        bos: The token that the vocabulary wants before each stretch, if it wants one.
        retrieval: Fraction of keys found with given parameters, for the last four and the default.
        on_progress: Called after each reading: readings done, candidates left, seconds used.
        arguments: Of `Llama`.
    """
    began = time.monotonic()
    texts = stretches(tokens, n_ctx, 8, bos)
    trials = [Trial(config, is_default=i == 0) for i, config in enumerate(candidates(n_ctx_train, n_ctx))]
    running, done = list(trials), 0
    time_for_retrieval = 0.3 * budget_seconds if retrieval else 0.0
    for number, text in enumerate(texts):
        for trial in running:
            if done and time.monotonic() - began > budget_seconds - time_for_retrieval:
                break
            reader = open_reader(
                trial.config.schedule, model_path, n_ctx, parameters=_without_schedule(trial), **arguments
            )
            try:
                trial.losses.append(reader.losses(text)[n_ctx_train:])
            finally:
                reader.close()
            done += 1
            on_progress(done, len(running), time.monotonic() - began)
        finished = [t for t in running if len(t.losses) > number]
        if len(finished) < len(running) or len(finished) <= 4:
            break
        finished.sort(key=lambda t: t.mean_loss(number + 1))
        kept = finished[: (len(finished) + 1) // 2]
        running = kept + [t for t in finished[len(kept) :] if t.is_default]
    return _ranked(trials, retrieval, lambda: budget_seconds - (time.monotonic() - began))


def _without_schedule(trial: Trial) -> dict[str, Any]:
    return {name: value for name, value in trial.parameters.items() if name != "schedule"}


def _ranked(
    trials: list[Trial], retrieval: Callable[[dict[str, Any]], float] | None, seconds_left: Callable[[], float]
) -> list[Trial]:
    """Those that read most texts first, among them the better perplexity; finalists are also asked for keys."""
    read = [trial for trial in trials if trial.losses]
    ranked = sorted(read, key=lambda t: (-len(t.losses), t.mean_loss(len(t.losses))))
    if retrieval is None:
        return ranked
    finalists = ranked[:4] + [t for t in ranked[4:] if t.is_default]
    for trial in finalists:
        if seconds_left() > 0:
            trial.retrieval = retrieval(trial.parameters)
    best = max((t.retrieval for t in finalists if t.retrieval is not None), default=0.0)
    # A tenth fewer keys outweighs any perplexity.
    return sorted(ranked, key=lambda t: (t.retrieval is not None and t.retrieval < best - 0.1, ranked.index(t)))
