"""Whatever is done to a `Llama`, in whatever order: its logits are those of a run that read the same text in one go.

`python tests/random_operations.py` does more of it.
"""

from __future__ import annotations

import contextlib
import pickle
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
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
from selfextend_gguf.drafting import PromptLookup
from selfextend_gguf.errors import ContextFullError, EngineError
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.prompt_cache import CopiedPrompt
from selfextend_gguf.reference import Reference
from selfextend_gguf.schedule import SCHEDULES
from selfextend_gguf.tiny.model_file import random_tensors, write_llama

N_CTX = 256  # four trained contexts
MOST = {"f32": 1e-4, "f16": 5e-3, "q8_0": 1e-1, "q4_0": 1.0}  #: relative error of logits, by the type of the keys
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
def llama(schedule: str, kind: str, number: int) -> Llama:
    """`number`: of several that are alike."""
    return Llama(
        str(model()),
        n_ctx=N_CTX,
        n_batch=32,  # so that long readings take several steps
        schedule=schedule,
        logits_all=True,
        draft_model=PromptLookup(),
        verbose=False,
        **F32 | {"type_k": KV_TYPES[kind]},
    )


def has_room(reading: Reading) -> bool:
    return len(reading.tokens) < N_CTX


class Known:
    """What a `Llama` holds."""

    def __init__(self, llm: Llama) -> None:
        llm.reset()
        self.llm = llm
        self.tokens: list[int] = []
        self.parts: list[Part] = []


