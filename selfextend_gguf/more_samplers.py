"""Samplers of llama.cpp that `llama_cpp.Llama` has no arguments for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import llama_cpp
import llama_cpp._internals as internals

from selfextend_gguf.checks import Check, check_all, real, shown, text, whole
from selfextend_gguf.errors import ConfigError

_INT32 = 2**31 - 1

#: Samplers in llama.cpp's default order, by the names that its tools have for them.
SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
_ALSO = {"typical": "typ_p", "typical_p": "typ_p", "temp": "temperature"}

# What llama_cpp puts into a chain, by what llama.cpp's parts of a chain call themselves.
_THEIRS = {
    "penalties": "penalties",
    "top-k": "top_k",
    "typical": "typ_p",
    "top-p": "top_p",
    "min-p": "min_p",
    "temp": "temperature",
}


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} must be a list of texts, not {shown(value)}")
    return tuple(text(name, one) for one in value)


def _samplers(name: str, value: Any) -> tuple[str, ...]:
    names = [one.replace("-", "_") for one in _texts(name, value)]
    known = tuple(_ALSO.get(one, one) for one in names)
    for one in known:
        if one not in SAMPLERS:
            raise ConfigError(f"{name}: there is no {one!r}, but {', '.join(SAMPLERS)}")
        if known.count(one) > 1:
            raise ConfigError(f"{name} names {one} twice")
    return known


_CHECKS: Mapping[str, Check] = {
    "top_n_sigma": real(),
    "xtc_probability": real(0, 1),
    "xtc_threshold": real(0, 1),
    "dynatemp_range": real(0),
    "dynatemp_exponent": real(),
    "dry_multiplier": real(0),
    "dry_base": real(),
    "dry_allowed_length": whole(0, _INT32),
    "dry_penalty_last_n": whole(-1, _INT32),
    "dry_sequence_breakers": _texts,
    "samplers": _samplers,
}


@dataclass(frozen=True)
class MoreSamplers:
    """Numbers as llama.cpp's flags of these names; by default all are off. Raises ConfigError."""

    top_n_sigma: float = -1.0  # standard deviations below the largest logit that a token may have; negative = off
    xtc_probability: float = 0.0  # of leaving out all likely tokens but the least likely of them; 0 = off
    xtc_threshold: float = 0.1  # probability from which on a token is likely
    dynatemp_range: float = 0.0  # what the entropy may add to the temperature, or take from it; 0 = off
    dynatemp_exponent: float = 1.0
    dry_multiplier: float = 0.0  # of the penalty on going on with a repetition; 0 = off
    dry_base: float = 1.75  # what it is multiplied with for each token of the repetition ...
    dry_allowed_length: int = 2  # ... beyond so many
    dry_penalty_last_n: int = -1  # tokens in which repetitions are looked for; -1 = the context
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")  # no repetition goes across these texts
    samplers: tuple[str, ...] = SAMPLERS  # those that are applied, in this order; see `SAMPLERS`

    def __post_init__(self) -> None:
        for name, value in check_all(_CHECKS, asdict(self)).items():
            object.__setattr__(self, name, value)

    def add_to(
        self, sampler: internals.LlamaSampler, model: internals.LlamaModel, *, temp: float, n_ctx: int, seed: int
    ) -> None:
        """Put them into a chain that llama_cpp made, and its samplers into their order.

        `temp`, `seed`: those of the chain; `n_ctx`: the context in tokens.
        """
        if self == MoreSamplers():
            return
        chain = sampler.sampler
        n_custom = len(sampler.custom_samplers)  # they come first, and have no names: asking would end the process
        n_named = llama_cpp.llama_sampler_chain_n(chain) - n_custom
        theirs, others = {}, []
        for part in [llama_cpp.llama_sampler_chain_remove(chain, n_custom) for _ in range(n_named)]:
            name = llama_cpp.llama_sampler_name(part).decode().removeprefix("?")  # "?" = does nothing
            if name in _THEIRS:
                theirs[_THEIRS[name]] = part
            else:
                others.append(part)
        *before, chooser = others  # a grammar; and what chooses the token, which Mirostat and greedy do on their own
        for part in before:
            llama_cpp.llama_sampler_chain_add(chain, part)
        for name in self.samplers:
            if name == "dry":
                self._add_dry(sampler, model, n_ctx)
            elif name == "top_n_sigma" and "top_k" in theirs:
                sampler.add_top_n_sigma(self.top_n_sigma)
            elif name == "xtc" and "top_k" in theirs:
                sampler.add_xtc(self.xtc_probability, self.xtc_threshold, 1, seed)
            elif name == "temperature" and name in theirs:
                sampler.add_temp_ext(temp, self.dynatemp_range, self.dynatemp_exponent)
            elif name in theirs:
                llama_cpp.llama_sampler_chain_add(chain, theirs[name])
        for name, part in theirs.items():
            if name == "temperature" or name not in self.samplers:
                llama_cpp.llama_sampler_free(part)
        llama_cpp.llama_sampler_chain_add(chain, chooser)

    def _add_dry(self, sampler: internals.LlamaSampler, model: internals.LlamaModel, n_ctx: int) -> None:
        last_n = n_ctx if self.dry_penalty_last_n == -1 else min(self.dry_penalty_last_n, n_ctx)
        sampler.add_dry(
            model,
            self.dry_multiplier,
            self.dry_base,
            self.dry_allowed_length,
            last_n,
            list(self.dry_sequence_breakers),
        )
