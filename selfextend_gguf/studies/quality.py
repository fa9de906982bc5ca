"""How well a bundled model reads: keys found, and perplexity of second halves. Its tokens are the bytes of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from selfextend_gguf.evaluation.perplexity import second_half, stretches
from selfextend_gguf.evaluation.readers import open_reader
from selfextend_gguf.evaluation.retrieval import greedy_answer
from selfextend_gguf.tiny.keys import KeyTask, key_task


def key_tasks(text: str, n_tokens: int, n_trials: int, seed: int = 0) -> list[KeyTask]:
    """Keys hidden at depths of 5 % to 95 % of texts of `n_tokens` bytes."""
    rng = np.random.default_rng(seed)
    return [key_task(rng, text, n_tokens, depth) for depth in np.linspace(0.05, 0.95, n_trials)]


def fraction_found(llm: llama_cpp.Llama, tasks: Sequence[KeyTask]) -> float:
    """Fraction of tasks that greedy decoding answers exactly."""
    right = 0
    for task in tasks:
        llm.reset()
        right += greedy_answer(llm, task.prompt, len(task.answer)) == task.answer
    return right / len(tasks)


def late_perplexity(method: str, model: str, text: str, n_tokens: int, n_texts: int, **arguments: Any) -> float:
    """Perplexity of the second halves of `n_texts` stretches of `n_tokens` bytes, read by one of `readers.METHODS`."""
    reader = open_reader(method, model, n_tokens, **arguments)
    try:
        late = [second_half(reader.losses(tokens)) for tokens in stretches(list(text.encode()), n_tokens, n_texts)]
    finally:
        reader.close()
    return float(np.exp(np.concatenate(late).mean()))