class Reading(RuleBasedStateMachine):
    """The model of a `Llama` is its text and which part of it was read under which parameters.

    There are two objects, of which one is in use.
    """

    sequences = 0
    worst: ClassVar[dict[str, float]] = {}  # errors, by the type of the keys

    @initialize(
        schedules=st.lists(st.sampled_from(SCHEDULES), min_size=2, max_size=2), kind=st.sampled_from(list(MOST))
    )
    def start(self, schedules: list[str], kind: str) -> None:
        type(self).sequences += 1
        self.kind = kind
        self.saved: tuple[object, list[int], list[Part]] | None = None
        self.copied: tuple[CopiedPrompt, list[int], list[Part]] | None = None
        self.file: tuple[list[int], list[Part]] | None = None
        self.number = 0
        self.both = [Known(llama(schedule, kind, number)) for number, schedule in enumerate(schedules)]
        self.now = self.both[0]

    @property
    def llm(self) -> Llama:
        return self.now.llm

    @property
    def tokens(self) -> list[int]:
        return self.now.tokens

    @tokens.setter
    def tokens(self, tokens: list[int]) -> None:
        self.now.tokens = tokens

    @property
    def parts(self) -> list[Part]:
        return self.now.parts

    @parts.setter
    def parts(self, parts: list[Part]) -> None:
        self.now.parts = parts

    def use(self, schedule: str) -> None:
        self.now = self.both[self.number] = Known(llama(schedule, self.kind, self.number))

    @rule()
    def switch(self) -> None:
        """To the other object. What was saved and copied is of the first."""
        self.number = 1 - self.number
        self.now = self.both[self.number]
        self.saved = self.copied = None

    def cut(self, n: int) -> None:
        """Forget the text from token n on."""
        self.tokens = self.tokens[:n]
        ends = [min(end, n) for end, _ in self.parts]
        begins = [0, *ends][: len(ends)]
        self.parts = [(e, part[1]) for b, e, part in zip(begins, ends, self.parts, strict=True) if e > b]

    def more(self, data: st.DataObject) -> list[int]:
        """Tokens that there is room for."""
        n = data.draw(st.integers(1, min(120, N_CTX - len(self.tokens))))
        return np.random.default_rng(data.draw(st.integers(0, 2**31))).integers(1, 256, n).tolist()

    def check(self, more: list[int]) -> None:
        """See that these tokens, and no others, have been read after the text."""
        begin = len(self.tokens)
        self.tokens = self.tokens + more
        assert self.llm.n_tokens == len(self.tokens)
        if more:
            self.parts.append((len(self.tokens), self.llm.self_extend))
            wanted = logits_of_parts(reference(), self.tokens, self.parts)[begin:]
            error = relative_error(self.llm.scores[begin : len(self.tokens)], wanted)
            self.worst[self.kind] = max(error, self.worst.get(self.kind, 0))
            assert error < MOST[self.kind]

    @precondition(has_room)
    @rule(data=st.data(), in_thread=st.booleans())
    def evaluate(self, data: st.DataObject, in_thread: bool) -> None:
        more = self.more(data)
        if in_thread:
            thread = threading.Thread(target=self.llm.eval, args=(more,))
            thread.start()
            thread.join()
        else:
            self.llm.eval(more)
        self.check(more)

    @precondition(has_room)
    @rule(data=st.data(), steps=st.integers(1, 3))
    def interrupt(self, data: st.DataObject, steps: int) -> None:
        """What was read until then stays."""
        more = self.more(data)
        left = steps

        def stop(done: int, total: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        self.llm.progress = stop
        with contextlib.suppress(KeyboardInterrupt):
            self.llm.eval(more)
        self.llm.progress = None
        self.check(more[: self.llm.n_tokens - len(self.tokens)])

    @precondition(has_room)
    @rule(data=st.data(), steps=st.integers(1, 3), has_computed=st.booleans())
    def fail(self, data: st.DataObject, steps: int, has_computed: bool) -> None:
        """A decode fails, before or after it has changed the cache: the steps before it stay."""
        more = self.more(data)
        decode, left = self.llm._ctx.decode, steps

        def failing(batch: object) -> None:
            nonlocal left
            left -= 1
            if left > 0 or has_computed:
                decode(batch)
            if left == 0:
                raise RuntimeError("llama_decode returned -3")

        self.llm._ctx.decode = failing
        try:
            with contextlib.suppress(EngineError):
                self.llm.eval(more)
        finally:
            del self.llm._ctx.decode
        self.check(more[: self.llm.n_tokens - len(self.tokens)])

    @rule(n=st.integers(1, 50))
    def overflow(self, n: int) -> None:
        """Nothing is read of what does not fit."""
        with pytest.raises(ContextFullError):
            self.llm.eval([1] * (N_CTX - len(self.tokens) + n))

    @precondition(lambda self: 1 <= len(self.tokens) < N_CTX - 40)
    @rule(n=st.integers(1, 8))
    def generate(self, n: int) -> None:
        """With guesses, of which wrong ones are taken back. The last token is read again, for its logits."""
        steps = self.llm.generate(self.tokens, temp=0)
        for _ in range(n):
            next(steps)
        steps.close()
        text = self.llm.input_ids[: self.llm.n_tokens].tolist()
        assert text[: len(self.tokens)] == self.tokens
        self.cut(len(self.tokens) - 1)
        self.check(text[len(self.tokens) :])

    @rule()
    def pickle(self) -> None:
        """The object without its text."""
        with contextlib.closing(pickle.loads(pickle.dumps(self.llm))) as other:
            assert other.self_extend == self.llm.self_extend

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
    def copy(self) -> None:
        self.copied = (self.llm.copy_prompt(), list(self.tokens), list(self.parts))

    @precondition(lambda self: self.copied is not None)
    @rule()
    def restore(self) -> None:
        copied, tokens, parts = self.copied
        assert self.llm.restore_prompt(copied) == len(tokens)
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
        self.saved = self.copied = None
        self.load_prompt()

    @invariant()
    def text_is_known(self) -> None:
        if hasattr(self, "now"):
            assert self.llm.input_ids[: self.llm.n_tokens].tolist() == self.tokens
            assert len(self.llm.key_positions) == len(self.tokens)


def test_any_sequence_of_operations() -> None:
    limits = settings(
        max_examples=320, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(Reading, settings=limits)
    assert Reading.sequences >= 300
