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


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} must be a list of texts, not {shown(value)}")
    return tuple(text(name, one) for one in value)


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

    def __post_init__(self) -> None:
        for name, value in check_all(_CHECKS, asdict(self)).items():
            object.__setattr__(self, name, value)

    def add_to(
        self, sampler: internals.LlamaSampler, model: internals.LlamaModel, *, temp: float, n_ctx: int, seed: int
    ) -> None:
        """Put them into a chain that llama_cpp made, where llama.cpp's own tools have them.

        `temp`, `seed`: those of the chain; `n_ctx`: the context in tokens.
        """
        if self == MoreSamplers():
            return
        chain = sampler.sampler
        n_custom = len(sampler.custom_samplers)  # they come first, and have no names: asking would end the process
        n_named = llama_cpp.llama_sampler_chain_n(chain) - n_custom
        for part in [llama_cpp.llama_sampler_chain_remove(chain, n_custom) for _ in range(n_named)]:
            name = llama_cpp.llama_sampler_name(part).decode().removeprefix("?")  # "?" = does nothing
            if name == "top-k":
                sampler.add_top_n_sigma(self.top_n_sigma)
            if name == "temp":
                llama_cpp.llama_sampler_free(part)
                sampler.add_temp_ext(temp, self.dynatemp_range, self.dynatemp_exponent)
                continue
            llama_cpp.llama_sampler_chain_add(chain, part)
            if name == "penalties":
                self._add_dry(sampler, model, n_ctx)
            if name == "min-p":
                sampler.add_xtc(self.xtc_probability, self.xtc_threshold, 1, seed)

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
