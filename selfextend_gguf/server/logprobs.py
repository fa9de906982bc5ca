"""Log-probabilities of an answer's tokens, in the two forms of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from selfextend_gguf.logprobs import log_softmax

_LEAST = -9999.0  # OpenAI's for what is impossible, for which JSON has no number


@dataclass(frozen=True)
class Likely:
    """A token at a place, and how likely it is there."""

    spelled: bytes
    logprob: float

    @property
    def text(self) -> str:
        """What it spells, bytes that are no characters replaced."""
        return self.spelled.decode("utf-8", "replace")

    def as_chat(self) -> dict[str, Any]:
        """As chats have it."""
        return {"token": self.text, "logprob": self.logprob, "bytes": list(self.spelled)}


@dataclass(frozen=True)
class Chosen:
    """A token of an answer; `likely` and `top` are None where nobody asked for them."""

    spelled: bytes
    likely: Likely | None = None
    top: Sequence[Likely] = ()

    @classmethod
    def among(
        cls, logits: npt.NDArray[np.single], token: int, n_top: int, spell: Callable[[list[int]], bytes]
    ) -> Chosen:
        """A token among `n_top` likeliest ones by the model's `logits` (n_vocab,), before any sampler."""
        logprobs = log_softmax(logits)
        order = np.argsort(-logprobs, kind="stable")[:n_top].tolist()
        likely = [Likely(spell([t]), max(float(logprobs[t]), _LEAST)) for t in (token, *order)]
        return cls(likely[0].spelled, likely[0], likely[1:])


def of_chat(tokens: Sequence[Chosen]) -> dict[str, Any]:
    """`logprobs` of a choice of a chat completion."""
    content = [
        {**token.likely.as_chat(), "top_logprobs": [top.as_chat() for top in token.top]}
        for token in tokens
        if token.likely is not None
    ]
    return {"content": content, "refusal": None}


def of_completion(tokens: Sequence[Chosen], text_offset: int) -> dict[str, Any]:
    """`logprobs` of a choice of a completion; `text_offset` = characters before the first of the tokens."""
    found: dict[str, Any] = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
    for token in tokens:
        if token.likely is None:
            continue
        found["tokens"].append(token.likely.text)
        found["text_offset"].append(text_offset)
        found["token_logprobs"].append(token.likely.logprob)
        found["top_logprobs"].append({top.text: top.logprob for top in (*token.top, token.likely)})
        text_offset += len(token.likely.text)
    return found
