"""Copies of what was read: prompts that share a beginning read it once, and answers are those of a fresh reading."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from helpers import random_tokens

from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.server.kept_prompts import KeptPrompts, RememberingLlama

MODEL = str(TINY_MODEL)
N_CTX = 1024  # four trained contexts
N_READ = 600  # tokens of a document: several moves of the boundary
ROOM = 1 << 30  # bytes


class Asker:
    """A `RememberingLlama` that counts the tokens it reads."""

    def __init__(self, states: KeptPrompts | None) -> None:
        self.llm = RememberingLlama(MODEL, n_ctx=N_CTX, verbose=False)
        self.llm.kept_prompts = states
        self.n_read = 0
        decode = self.llm._ctx.decode

        def counted(batch) -> None:
            self.n_read += batch.n_tokens()
            decode(batch)

        self.llm._ctx.decode = counted

    def ask(self, prompt: str, n: int = 12) -> str:
        self.n_read = -(n - 1)  # generated tokens that are decoded
        return self.llm.create_completion(prompt, max_tokens=n, temperature=0)["choices"][0]["text"]


@pytest.fixture(scope="module")
def documents(heldout_text) -> list[str]:
    return [heldout_text[n * 20000 : n * 20000 + N_READ] for n in range(3)]


def questions(n: int) -> list[str]:
    words = ["Paul", "Peter", "the chief captain", "all the people of the city", "Felix", "a certain man"]
    return [f" And {words[i % len(words)]} said unto them {'again ' * (i % 9)}" for i in range(n)]


def test_answers_are_those_of_a_fresh_reading(documents):
    """f16 keys: a single one rotated back would show in some answer sooner or later."""
    asker, fresh = Asker(KeptPrompts(ROOM)), Asker(None)
    rng = np.random.default_rng(0)
    for question in questions(20):
        text = documents[int(rng.integers(3))]
        prompt = text[: int(rng.choice([600, 600, 590, 400]))] + question
        got = asker.ask(prompt)
        logits = asker.llm._ctx.get_logits()[0:256]
        fresh.llm.reset()
        assert got == fresh.ask(prompt)
        assert logits == fresh.llm._ctx.get_logits()[0:256]


def test_a_shared_document_is_read_once(documents):
    asker = Asker(KeptPrompts(ROOM))
    read = []
    for question in questions(6):
        asker.ask(documents[0] + question, n=200)  # the answers are longer than a stage
        read.append(asker.n_read)
    assert read[0] >= N_READ
    # The second goes on from the copy before the end of the first; from then on there is one where they part.
    assert read[1] <= 3 * 80
    assert max(read[2:]) <= 110  # the questions themselves


def test_a_few_common_tokens_are_not_gone_on_from(documents):
    """Such as BOS, with which every prompt begins: the text would be cut after it."""
    asker = Asker(KeptPrompts(ROOM))
    asker.ask(documents[0])
    other = documents[0][:20] + documents[1]
    asker.ask(other)
    assert asker.n_read == len(other)
    asker.ask("And Paul", n=1)
    asker.ask("And Paul said", n=1)
    assert asker.n_read == len(" said")  # of a short prompt it is most


def test_documents_take_turns(documents):
    asker = Asker(KeptPrompts(ROOM))
    for text in documents:
        asker.ask(text)
    for text in documents[:2]:
        asker.ask(text + " And")
        assert asker.n_read == len(" And")


def test_the_least_recently_used_is_dropped(documents):
    asker = Asker(None)
    asker.ask(documents[0])
    size = asker.llm.copy_prompt().n_bytes
    states = KeptPrompts(int(2.5 * size))
    asker.llm.kept_prompts = states
    for text in [*documents, *documents]:
        asker.ask(text + " And")
        assert states.n_bytes <= 2.5 * size
    assert states.n_bytes > 0
    nothing = Asker(KeptPrompts(1000))
    assert nothing.ask(documents[0]) == nothing.ask(documents[0])
    assert nothing.llm.kept_prompts.n_bytes == 0


@pytest.mark.parametrize("room", [1.01, 1.3, 2.1, 3.2])
def test_a_copy_in_use_is_not_dropped_for_another(documents, room):
    """Coming back to a text keeps the one before, for which the least recently used copy may have to go."""
    asker, fresh = Asker(None), Asker(None)
    asker.ask(documents[0])
    asker.llm.kept_prompts = KeptPrompts(int(room * asker.llm.copy_prompt().n_bytes))
    for i in (0, 1, 0, 1, 2, 0, 2, 1):
        fresh.llm.reset()
        assert asker.ask(documents[i] + " And") == fresh.ask(documents[i] + " And")


def test_what_does_not_fit_drops_nothing(documents):
    asker = Asker(None)
    asker.ask(documents[0])
    size = asker.llm.copy_prompt().n_bytes
    kept = asker.llm.kept_prompts = KeptPrompts(int(1.5 * size))
    kept.keep(asker.llm)
    assert kept.n_bytes == size
    asker.llm.kept_prompts = None
    asker.ask(documents[1] + documents[2][:350])  # 1.6 times as long
    assert kept.set_aside(asker.llm) is None
    kept.keep(asker.llm)
    assert kept.n_bytes == size
    # Another one takes its place, and then none can take the place of that, which is needed.
    asker.ask(documents[2])
    needed = kept.set_aside(asker.llm)
    assert kept.n_bytes == size
    asker.ask(documents[1])
    assert kept.set_aside(asker.llm) is None
    kept.take_up(asker.llm, needed)
    assert kept.n_bytes == 0
    assert bytes(asker.llm.input_ids[:N_READ].astype(np.uint8)) == documents[2].encode()


def test_a_folder_outlives_the_program(documents, tmp_path):
    first = Asker(KeptPrompts(ROOM, tmp_path))
    wanted = [first.ask(text + " And") for text in documents]
    assert len(list(tmp_path.glob("*.kv"))) >= 3
    second = Asker(KeptPrompts(ROOM, tmp_path))
    for text, answer in zip(documents, wanted, strict=True):
        assert second.ask(text + " And") == answer
        assert second.n_read < N_READ // 2


def test_copies_make_room_for_whoever_needs_memory(documents, monkeypatch):
    """Within the capacity, but no more than half of what is available."""
    asker = Asker(KeptPrompts(ROOM))
    asker.ask(documents[0])
    copy = asker.llm.kept_prompts.n_bytes
    assert copy > 0
    available = copy  # half of it is too little for another
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=ROOM, available=available))
    asker.ask(documents[1])
    assert asker.llm.kept_prompts.n_bytes == 0


def test_a_folder_keeps_to_its_size(documents, tmp_path):
    asker = Asker(None)
    asker.ask(documents[0])
    size = asker.llm.copy_prompt().n_bytes
    asker.llm.kept_prompts = KeptPrompts(int(2.5 * size), tmp_path)
    for text in [*documents, *documents]:
        asker.ask(text + " And")
        assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 2.5 * size


def test_a_read_only_folder_stays_as_it_is(documents, tmp_path):
    Asker(KeptPrompts(ROOM, tmp_path)).ask(documents[0])
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    asker = Asker(KeptPrompts(ROOM, tmp_path, read_only=True))
    asker.ask(documents[0] + " And")
    assert asker.n_read < N_READ // 2
    asker.ask(documents[1])
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_damaged_and_vanished_files_are_no_obstacle(documents, tmp_path):
    first = Asker(KeptPrompts(ROOM, tmp_path))
    wanted = [first.ask(text) for text in documents[:2]]
    states = KeptPrompts(ROOM, tmp_path)
    for i, path in enumerate(sorted(tmp_path.glob("*.kv"))):
        if i % 2:
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            content[1000] ^= 1
            path.write_bytes(content)
    second = Asker(states)
    with pytest.warns(UserWarning, match="the prompt is read"):
        assert [second.ask(text) for text in documents[:2]] == wanted


def test_a_folder_that_cannot_be_written_is_a_warning(documents):
    asker = Asker(KeptPrompts(ROOM, Path("/dev/null/folder")))
    with pytest.warns(UserWarning, match="a prompt was not saved"):
        asker.ask(documents[0])


def test_a_context_that_groups_nothing(heldout_text):
    llm = RememberingLlama(MODEL, n_ctx=256, verbose=False)
    llm.kept_prompts = KeptPrompts(ROOM)
    texts = [heldout_text[:200], heldout_text[5000:5200]]
    first = [llm.create_completion(t, max_tokens=8, temperature=0)["choices"][0]["text"] for t in texts]
    seen = []
    llm.progress = lambda done, total: seen.append(total)
    again = [llm.create_completion(t, max_tokens=8, temperature=0)["choices"][0]["text"] for t in texts]
    assert again == first
    assert max(seen) < 200


def test_tokens_of_a_state_are_compared_not_hashed_lengths():
    """Two texts of one length are two texts."""
    asker, fresh = Asker(KeptPrompts(ROOM)), Asker(None)
    for seed in (0, 1, 0):
        tokens = random_tokens(N_READ, seed=seed)
        got = asker.llm.create_completion(tokens, max_tokens=5, temperature=0)["choices"][0]["text"]
        fresh.llm.reset()
        assert got == fresh.llm.create_completion(tokens, max_tokens=5, temperature=0)["choices"][0]["text"]
