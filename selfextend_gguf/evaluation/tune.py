"""Choosing Self-Extend's parameters by measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.hidden_keys import KeyText, filled, found, told
from selfextend_gguf.evaluation.perplexity import Estimate, perplexity_ratio, stretches
from selfextend_gguf.evaluation.readers import Losses, Reader
from selfextend_gguf.evaluation.readings import Readings
from selfextend_gguf.planning import plan
from selfextend_gguf.schedule import SCHEDULES, SelfExtendConfig
from selfextend_gguf.tokenizer import Tokenizer

_MOST_KEYS = 12


@dataclass
class Trial:
    """One set of parameters and what was measured of it."""

    config: SelfExtendConfig
    is_default: bool
    losses: list[Losses] = field(default_factory=list)  # one array a text: the tokens beyond the trained context
    retrieval: float | None = None  # fraction of keys found

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


def tune(
    readings: Readings,
    tokens: Sequence[int],
    n_ctx: int,
    *,
    tokenizer: Tokenizer,
    on_progress: Callable[[int, int], None] = lambda done, left: None,
) -> Iterator[list[Trial]]:
    """After each reading the trials so far from best to worst: by keys found (where they are clearly fewer than the
    most), then by paired perplexity.

    Successive halving: all candidates read one stretch of the text, in which keys are hidden, the better half another,
    and so on until the texts are used up, or no reading fits the budget of `readings`. Losses are those of the tokens
    beyond the trained context, without those of the keys.

    Args:
        tokens: The text to tune on; ConfigError if it is shorter than `n_ctx`.
        tokenizer: The model's.
        on_progress: Called before each reading: readings done, candidates left.
    """
    texts = stretches(tokens, n_ctx, 8, tokenizer.bos)
    keys = filled(tokenizer, tokens, n_ctx, rng=np.random.default_rng(0), most_keys=_MOST_KEYS)
    configs = candidates(readings.n_ctx_train, n_ctx)
    trials = [Trial(config, is_default=i == 0) for i, config in enumerate(configs)]
    running, done = list(trials), 0
    for number, text in enumerate(texts):
        for trial in running:
            on_progress(done, len(running))
            if _read_keys(readings, trial, tokenizer, keys) if number == 0 else _read(readings, trial, text):
                done += 1
                yield _ranked(trials, clearly_fewer=max(0.1, 1.5 / len(keys.answers)))
            elif trial.is_default:
                return  # there is nothing to compare others with
        finished = [t for t in running if len(t.losses) > number]
        if len(finished) < len(running) or len(finished) <= 4:
            break
        finished.sort(key=lambda t: t.mean_loss(number + 1))
        kept = finished[: (len(finished) + 1) // 2]
        running = kept + [t for t in finished[len(kept) :] if t.is_default]


def _read_keys(readings: Readings, trial: Trial, tokenizer: Tokenizer, text: KeyText) -> bool:
    """Whether there was time to read a text and ask for its keys."""

    def measure(reader: Reader) -> dict[str, Any]:
        return {"losses": reader.losses(text.tokens).tolist(), "answers": told(reader, tokenizer, text)}

    what = {"measure": "losses and answers", **text.asked}
    result = readings.measured(
        what,
        measure,
        trial.config.schedule,
        text.tokens,
        n_ctx=trial.config.n_ctx,
        parameters=_without_schedule(trial),
    )
    if result is None:
        return False
    beyond = readings.n_ctx_train
    trial.losses.append(np.array(result["losses"])[beyond:][text.is_text[1 + beyond :]])
    trial.retrieval = float(np.mean(found(text, result["answers"])))
    return True


def _read(readings: Readings, trial: Trial, text: Sequence[int]) -> bool:
    """Whether there was time to read a text."""
    losses = readings.losses(trial.config.schedule, text, _without_schedule(trial))
    if losses is None:
        return False
    trial.losses.append(losses[readings.n_ctx_train :])
    return True


def _without_schedule(trial: Trial) -> dict[str, Any]:
    return {name: value for name, value in trial.parameters.items() if name != "schedule"}


def _ranked(trials: list[Trial], clearly_fewer: float) -> list[Trial]:
    """Those that read most texts first, among them the better perplexity; behind them all, those that found fewer keys
    than others by more than the fraction `clearly_fewer`, which outweighs any perplexity."""
    read = [trial for trial in trials if trial.losses]
    best = max((t.retrieval or 0.0 for t in read), default=0.0)

    def rank(trial: Trial) -> tuple[bool, int, float]:
        lost = (trial.retrieval or 0.0) < best - clearly_fewer
        return lost, -len(trial.losses), trial.mean_loss(len(trial.losses))

    return sorted(read, key=rank)
