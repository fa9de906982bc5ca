"""Log-probabilities of the tokens of answers and prompts, in the two forms of OpenAI's API."""

from __future__ import annotations

import codecs
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

    id: int
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
    """A token of an answer, or of a prompt; `likely` and `top` are None where nobody asked for them."""

    id: int
    spelled: bytes
    likely: Likely | None = None
    top: Sequence[Likely] = ()

    @property
    def text(self) -> str:
        """What it spells, bytes that are no characters replaced."""
        return self.spelled.decode("utf-8", "replace")

    @classmethod
    def among(
        cls, logits: npt.NDArray[np.single], token: int, n_top: int, spell: Callable[[list[int]], bytes]
    ) -> Chosen:
        """A token among `n_top` likeliest ones by the model's `logits` (n_vocab,), before any sampler."""
        logprobs = log_softmax(logits)
        some = np.argpartition(-logprobs, min(n_top, len(logprobs) - 1))[:n_top]
        order = some[np.lexsort((some, -logprobs[some]))].tolist()
        likely = [Likely(t, spell([t]), max(float(logprobs[t]), _LEAST)) for t in (token, *order)]
        return cls(token, likely[0].spelled, likely[0], likely[1:])


class PromptNotes:
    """The tokens of a prompt, with their likelihoods from the logits of its reading. The first of all has none."""

    def __init__(self, prompt: Sequence[int], begin: int, n_top: int, spell: Callable[[list[int]], bytes]) -> None:
        """Of the tokens from `begin` on, beside the `n_top` likeliest ones at each place."""
        self._prompt = prompt
        self._begin = begin
        self._n_top = n_top
        self._spell = spell
        self.tokens = [Chosen(prompt[0], spell([prompt[0]]))] if begin == 0 else []

    def note(self, position: int, logits: npt.NDArray[np.single]) -> None:
        """The logits (n, n_vocab) of the tokens from `position` on."""
        for following in range(max(position + 1, self._begin), min(position + 1 + len(logits), len(self._prompt))):
            row = logits[following - position - 1]
            self.tokens.append(Chosen.among(row, self._prompt[following], self._n_top, self._spell))


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
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    for token in tokens:
        likely = token.likely
        found["tokens"].append(token.text)
        found["text_offset"].append(text_offset)
        found["token_logprobs"].append(None if likely is None else likely.logprob)
        found["top_logprobs"].append(
            None if likely is None else {top.text: top.logprob for top in (*token.top, likely)}
        )
        text_offset += len(decode(token.spelled))
    return found
