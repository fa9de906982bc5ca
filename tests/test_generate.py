"""Completions piece by piece."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from selfextend_gguf import Llama
from selfextend_gguf.errors import ContextFullError
from selfextend_gguf.generate import stream_completion
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.prompt import Prompt


@pytest.fixture(scope="module")
def llm():
    return Llama(str(TINY_MODEL), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)


def test_a_piece_keeps_its_timings(llm):
    """What comes later is in later pieces only."""
    seen, pieces = [], []
    for piece in stream_completion(llm, Prompt(list(b"In the beginning")), max_tokens=6, temperature=0.0):
        seen.append((piece.timings.generated_tokens, piece.timings.generate_seconds))
        pieces.append(piece)
    assert [(p.timings.generated_tokens, p.timings.generate_seconds) for p in pieces] == seen
    assert pieces[0].timings.generated_tokens < pieces[-1].timings.generated_tokens == 6
    with pytest.raises(FrozenInstanceError):
        pieces[0].timings.generated_tokens = 0


def test_the_error_of_a_full_context_names_the_prompts_tokens(llm):
    with pytest.raises(ContextFullError, match=r"Requested tokens \(256\) exceed context window of 256"):
        next(stream_completion(llm, Prompt([65] * 256), max_tokens=1))
