"""Grammars and JSON schemas, checked before and while a text follows them."""

from __future__ import annotations

import ctypes
import re
from typing import TYPE_CHECKING, Any

import llama_cpp
import llama_cpp._internals as internals
import numpy as np
import numpy.typing as npt

from selfextend_gguf.errors import GrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher

# What llama.cpp cannot follow ends the process. Its parser recurses into parentheses: some thousands overflow a stack.
_DEEPEST = 256
_LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*')
_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


def check_grammar(vocab: llama_cpp.llama_vocab_p, grammar: str, root: str = "root") -> None:
    """Raise GrammarError unless llama.cpp can parse a grammar (GBNF)."""
    depth = deepest = 0
    for character in _LITERAL.sub("", grammar):
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if deepest > _DEEPEST:
        raise GrammarError(f"the grammar nests {deepest} parentheses; at most {_DEEPEST} are possible")
    if not grammar.strip() or "\0" in grammar:
        raise GrammarError("the grammar is empty or holds a null character")
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar.encode(), root.encode())
    if not sampler:
        raise GrammarError(f"llama.cpp cannot parse the grammar, or it has no rule {root!r}, or it is left-recursive")
    llama_cpp.llama_sampler_free(sampler)


class GrammarSampler:
    """A sampler with a grammar, in place of llama_cpp's: raises where no token continues the text."""

    def __init__(self, sampler: internals.LlamaSampler, n_vocab: int) -> None:
        self._sampler = sampler
        self._n_vocab = n_vocab

    def sample(self, ctx: internals.LlamaContext, idx: int = -1) -> int:
        """As `llama_sampler_sample`. Raises GrammarError instead of accepting a token that the grammar forbids."""
        token = _chosen(self._sampler, _candidates(ctx, idx, self._n_vocab))
        if token is None:
            raise GrammarError("the grammar allows no token here")
        llama_cpp.llama_sampler_accept(self._sampler.sampler, token)
        return token


class SchemaSampler:
    """A sampler that keeps to a JSON schema: the tokens that do not fit it never reach llama.cpp's samplers."""

    def __init__(self, sampler: internals.LlamaSampler, following: LLMatcher, n_vocab: int) -> None:
        self._sampler = sampler
        self._following = following
        self._n_vocab = n_vocab

    def sample(self, ctx: internals.LlamaContext, idx: int = -1) -> int:
        """As `llama_sampler_sample`. Raises GrammarError where no token continues a text that fits the schema."""
        bits = np.frombuffer(self._following.compute_bitmask(), np.uint8)
        fits = np.unpackbits(bits, count=self._n_vocab, bitorder="little").astype(bool)
        candidates = _candidates(ctx, idx, self._n_vocab)
        candidates["logit"][~fits] = -np.inf
        token = None if self._following.is_error() else _chosen(self._sampler, candidates)
        if token is None or not fits[token] or not self._following.consume_token(token):
            raise GrammarError(f"the JSON schema allows no token here {self._following.get_error():.200}".rstrip())
        llama_cpp.llama_sampler_accept(self._sampler.sampler, token)
        return token


def _candidates(ctx: internals.LlamaContext, idx: int, n_vocab: int) -> npt.NDArray[Any]:
    """All tokens with their logits."""
    candidates = np.zeros(n_vocab, _TOKEN_DATA)
    candidates["id"] = np.arange(n_vocab)
    candidates["logit"] = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx.ctx, idx), (n_vocab,))
    return candidates


def _chosen(sampler: internals.LlamaSampler, candidates: npt.NDArray[Any]) -> int | None:
    """The token that a sampler chooses; None if all are forbidden."""
    array = llama_cpp.llama_token_data_array(
        data=candidates.ctypes.data_as(llama_cpp.llama_token_data_p),
        size=len(candidates),
        selected=-1,
        sorted=False,
    )
    llama_cpp.llama_sampler_apply(sampler.sampler, ctypes.byref(array))
    chosen = array.data[array.selected] if array.selected >= 0 else None
    return int(chosen.id) if chosen is not None and chosen.logit > -np.inf else None
