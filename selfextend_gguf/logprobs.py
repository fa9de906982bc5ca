"""Log-probabilities of a completion's tokens, in the form of OpenAI's API and with numbers that JSON can express.

llama_cpp gives numpy's numbers, and with `echo` each token the probabilities of the one after it.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_LEAST = -9999.0  # OpenAI's for what is impossible, for which JSON has no number


@dataclass(frozen=True)
class Scored:
    """A text and the logits of its tokens."""

    tokens: Sequence[int]
    scores: npt.NDArray[np.single]  # (n, n_vocab): row i is what follows token i
    detokenize: Callable[[list[int]], bytes]

    def logprobs(self, begin: int, *, n_top: int, text_offset: int, first_is_known: bool) -> dict[str, list[Any]]:
        """Log-probabilities of the tokens from `begin` on, beside those of the `n_top` likeliest at each place.

        `text_offset` = characters before. The first token of a text has none, which is None.
        """
        found: dict[str, list[Any]] = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
        decode = codecs.getincrementaldecoder("utf-8")("ignore").decode
        for i in range(begin, len(self.tokens)):
            piece = self.detokenize([self.tokens[i]])
            found["tokens"].append(piece.decode("utf-8", "ignore"))
            found["text_offset"].append(text_offset)
            text_offset += len(decode(piece))
            own, top = self._at(i, n_top) if i > begin or first_is_known else (None, None)
            found["token_logprobs"].append(own)
            found["top_logprobs"].append(top)
        return found

    def _at(self, i: int, n_top: int) -> tuple[float, dict[str, float]]:
        logprobs = log_softmax(self.scores[i - 1])
        top: dict[str, float] = {}
        for token in np.argsort(-logprobs, kind="stable")[:n_top].tolist():
            top.setdefault(self._name(token), _plain(logprobs[token]))
        own = _plain(logprobs[self.tokens[i]])
        return own, top | {self._name(self.tokens[i]): own}

    def _name(self, token: int) -> str:
        return self.detokenize([token]).decode("utf-8", "ignore")


def log_softmax(logits: npt.NDArray[np.single]) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities (n_vocab,)."""
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def _plain(logprob: np.float64) -> float:
    return max(float(logprob), _LEAST)
