"""Many keys in one text, read once and asked for one by one; prompts of tasks; what `eval passkey` says of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

import pytest
from click.testing import CliRunner, Result

from selfextend_gguf.cli import main
from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation import readers
from selfextend_gguf.evaluation.readers import LlamaReader, open_reader
from selfextend_gguf.evaluation.readings import Readings
from selfextend_gguf.evaluation.retrieval import key_exams, retrieve, task_exams
from selfextend_gguf.evaluation.tasks import TASKS, WITH_DEPTH
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.tokenizer import Tokenizer

MODEL = str(TINY_MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    with ModelInfo(MODEL) as info:
        yield info.tokenizer


def passkey(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["eval", "passkey", MODEL, *arguments])


def rows(result: Result) -> list[list[str]]:
    """Length, method and score of a table's lines."""
    return [[line.split()[0], *line.split()[2:4]] for line in result.stdout.splitlines()[1:]]


# ---- exams -----------------------------------------------------------------------------------------------------------


def test_a_text_with_many_keys_fills_its_length(tokenizer, heldout_text):
    n_tokens = 4096
    first, second = key_exams(
        tokenizer, n_tokens, text=heldout_text[:2500], n_texts=2, n_depths=5, digits=7, seed=1
    )  # a text that is too short is repeated
    assert first.quiz.tokens != second.quiz.tokens
    text = bytes(first.quiz.tokens).decode()
    # 4096 / 128 = 32 keys. A question has 46 tokens (bytes) at most, an answer 10: 7 digits and 3 others.
    assert len(first.references) == len(first.quiz.questions) == 32
    assert len(text) + max(map(len, first.quiz.questions)) + 10 == n_tokens
    for question, (answer,), depth in zip(first.quiz.questions, first.references, first.depths, strict=True):
        name = bytes(question).decode().split()[3]
        at = text.index(f"\nThe {name} key is {answer}.\n") / len(text)
        assert len(answer) == 7
        assert abs(at - depth) < 0.1 + 0.01  # depths are 0.1, 0.3, ... 0.9
    assert sorted({*first.depths}) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])


def test_too_few_tokens_have_no_room(tokenizer, heldout_text):
    with pytest.raises(ConfigError, match="40 tokens have no room for a key"):
        next(key_exams(tokenizer, 40, text=heldout_text, n_texts=1, n_depths=5, digits=5, seed=0))


@pytest.mark.parametrize("task", TASKS)
def test_prompts_leave_room_for_their_answers(tokenizer, heldout_text, task):
    depths = [0.1, 0.9]
    exams = list(
        task_exams(tokenizer, task, 2000, n_trials=2, depths=depths, digits=5, seed=0, text=heldout_text[:5000])
    )
    assert [exam.depths for exam in exams] == 2 * [[0.1], [0.9]] if task in WITH_DEPTH else 2 * [[None]]
    assert len({tuple(exam.quiz.tokens) for exam in exams}) == len(exams)
    for exam in exams:
        assert 2000 - 150 < len(exam.quiz.tokens) + 1 + exam.quiz.answer_tokens <= 2000
        assert len(exam.references[0][0]) <= exam.quiz.answer_tokens


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def n_read(monkeypatch) -> list[int]:
    """Tokens of each call that reads."""
    calls: list[int] = []
    real = LlamaReader._read

    def read(reader, tokens, begin, **options):
        calls.append(len(tokens) - begin)
        return real(reader, tokens, begin, **options)

    monkeypatch.setattr(LlamaReader, "_read", read)
    return calls


