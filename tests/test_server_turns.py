"""Several requests at once: turns, texts that leave the context and come back, and one reading for many."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import llama_cpp
import mixed_requests
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import random_tokens, relative_error
from served import HTTP, Served, serving

from selfextend_gguf import Llama
from selfextend_gguf.cli import main
from selfextend_gguf.errors import QueueFullError, RequestStoppedError
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.server import sharing
from selfextend_gguf.server.kept_prompts import KeptPrompts
from selfextend_gguf.server.sharing import Share, Shared, SharingLlama
from selfextend_gguf.server.turns import Turns

ROOM = 1 << 30  # bytes


# ---- whose turn it is ------------------------------------------------------------------------------------------


def begun(turns: Turns, alias: str = "a", prompt=()):
    """A request that has the turn, which nobody else has or waits for."""
    ticket = turns.enter(alias, prompt)
    turns.take(ticket)
    return ticket


def waiting(turns: Turns, order: list[str], name: str, alias: str = "a", prompt=()):
    """A request whose thread waits for its turn, notes it and leaves."""
    ticket = turns.enter(alias, prompt)

    def wait() -> None:
        turns.take(ticket)
        order.append(name)
        turns.leave(ticket)

    thread = threading.Thread(target=wait)
    thread.start()
    while not ticket.waits:
        time.sleep(0.001)
    return thread


def test_the_oldest_has_every_other_turn():
    """Others come after it; between two of them it is its turn again."""
    turns, order = Turns(), []
    oldest = begun(turns)
    threads = [waiting(turns, order, name) for name in "bcd"]
    for _ in range(3):
        assert turns.is_over(oldest, 0)
        turns.pass_on(oldest, lambda: None)
        order.append("oldest")
    assert not turns.is_over(oldest, 0)  # nobody else is there
    assert order == ["b", "oldest", "c", "oldest", "d", "oldest"]
    for thread in threads:
        thread.join()


def test_the_others_have_theirs_by_the_time_they_had():
    turns, order = Turns(), []
    oldest = begun(turns)
    first = waiting(turns, order, "much")
    second = waiting(turns, order, "little")
    much, little = list(turns)[1:]
    much.used, little.used = 2.0, 1.0
    turns.leave(oldest)  # the next one is the oldest now: "much", whatever it had
    first.join()
    second.join()
    assert order == ["much", "little"]
    turns, order = Turns(), []
    oldest = begun(turns)
    threads = [waiting(turns, order, name) for name in ("much", "little")]
    list(turns)[1].used = 2.0
    turns.pass_on(oldest, lambda: None)
    assert order == ["little"]
    turns.leave(oldest)
    for thread in threads:
        thread.join()


def test_another_model_waits_until_all_before_it_have_ended_and_is_not_overtaken():
    turns, order = Turns(), []
    first = begun(turns)
    threads = [
        waiting(turns, order, name, alias) for name, alias in (("same", "a"), ("other", "b"), ("same, later", "a"))
    ]
    turns.pass_on(first, lambda: None)
    assert order == ["same"]
    assert not turns.is_over(first, 0)
    turns.leave(first)
    for thread in threads:
        thread.join()
    assert order == ["same", "other", "same, later"]


def test_a_prompt_that_begins_like_one_being_read_waits_for_it():
    turns, order = Turns(), []
    prompt = random_tokens(1000, seed=0)
    reader = begun(turns, prompt=prompt)
    threads = [
        waiting(turns, order, "same", prompt=prompt[:500]),
        waiting(turns, order, "other", prompt=random_tokens(500, seed=1)),
    ]
    turns.pass_on(reader, lambda: None)
    assert order == ["other"]
    assert not turns.is_over(reader, 0)
    reader.n_read = 500
    assert turns.is_over(reader, 0)
    turns.leave(reader)
    for thread in threads:
        thread.join()


def test_who_is_not_wanted_any_more_leaves_the_queue():
    turns = Turns(most=2)
    first = begun(turns)
    second = turns.enter("a")
    with pytest.raises(QueueFullError, match="2 requests are worked on or wait"):
        turns.enter("a")

    def stop() -> None:
        raise RequestStoppedError("gone")

    with pytest.raises(RequestStoppedError):
        turns.take(second, stop)
    turns.leave(second)
    turns.enter("a")
    assert not turns.is_over(first, 0)  # the new one has no thread that waits


# ---- texts in one context --------------------------------------------------------------------------------------


class AtOnce:
    """Texts that are read and continued at once in one context, and change places before every step."""

    def __init__(self, path: str, **arguments) -> None:
        self.n_set_aside = 0
        llm = SharingLlama(path, verbose=False, n_threads=1, n_threads_batch=1, **arguments)
        llm.kept_prompts = KeptPrompts(ROOM)
        set_aside = llm.kept_prompts.set_aside

        def counted(*args):
            self.n_set_aside += 1
            return set_aside(*args)

        llm.kept_prompts.set_aside = counted
        self.turns = Turns()
        self.shared = Shared(llm, self.turns)
        self.owner = llm

    def read(self, prompt: list[int], n: int, stop=lambda: None) -> tuple[list[int], np.ndarray]:
        ticket = self.turns.enter("a", prompt)
        try:
            self.turns.take(ticket)
            llm = self.shared.llm = self.shared.llm.beside(Share(self.shared, ticket, stop))
            return answer(llm, prompt, n)
        finally:
            self.turns.leave(ticket)


def answer(llm: Llama, prompt: list[int], n: int) -> tuple[list[int], np.ndarray]:
    """Tokens, and the logits after the last but one."""
    tokens = list(itertools.islice(llm.generate(prompt, temp=0.0), n))
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),))
    return tokens, logits.copy()


@pytest.fixture
def _change_places_often(monkeypatch):
    monkeypatch.setattr(sharing, "TURN", 0.0)
    monkeypatch.setattr(sharing, "_WORTH", 0.0)
    monkeypatch.setattr(sharing, "_OF_A_STEP", 0.0)


CASES = {
    "bundled": {},
    "bundled, f32": {"type_k": 0, "type_v": 0},
    "bundled, q8_0": {"type_k": 8, "type_v": 8, "flash_attn": True},
    "gemma3": {},
    "gemma3, small caches": {"swa_full": False},
    "gpt-oss": {},
}


@pytest.mark.usefixtures("_change_places_often")
@pytest.mark.parametrize("case", CASES)
def test_texts_that_take_turns_are_continued_as_if_alone(model, case):
    """Bit for bit; but keys of sliding-window layers come back in other cells, where sums are rounded otherwise."""
    name, arguments = case.split(",")[0], {"n_ctx": 1024, "n_batch": 64, **CASES[case]}
    path = str(TINY_MODEL if name == "bundled" else model(name))
    at_once = AtOnce(path, **arguments)
    prompts = [random_tokens(n, seed=n) for n in (900, 700, 90, 40)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda prompt: at_once.read(prompt, 12), prompts))
    at_once.owner.close()
    assert at_once.n_set_aside > 20
    alone = Llama(path, verbose=False, n_threads=1, n_threads_batch=1, **arguments)
    for prompt, (tokens, logits) in zip(prompts, got, strict=True):
        alone.reset()
        wanted, wanted_logits = answer(alone, prompt, 12)
        assert tokens == wanted
        if name == "bundled":
            assert np.array_equal(logits, wanted_logits)
        else:
            assert relative_error(logits, wanted_logits) < 1e-3
    alone.close()


@pytest.mark.usefixtures("_change_places_often")
def test_a_text_that_is_left_while_another_is_read_is_not_read_again(heldout_text):
    at_once = AtOnce(str(TINY_MODEL), n_ctx=1024)
    tokens = list(heldout_text.encode())
    left = threading.Event()

    def stop() -> None:
        if left.is_set():
            raise RequestStoppedError("gone")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(at_once.read, tokens[:800], 5, stop)
        while not any(ticket.n_read for ticket in at_once.turns):
            time.sleep(0.001)
        second = pool.submit(at_once.read, tokens[5000:5700], 300)
        while at_once.n_set_aside < 4:
            time.sleep(0.001)
        left.set()
        with pytest.raises(RequestStoppedError):
            first.result()
        second.result()
    seen = []
    at_once.shared.llm.share = None
    at_once.shared.llm.progress = lambda done, total: seen.append(total)
    answer(at_once.shared.llm, tokens[:800], 1)
    assert sum(set(seen)) < 800
    at_once.owner.close()


@pytest.mark.usefixtures("_change_places_often")
def test_without_room_for_copies_they_are_served_one_after_the_other():
    at_once = AtOnce(str(TINY_MODEL), n_ctx=1024)
    at_once.owner.kept_prompts._capacity = 0
    prompts = [random_tokens(n, seed=n) for n in (500, 400)]
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda prompt: at_once.read(prompt, 5)[0], prompts))
    alone = Llama(str(TINY_MODEL), n_ctx=1024, verbose=False)
    for prompt, tokens in zip(prompts, got, strict=True):
        alone.reset()
        assert tokens == answer(alone, prompt, 5)[0]
    assert at_once.n_set_aside > 0
    alone.close()
    at_once.owner.close()


# ---- over HTTP -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with serving({"tiny": TINY_MODEL}, ctx=8192, cache=ROOM) as server:
        yield server


@pytest.fixture(scope="module")
def alone():
    """What a fresh model answers."""
    llm = Llama(str(TINY_MODEL), n_ctx=8192, n_threads=1, n_threads_batch=1, verbose=False)

    def ask(prompt: str, max_tokens: int) -> str:
        llm.reset()
        return llm.create_completion(prompt, max_tokens=max_tokens, temperature=0)["choices"][0]["text"]

    yield ask
    llm.close()


def complete(server, prompt: str, max_tokens: int, **more) -> dict:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}
    return HTTP.post(f"{server.url}/v1/completions", json=body).json()


def reading(server) -> int:
    """Tokens read of the prompt of the request that came first."""
    return next((ticket.n_read for ticket in server.models.turns), 0)


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_short_request_is_answered_while_a_long_one_is_read(server, alone, heldout_text):
    long, short = heldout_text[:8000], "And Paul said"
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        first = pool.submit(complete, server, long, 5)
        wait_for(lambda: reading(server) > 100)
        second = complete(server, short, 9)
        assert not first.done()
        assert reading(server) < len(long)
        first = first.result()
        took = time.monotonic() - began
    assert first["choices"][0]["text"] == alone(long, 5)
    assert second["choices"][0]["text"] == alone(short, 9)
    # Nobody's timings hold the others' turns.
    timings = [answer["timings"] for answer in (first, second)]
    assert sum(t["prompt_ms"] + t["predicted_ms"] for t in timings) < took * 1000
    assert first["timings"]["prompt_n"] == 8000


def test_questions_about_one_document_wait_for_its_reading(server, alone, heldout_text):
    document = heldout_text[10000:16000]
    prompts = [document + question for question in (" And Paul said", " The chief captain", " In those days")]
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(complete, server, prompts[0], 6)]
        wait_for(lambda: reading(server) > 100)
        answers += [pool.submit(complete, server, prompt, 6) for prompt in prompts[1:]]
        answers = [answer.result() for answer in answers]
    assert [answer["choices"][0]["text"] for answer in answers] == [alone(prompt, 6) for prompt in prompts]
    # The first reads the document and its own question, the others what is after the place where they leave it.
    assert [answer["timings"]["prompt_n"] for answer in answers] == [
        len(prompts[0]),
        len(prompts[1]) - len(document) - 1,  # after a blank
        len(prompts[2]) - len(document) - 1,
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_a_status(server, heldout_text, monkeypatch, stream):
    monkeypatch.setattr(server.models.turns, "_most", 1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(complete, server, heldout_text[20000:24000], 5)
        wait_for(lambda: reading(server) > 100)
        body = {"prompt": "And", "max_tokens": 1, "stream": stream}
        response = HTTP.post(f"{server.url}/v1/completions", json=body)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "10")
        assert response.json()["error"]["message"] == "1 requests are worked on or wait: try again later"
        assert first.result()["usage"]["completion_tokens"] == 5
    wait_for(lambda: not list(server.models.turns))
    assert complete(server, "And", 1)["usage"]["completion_tokens"] == 1


def test_the_size_of_steps_is_an_option(monkeypatch):
    sizes = []

    def run(app, models, listener, **more) -> None:
        models.load_first()
        sizes.append(models._shared.llm.n_batch)

    monkeypatch.setattr("selfextend_gguf.server.run.run", run)
    for arguments in ([], ["-b", "32"]):
        result = CliRunner().invoke(main, ["serve", str(TINY_MODEL), "-c", "1024", "--port", "0", *arguments])
        assert result.exit_code == 0, result.output
    assert sizes == [512, 32]


def test_mixed_requests_have_the_answers_of_a_fresh_model(monkeypatch):
    """`python tests/mixed_requests.py` sends more."""
    monkeypatch.setattr(mixed_requests, "_LENGTHS", [2000, *[500] * 3, *[60] * 4])
    served = mixed_requests.started()
    try:
        counts = mixed_requests.run(served, 48, seed=2)
    finally:
        code, log = served.end()
    assert (code, "Traceback" in log) == (0, False), log
    assert set(counts) == {"left", "malformed", "streamed", "whole"}
    assert counts.total() == 48


def test_a_server_that_is_killed_loses_no_prompt_of_which_it_has_an_answer(heldout_text, tmp_path):
    """A document is in the folder before its answer begins; what is half written is none, and is cleared away."""
    arguments = (str(TINY_MODEL), "-c", "1024", "-t", "1", "--prompt-cache", str(tmp_path), "--cache-ram", "512")
    documents = [heldout_text[begin : begin + 700] for begin in range(0, 60 * 2000, 2000)]
    answered: dict[str, str] = {}

    def ask(served: Served, document: str) -> dict:
        body = {"prompt": document, "max_tokens": 8, "temperature": 0}
        return HTTP.post(f"{served.url}/v1/completions", json=body).raise_for_status().json()

    def load(served: Served, document: str) -> None:
        with contextlib.suppress(httpx.TransportError):
            answered[document] = ask(served, document)["choices"][0]["text"]

    for round_ in range(2):
        served = Served(*arguments)
        with ThreadPoolExecutor(8) as pool:
            for document in documents[round_ * 30 : round_ * 30 + 30]:
                pool.submit(load, served, document)
            wait_for(lambda n=8 * (round_ + 1): len(answered) >= n)
            served.process.kill()
        served.process.communicate()
        assert len(answered) < (round_ + 1) * 30  # it was killed at work
    left = tmp_path / ".abandoned.kv.x.tmp"
    left.write_bytes(b"half a file")
    os.utime(left, (0, 0))
    served = Served(*arguments)
    try:
        for document, text in answered.items():
            again = ask(served, document)
            assert again["choices"][0]["text"] == text
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > len(document) // 2
        ask(served, heldout_text[-700:])
        assert not left.exists()
    finally:
        assert served.end()[0] == 0
