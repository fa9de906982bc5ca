"""Grammars checked before and while llama.cpp follows them: what it cannot follow ends the process there."""

from __future__ import annotations

import ctypes
import json
import re
from typing import Any

import llama_cpp
import llama_cpp._internals as internals
import numpy as np
from llama_cpp.llama_grammar import json_schema_to_gbnf

from selfextend_gguf.errors import GrammarError

# llama.cpp's parser recurses into parentheses: some thousands overflow a thread's stack.
_DEEPEST = 256
_LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*')
# llama-cpp-python writes repetitions out: a billion would take all memory.
_MANY = re.compile(r'"(?:min|max)(?:Items|Length)": \d{5,}|\{(?:\d*,)?\d{5,}[,}]')
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


def schema_grammar(schema: Any) -> str:
    """The grammar of a JSON schema, given as an object. Raises GrammarError for what cannot be expressed."""
    text = json.dumps(schema)
    if _MANY.search(text):
        raise GrammarError("the JSON schema asks for 10000 repetitions or more, which is too many for a grammar")
    try:
        grammar: str = json_schema_to_gbnf(text)
    except (Exception, RecursionError) as error:  # it fails in any way on what it does not expect
        raise GrammarError(f"the JSON schema cannot be made a grammar: {error or type(error).__name__}") from error
    return grammar


class GrammarSampler:
    """A sampler with a grammar, in place of llama_cpp's: raises where no token continues the text."""

    def __init__(self, sampler: internals.LlamaSampler, n_vocab: int) -> None:
        self._sampler = sampler
        self._n_vocab = n_vocab

    def sample(self, ctx: internals.LlamaContext, idx: int = -1) -> int:
        """As `llama_sampler_sample`. Raises GrammarError instead of accepting a token that the grammar forbids."""
        logits = llama_cpp.llama_get_logits_ith(ctx.ctx, idx)
        candidates = np.zeros(self._n_vocab, _TOKEN_DATA)
        candidates["id"] = np.arange(self._n_vocab)
        candidates["logit"] = np.ctypeslib.as_array(logits, (self._n_vocab,))
        array = llama_cpp.llama_token_data_array(
            data=candidates.ctypes.data_as(llama_cpp.llama_token_data_p),
            size=self._n_vocab,
            selected=-1,
            sorted=False,
        )
        llama_cpp.llama_sampler_apply(self._sampler.sampler, ctypes.byref(array))
        chosen = array.data[array.selected] if array.selected >= 0 else None
        if chosen is None or not chosen.logit > -np.inf:
            raise GrammarError("the grammar allows no token here")
        llama_cpp.llama_sampler_accept(self._sampler.sampler, chosen.id)
        return int(chosen.id)
