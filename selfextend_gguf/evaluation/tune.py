"""Choosing Self-Extend's parameters by measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.hidden_keys import Key, KeyText, hide, told
from selfextend_gguf.evaluation.perplexity import Estimate, perplexity_ratio, stretches
from selfextend_gguf.evaluation.readers import Losses, open_reader
from selfextend_gguf.planning import plan
from selfextend_gguf.schedule import SCHEDULES, SelfExtendConfig
from selfextend_gguf.tiny.keys import FACT, KEY_NAMES, QUESTION, random_value
from selfextend_gguf.tokenizer import Tokenizer

_MOST_KEYS = 12
_ANSWER = 8  # tokens for a key of five digits
_TOKENS_A_KEY = 128  # a shorter text holds fewer keys, or it would hold little else


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


def with_keys(tokenizer: Tokenizer, tokens: Sequence[int], n_ctx: int) -> KeyText:
    """A text with keys that, with any question about them, fills a context of `n_ctx` tokens. ConfigError if `tokens`
    are too few."""
    rng = np.random.default_rng(0)
    names = rng.choice(KEY_NAMES, max(1, min(_MOST_KEYS, n_ctx // _TOKENS_A_KEY)), replace=False)
    keys = []
    for name in names:
        value = random_value(rng)
        sentence, question = FACT.format(name=name, value=value), QUESTION.format(name=name)
        keys.append(Key(f"\n{sentence}\n", "\n" + question.rstrip(), value))
    longest = max(len(tokenizer.tokens(key.question, begins=False)) for key in keys)
    return hide(tokenizer, tokens, n_ctx - longest - _ANSWER, keys)


def tune(
    model_path: str,
    tokens: Sequence[int],
    n_ctx: int,
    n_ctx_train: int,
    budget_seconds: float,
    *,
    tokenizer: Tokenizer,
    on_progress: Callable[[int, int, float], None] = lambda done, left, seconds: None,
    **arguments: Any,
) -> list[Trial]:
    """Trials from best to worst: by keys found (where they are clearly fewer than the most), then by paired perplexity.

    Successive halving: all candidates read one stretch of the text, in which keys are hidden, the better half another,
    and so on until the texts are used up, or the time that is left is shorter than a reading. Losses are those of the
    tokens beyond the trained context, without those of the keys.

    Args:
        tokens: The text to tune on; ConfigError if it is shorter than `n_ctx`.
        tokenizer: The model's.
        on_progress: Called after each reading: readings done, candidates left, seconds used.
        arguments: Of `Llama`.
    """
    began = time.monotonic()
    texts = stretches(tokens, n_ctx, 8, tokenizer.bos)
    keys = with_keys(tokenizer, tokens, n_ctx)
    trials = [Trial(config, is_default=i == 0) for i, config in enumerate(candidates(n_ctx_train, n_ctx))]
    running, done, longest, spent = list(trials), 0, 0.0, 0.0
    for number, text in enumerate(texts):
        for trial in running:
            if done and spent + longest > budget_seconds:
                break
            reader = open_reader(
                trial.config.schedule, model_path, n_ctx, parameters=_without_schedule(trial), **arguments
            )
            try:
                if number == 0:
                    losses = reader.losses(keys.tokens)
                    trial.losses.append(losses[n_ctx_train:][keys.is_text[1 + n_ctx_train :]])
                    answers = told(reader, tokenizer, keys, _ANSWER)
                    found = [wanted in answer for wanted, answer in zip(keys.answers, answers, strict=True)]
                    trial.retrieval = float(np.mean(found))
                else:
                    trial.losses.append(reader.losses(text)[n_ctx_train:])
            finally:
                reader.close()
            done += 1
            before, spent = spent, time.monotonic() - began
            longest = max(longest, spent - before)
            on_progress(done, len(running), spent)
        finished = [t for t in running if len(t.losses) > number]
        if len(finished) < len(running) or len(finished) <= 4:
            break
        finished.sort(key=lambda t: t.mean_loss(number + 1))
        kept = finished[: (len(finished) + 1) // 2]
        running = kept + [t for t in finished[len(kept) :] if t.is_default]
    return _ranked(trials, clearly_fewer=max(0.1, 1.5 / len(keys.answers)))


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
