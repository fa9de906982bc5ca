"""How a token is chosen: numbers that make sense, and processors whose failures are not lost.

llama.cpp samples with any numbers, NaN among them. It calls processors through C, where Python can only print what they
raise, and would go on without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import llama_cpp
import llama_cpp._internals as internals
import numpy as np
import numpy.typing as npt

from selfextend_gguf.checks import (
    Check,
    callable_,
    check_all,
    optional,
    real,
    seed,
    shown,
    text,
    truth,
    whole,
    whole_number,
)
from selfextend_gguf.errors import ConfigError

_INT32 = 2**31 - 1
_SMALLEST = 1e-6  # of what is divided by

#: Arguments of `llama_cpp.Llama.sample`, as numbers that llama.cpp takes for what they are.
SAMPLING: dict[str, Check] = {
    "top_k": whole(-_INT32, _INT32),
    "top_p": real(0, 1),
    "min_p": real(0, 1),
    "typical_p": real(0, 1),
    "temp": real(),
    "repeat_penalty": real(_SMALLEST),
    "frequency_penalty": real(),
    "presence_penalty": real(),
    "tfs_z": real(),
    "mirostat_mode": whole(0, 2),
    "mirostat_eta": real(0),
    "mirostat_tau": real(0),
    "penalize_nl": truth,
}


def _prompt(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return text(name, value)
    if isinstance(value, list | tuple | np.ndarray):
        return value  # its tokens are checked against the vocabulary
    raise ConfigError(f"{name} must be a text or a list of tokens, not {shown(value)}")


def _stop(name: str, value: Any) -> list[str]:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list | tuple):
        raise ConfigError(f"{name} must be a text or a list of texts, not {shown(value)}")
    return [one for one in strings if text(name, one)]  # the empty text is everywhere, and stands nowhere


def _iterable(name: str, value: Any) -> Any:
    if not isinstance(value, Iterable):
        raise ConfigError(f"{name} must be a list, not {shown(value)}")
    return value


def _anything(_: str, value: Any) -> Any:
    return value


#: Arguments of `llama_cpp.Llama.create_completion`.
COMPLETION: dict[str, Check] = {
    **{name: check for name, check in SAMPLING.items() if name not in ("temp", "penalize_nl")},
    "temperature": SAMPLING["temp"],
    "prompt": _prompt,
    "suffix": optional(text),
    "max_tokens": optional(whole()),
    "logprobs": optional(whole(0)),
    "echo": truth,
    "stop": _stop,
    "stream": truth,
    "seed": optional(seed),
    "model": optional(text),
    "stopping_criteria": optional(callable_),
    "logits_processor": optional(_iterable),
    "grammar": _anything,  # these two are checked against the vocabulary
    "logit_bias": _anything,
}

Scores = npt.NDArray[np.single]  # (n_vocab,)
Processor = Callable[[npt.NDArray[np.intc], Scores], Scores]


def check_sampling(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling arguments of `llama_cpp.Llama.sample`. Raises ConfigError, UnknownArgumentError."""
    return check_all(SAMPLING, arguments)


class Sampler(Protocol):
    """What chooses a token from the logits of a context."""

    def sample(self, ctx: internals.LlamaContext, idx: int = -1) -> int:
        """Token chosen from the logits of output `idx`."""


class Processors:
    """Logits processors as one, which keeps what they raise for `ProcessedSampler`."""

    def __init__(self, processors: Iterable[Processor]) -> None:
        self.error: BaseException | None = None
        self._processors = [callable_("a logits processor", processor) for processor in processors]

    def __call__(self, input_ids: npt.NDArray[np.intc], scores: Scores) -> Scores:
        if self.error is not None:
            return scores
        try:
            processed = scores
            for processor in self._processors:
                processed = processor(input_ids, processed)
            return _usable(np.asarray(processed), scores)
        except BaseException as error:  # Ctrl-C too
            self.error = error
            return scores


def _usable(processed: npt.NDArray[Any], scores: Scores) -> Scores:
    if processed.shape != scores.shape:
        raise ConfigError(f"a logits processor returned the shape {processed.shape}, not {scores.shape}")
    if np.isnan(processed).any() or not (processed > -np.inf).any():
        raise ConfigError("the logits processors leave no token to choose: all logits are -inf, or one is no number")
    return processed


class ProcessedSampler:
    """A sampler with processors: raises what they raised."""

    def __init__(self, sampler: Sampler, processors: Processors) -> None:
        self._sampler = sampler
        self._processors = processors

    def sample(self, ctx: internals.LlamaContext, idx: int = -1) -> int:
        """As the sampler does."""
        token = self._sampler.sample(ctx, idx)
        if self._processors.error is not None:
            raise self._processors.error
        return token


def bias_processor(bias: Mapping[Any, Any], n_vocab: int) -> Processor:
    """A processor that adds a bias to the logits of some tokens: {token: bias}, -inf forbids. Raises ConfigError."""
    if not isinstance(bias, Mapping):
        raise ConfigError(f"logit_bias must be a dictionary, not {shown(bias)}")
    added = np.zeros(n_vocab, np.single)
    for token, value in bias.items():
        number = int(token) if isinstance(token, str) and token.isascii() and token.isdigit() else token  # as in JSON
        number = whole_number("a token of logit_bias", number, 0, n_vocab - 1)
        forbidden = isinstance(value, float) and value == -np.inf
        added[number] = value if forbidden else real()(f"logit_bias[{number}]", value)
    return lambda _, scores: scores + added


def end_tokens(model: internals.LlamaModel) -> list[int]:
    """The tokens of a model's vocabulary that end an answer."""
    return [token for token in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(model.vocab, token)]


def as_processors(logits_processor: Any, logit_bias: Any, n_vocab: int) -> llama_cpp.LogitsProcessorList | None:
    """Both as what `llama_cpp.Llama.generate` takes; llama_cpp loses one of the two. Raises ConfigError."""
    if logit_bias is None:
        return None if logits_processor is None else llama_cpp.LogitsProcessorList(logits_processor)
    return llama_cpp.LogitsProcessorList([*(logits_processor or []), bias_processor(logit_bias, n_vocab)])
