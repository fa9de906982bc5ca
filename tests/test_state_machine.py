"""Whatever is done to a `Llama`, in whatever order: its logits are those of a run that read the same text in one go."""

from __future__ import annotations

import pickle
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from helpers import F32, SHAPES, logits_of_parts, relative_error
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from selfextend_gguf import Llama, SelfExtendConfig
from selfextend_gguf.reference import Reference
from selfextend_gguf.schedule import SCHEDULES
from selfextend_gguf.tiny.model_file import random_tensors, write_llama

N_CTX = 256  # four trained contexts
FOLDER = tempfile.TemporaryDirectory()
Part = tuple[int, SelfExtendConfig]  # where a part of the text ends, and what it was read under


@cache
def model() -> Path:
    path = Path(FOLDER.name) / "model.gguf"
    write_llama(path, SHAPES["norm-32"], random_tensors(SHAPES["norm-32"], seed=7))
    return path


@cache
def reference() -> Reference:
    return Reference(model())


@cache
def llama(schedule: str) -> Llama:
    return Llama(str(model()), n_ctx=N_CTX, schedule=schedule, logits_all=True, verbose=False, **F32)


class Reading(RuleBasedStateMachine):
    """The model of a `Llama` is its text and which part of it was read under which parameters."""

    sequences = 0

    @initialize(schedule=st.sampled_from(SCHEDULES))
    def start(self, schedule: str) -> None:
        type(self).sequences += 1
        self.tokens: list[int] = []
        self.parts: list[Part] = []
        self.saved: tuple[object, list[int], list[Part]] | None = None
        self.file: tuple[list[int], list[Part]] | None = None
        self.use(schedule)

    def use(self, schedule: str) -> None:
        self.llm = llama(schedule)
        self.llm.reset()

    def cut(self, n: int) -> None:
        """Forget the text from token n on."""
        self.tokens = self.tokens[:n]
        ends = [min(end, n) for end, _ in self.parts]
        begins = [0, *ends][: len(ends)]
        self.parts = [(e, part[1]) for b, e, part in zip(begins, ends, self.parts, strict=True) if e > b]

    @precondition(lambda self: len(self.tokens) < N_CTX)
    @rule(data=st.data(), seed=st.integers(0, 2**31))
    def evaluate(self, data: st.DataObject, seed: int) -> None:
        n = data.draw(st.integers(1, min(120, N_CTX - len(self.tokens))))
        begin = len(self.tokens)
        more = np.random.default_rng(seed).integers(1, 256, n).tolist()
        self.llm.eval(more)
        self.tokens += more
        self.parts.append((len(self.tokens), self.llm.self_extend))
        wanted = logits_of_parts(reference(), self.tokens, self.parts)[begin:]
        assert relative_error(self.llm.scores[begin : len(self.tokens)], wanted) < 1e-3

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, len(self.tokens)))
        self.llm.n_tokens = n
        self.cut(n)

    @rule()
    def clear(self) -> None:
        self.llm.reset()
        self.cut(0)

    @rule()
    def save_state(self) -> None:
        self.saved = (pickle.dumps(self.llm.save_state()), list(self.tokens), list(self.parts))

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load_state(self) -> None:
        state, tokens, parts = self.saved
        self.llm.load_state(pickle.loads(state))
        self.tokens, self.parts = list(tokens), list(parts)

    @precondition(lambda self: self.tokens)
    @rule()
    def save_prompt(self) -> None:
        self.llm.save_prompt(Path(FOLDER.name) / "prompt.kv")
        self.file = (list(self.tokens), list(self.parts))

    @precondition(lambda self: self.file is not None)
    @rule()
    def load_prompt(self) -> None:
        tokens, parts = self.file
        assert self.llm.load_prompt(Path(FOLDER.name) / "prompt.kv") == len(tokens)
        self.tokens, self.parts = list(tokens), list(parts)

    @precondition(lambda self: self.tokens)
    @rule(schedule=st.sampled_from(SCHEDULES))
    def change_schedule(self, schedule: str) -> None:
        """By way of a file: that is how a text comes under other parameters."""
        self.save_prompt()
        self.use(schedule)
        self.load_prompt()

    @invariant()
    def text_is_known(self) -> None:
        if hasattr(self, "llm"):
            assert self.llm.input_ids[: self.llm.n_tokens].tolist() == self.tokens
            assert len(self.llm.key_positions) == len(self.tokens)


def test_any_sequence_of_operations() -> None:
    limits = settings(
        max_examples=320, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(Reading, settings=limits)
    assert Reading.sequences >= 300