def test_a_text_is_read_once_for_all_its_keys(tokenizer, heldout_text, n_read):
    exams = partial(key_exams, tokenizer, text=heldout_text, n_texts=2, n_depths=2, digits=5, seed=0)
    results = list(retrieve(Readings(MODEL), exams, ["selfextend", "plain"], [256, 1024], tokenizer=tokenizer))
    # After each text the result so far. Within the trained context there is but one way to read.
    assert [(r.n_tokens, r.method, r.n_texts) for r in results] == [
        (256, "plain", 1),
        (256, "plain", 2),
        (1024, "selfextend", 1),
        (1024, "plain", 1),
        (1024, "selfextend", 2),
        (1024, "plain", 2),
    ]
    *_, ours, plain = results
    assert (ours.score.n_trials, plain.score.n_trials) == (16, 16)  # 1024 / 128 = 8 keys a text
    assert ours.score.low > plain.score.high
    assert list(ours.by_depth) == [0.25, 0.75]
    assert sum(score.n_trials for score in ours.by_depth.values()) == 16
    long = [n for n in n_read if n > 100]
    assert len(long) == 2 + 2 * 2 and max(n for n in n_read if n not in long) < 50  # texts; questions, answers


def test_methods_take_the_same_exams(tokenizer, heldout_text, monkeypatch):
    """One that had no time for the first takes none of those behind it, which may be easier."""
    real, calls = Readings.measured, iter(range(100))
    monkeypatch.setattr(Readings, "measured", lambda *a, **kw: None if next(calls) == 1 else real(*a, **kw))
    exams = partial(key_exams, tokenizer, text=heldout_text, n_texts=2, n_depths=2, digits=5, seed=0)
    results = retrieve(Readings(MODEL), exams, ["selfextend", "plain"], [512], tokenizer=tokenizer)
    assert [(r.method, r.n_texts) for r in results] == [("selfextend", 1), ("selfextend", 2)]


@pytest.mark.parametrize("method", ["plain", "loop"])
def test_an_answer_ends_where_the_model_ends_it(monkeypatch, method):
    reader = open_reader(method, MODEL, 200)
    prompt, question = list(b"The oak key is 48213. "), list(b"\nWhat is the oak key? The oak key is ")
    assert bytes(*reader.answers(prompt, [question], 5)) == b"48213"
    monkeypatch.setattr(readers, "_ends", lambda llm, token: token == ord("2"))
    assert bytes(*reader.answers([*prompt, 32], [question], 5)) == b"48"
    reader.close()


def test_native_keys_are_found(tokenizer, heldout_text):
    exams = partial(task_exams, tokenizer, "native", n_trials=3, depths=[0.1, 0.9], digits=5, seed=0, text=heldout_text)
    *_, ours, plain = retrieve(Readings(MODEL), exams, ["selfextend", "plain"], [512], tokenizer=tokenizer)
    assert {depth: score.score for depth, score in ours.by_depth.items()} == {0.1: 1, 0.9: 1}
    assert ours.by_depth[0.1].low == pytest.approx(0.4385, abs=1e-3)
    assert plain.score.score == 0


# ---- the command -----------------------------------------------------------------------------------------------------


def test_eval_passkey(tmp_path):
    plot = tmp_path / "heat.png"
    result = passkey("--lengths", "256,1024", "--against", "window", "--depths", "2", "--plot", str(plot))
    assert result.exit_code == 0, result.output
    (n, method, _), *beyond = rows(result)
    assert (n, method) == ("256", "plain")
    assert [method for _, method, _ in beyond] == ["selfextend", "plain", "window"]
    assert float(beyond[0][2]) > 0.8 > 0.2 > float(beyond[1][2])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_default_lengths():
    """Half a trained context would be 128 tokens, too few; groups of 6 reach 576 at most, of 2 less than 512."""
    for more, lengths in ((), ["256", "512", "512"]), (("-gan", "2"), ["256"]):
        result = passkey(*more)
        assert [row[0] for row in rows(result)] == lengths, result.output


