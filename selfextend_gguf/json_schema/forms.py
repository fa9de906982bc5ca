"""Texts that fit a JSON schema, token by token, with llguidance."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from selfextend_gguf.errors import GrammarError
from selfextend_gguf.json_schema.rewriting import MOST_SCHEMAS, rewritten, schemas_in

if TYPE_CHECKING:  # imported where a schema is kept: every start of a command would wait for it
    from llguidance import LLMatcher, LLTokenizer

_LONGEST = 2**18  # bytes
_MOST_TRIES = 100  # to find the place of a problem
_LONGEST_PROBLEM = 300  # characters
_OPTIONS = {
    # As in llama.cpp: room for any layout, but no endless blanks.
    "whitespace_pattern": r" |\n{1,2}[ \t]{0,20}",
    # Without \u a name has one spelling, so that an additional one cannot be that of a property in other letters.
    "json_allowed_escapes": 'nrbtf\\"',
}


def form(schema: Any) -> str:
    """The form of a schema for `matcher`. Raises GrammarError for what cannot be kept."""
    try:
        length = len(json.dumps(schema, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema is no JSON value: {error}") from error
    if length > _LONGEST:
        raise GrammarError(f"the JSON schema has {length} bytes; at most {_LONGEST} are possible")
    kept = rewritten(schema)
    problem = _problem(kept)
    if problem is not None:
        raise GrammarError(f"the JSON schema cannot be kept at {_place_of(problem, kept)}: {problem}")
    return _grammar(kept)


def matcher(kept: str, tokens: LLTokenizer) -> LLMatcher:
    """What follows a text under a form, token by token. It does not raise: ask its `is_error`."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_items_in_row=20 * MOST_SCHEMAS, verbose_errors=False)
    return LLMatcher(tokens, kept, log_level=0, limits=limits)


def vocabulary(pieces: Sequence[bytes], end_tokens: Sequence[int]) -> LLTokenizer:
    """The tokens of a model for `matcher`: what each spells (b"" for none of a text), and those that end a text.

    Takes some seconds for the largest vocabularies.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Pieces(pieces, end_tokens)), eos_token=list(end_tokens) or None)


class _Pieces:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, pieces: Sequence[bytes], end_tokens: Sequence[int]) -> None:
        self.tokens = list(pieces)
        self.eos_token_id = end_tokens[0] if end_tokens else None
        for token in end_tokens:
            self.tokens[token] = b""  # it ends a text, whatever it spells

    def __call__(self, text: bytes) -> list[int]:
        """Never asked: `_grammar` leaves the choice of tokens to the model, also where one text alone can follow."""
        return []


@functools.cache
def byte_vocabulary() -> LLTokenizer:
    """A token for each byte, of the same number, and 256 as the end."""
    return vocabulary([*(bytes([i]) for i in range(256)), b""], [256])


def _grammar(schema: Any) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"allOf": [False]}
    options = {"x-guidance": _OPTIONS}
    return '%llguidance {"no_forcing": true}\nstart: %json ' + json.dumps(schema | options)


def _problem(schema: Any) -> str | None:
    """Why llguidance does not take a schema; None if it does."""
    following = matcher(_grammar(schema), byte_vocabulary())
    if not following.is_error():
        following.compute_bitmask()
        if not following.is_error():
            return None
    message = following.get_error().split("\n   1 | ")[0].split("failed to compile JSON schema: ")[-1]
    message = " ".join(message[:_LONGEST_PROBLEM].split())
    if message.startswith("oneOf constraints are not supported"):
        return "'oneOf' is supported only where a type, or a constant of a required property, tells its schemas apart"
    if message.startswith("NoExtension"):
        return "no value fits it"
    return message.replace("Unsatisfiable schema:", "no value fits it:")


def _place_of(problem: str, schema: Any) -> str:
    """The deepest place whose schema alone has the problem, as far as a few tries tell."""
    place, candidates, n_tries = "#", schemas_in(schema), 0
    definitions = {k: schema[k] for k in ("$defs", "definitions") if k in schema} if isinstance(schema, dict) else {}
    while n_tries < _MOST_TRIES and (candidate := next(candidates, None)):
        path, inner = candidate
        n_tries += 1
        if isinstance(inner, dict) and _problem(definitions | inner) == problem:
            place, candidates = f"{place}/{path}", schemas_in(inner)
    return place