def test_tasks_have_a_prompt_for_each_answer(tmp_path):
    plot = tmp_path / "heat.png"
    arguments = ["--task", "vt", "--lengths", "900", "--trials", "2", "--plot", str(plot), "--json"]
    record = json.loads(passkey(*arguments).stdout)
    assert [(r["method"], r["n_texts"], r["n_trials"], r["depths"]) for r in record["results"]] == [
        ("selfextend", 2, 2, []),
        ("plain", 2, 2, []),
    ]
    assert "not_measured" not in record
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_results_are_kept_and_what_is_missing_is_said(tmp_path, monkeypatch, n_read):
    kept = ["--resume", str(tmp_path / "kept.jsonl")]
    whole = passkey("--lengths", "256,512", *kept)
    n_read.clear()
    assert passkey("--lengths", "256,512", *kept, "--budget", "0").stdout == whole.stdout
    more = passkey("--lengths", "256,512,1024", "--trials", "2", *kept, "--budget", "0")
    assert more.stdout.splitlines()[:-1] == whole.stdout.splitlines()
    assert more.stdout.splitlines()[-1] == (
        "not measured (budget): 256 tokens plain (1 of 2 texts), 512 tokens selfextend (1 of 2 texts), "
        "512 tokens plain (1 of 2 texts), 1024 tokens selfextend, 1024 tokens plain"
    )
    record = json.loads(passkey("--lengths", "1024", *kept, "--budget", "0", "--json").stdout)
    assert record["results"] == []
    assert record["not_measured"] == {
        "why": "budget",
        "n_texts": 1,
        "readings": [{"method": method, "n_tokens": 1024, "n_read": 0} for method in ("selfextend", "plain")],
    }
    assert n_read == []

    real = Readings.measured

    def stops_with(error: BaseException):
        def measured(self, what, measure, method, *given, **named):
            if method == "plain" and named["n_ctx"] == 512:
                raise error
            return real(self, what, measure, method, *given, **named)

        return measured

    for error, exit_code, why in (
        (KeyboardInterrupt(), 130, "interrupted"),
        (ConfigError("it went wrong"), 1, "error"),
        (OSError("it went wrong"), 1, "error"),
    ):
        monkeypatch.setattr(Readings, "measured", stops_with(error))
        result = passkey("--lengths", "256,512", *kept)
        assert result.exit_code == exit_code
        assert result.stdout.splitlines()[:3] == whole.stdout.splitlines()[:3]
        assert result.stdout.splitlines()[3:] == [f"not measured ({why}): 512 tokens plain"]
        assert result.stderr == ("Interrupted.\n" if exit_code == 130 else "Error: it went wrong\n")


def test_a_kept_reading_tells_how_long_others_take(tmp_path, heldout_text, monkeypatch):
    """A second call knows the speed, and begins nothing that it has no time for."""
    now = [0.0]
    real = LlamaReader._read

    def read(reader, tokens, begin, **options):
        now[0] += len(tokens) - begin
        return real(reader, tokens, begin, **options)

    monkeypatch.setattr(LlamaReader, "_read", read)
    monkeypatch.setitem(Readings.__init__.__kwdefaults__, "clock", lambda: now[0])
    kept = ["--resume", str(tmp_path / "kept.jsonl")]
    passkey("--lengths", "256", *kept)
    began = now[0]
    short = passkey("--lengths", "256,512", *kept, "--budget", "600")  # 512 tokens and questions take more
    assert short.stdout.endswith("not measured (budget): 512 tokens selfextend, 512 tokens plain\n")
    assert now[0] == began


def test_what_cannot_be_measured_is_refused_before_anything_is_read(n_read):
    for arguments, message in (
        (["--lengths", "256,100000"], "are beyond the reach of Self-Extend"),
        (["--lengths", "256,2048", "-gan", "2"], "group size 2 with a neighbor window of 64 reaches 289 tokens"),
        (["--lengths", "40"], "40 tokens have no room for a key, a question about it and an answer"),
        (["--task", "longlm", "--lengths", "128"], "128 tokens have no room for this task"),
    ):
        result = passkey(*arguments)
        assert (result.exit_code, result.stdout, n_read) == (1, "", [])
        assert message in result.stderr
    result = passkey("--pretend-trained", "64", "--digits", "64", "--lengths", "512", "--against", "window")
    assert "Error: a window of 64 tokens has no room for the question and its answer" in result.stderr
