"""The study of published retrieval tasks, on a bundled model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from selfextend_gguf.evaluation.tasks import NOISE
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import TINY_MODELS
from selfextend_gguf.studies import retrieval as study

MODEL = TINY_MODELS[1]  # trained on 512 tokens
FACT = "The pass key is {key}. Remember it. {key} is the pass key."


@pytest.fixture
def passkeys(tmp_path) -> Path:
    """Two prompts of a length, and one of another."""
    lines = [
        {"input": "\n".join(["Find it.", *[NOISE] * n, FACT.format(key=key), *[NOISE] * n]), "target": key}
        for n, key in ((1, 10007), (6, 10009), (1, 10037))
    ]
    file = tmp_path / "passkeys.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def pairs(tmp_path) -> Path:
    records = [[f"key-{i}", f"value-{i}"] for i in range(5)]
    file = tmp_path / "pairs.jsonl.gz"
    with gzip.open(file, "wt") as lines:
        for key, value in records[:4]:
            lines.write(json.dumps({"ordered_kv_records": records, "key": key, "value": value}) + "\n")
    return file


def test_the_pair_that_is_asked_for_stands_at_each_place_in_turn(pairs):
    with ModelInfo(MODEL) as info:
        task = study.pairs(info.tokenizer, pairs, 3)
        texts = [info.tokenizer.detokenize(prompt.tokens).decode() for prompt in task.prompts]
    assert task.name == "5 pairs"
    for number, (text, prompt) in enumerate(zip(texts, task.prompts, strict=True)):
        assert prompt.wanted == (f"value-{number}",)
        assert text.endswith(f'Key: "key-{number}"\nCorresponding value: "')
        data = json.loads(text[text.index("{") : text.index("}") + 1])
        assert len(data) == 5
        assert list(data).index(f"key-{number}") == (0, 2, 4)[number]


def test_passkeys_of_one_length_are_one_task(passkeys):
    with ModelInfo(MODEL) as info:
        short, long = study.longlm(info.tokenizer, [passkeys, passkeys])
    assert [prompt.wanted for prompt in short.prompts] == [("10007",), ("10037",)]
    assert [prompt.wanted for prompt in long.prompts] == [("10009",)]
    assert short.n_tokens < long.n_tokens


def run(folder: Path, *arguments: str) -> list[list[str]]:
    """Cells of the rows of the document."""
    few = ["--ruler", "niah_single_1", "--prompts", "2", "--methods", "plain", "selfextend", "--threads", "1"]
    study.main([str(MODEL), *few, "--kept", str(folder / "kept.jsonl"), "--out", str(folder), *arguments])
    rows = [line for line in (folder / "retrieval.md").read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1:]]


def test_within_the_trained_context_only_plain_is_asked_and_what_fails_there_is_left_out(tmp_path, passkeys, pairs):
    rows = run(tmp_path, "--longlm", str(passkeys), "--pairs", str(pairs))
    # The model was not trained on RULER's language: it fails at 1x, so 2x and 4x are not asked.
    assert [row[:4] for row in rows] == [
        ["niah_single_1", rows[0][1], rows[0][2], "2"],
        ["LongLM's passkey", rows[1][1], rows[1][2], "2"],
        ["LongLM's passkey", rows[2][1], rows[2][2], "1"],
        ["5 pairs", rows[3][1], rows[3][2], "4"],
    ]
    for _, n_tokens, _, _, plain, selfextend in rows:
        assert plain
        assert bool(selfextend) == (int(n_tokens) > 512)
    assert int(rows[2][1]) > 512


def test_a_second_call_measures_nothing_again(tmp_path, passkeys, monkeypatch):
    first = run(tmp_path, "--longlm", str(passkeys))

    def ask_again(*_):
        raise AssertionError("asked again")

    monkeypatch.setattr(study, "ask", ask_again)
    assert run(tmp_path, "--longlm", str(passkeys)) == first


def test_plain_is_the_measure_of_a_pretended_context(tmp_path, passkeys):
    rows = run(tmp_path, "--longlm", str(passkeys), "--pretend", "256")
    assert all(row[4] and row[5] for row in rows if int(row[1]) > 256)
    with pytest.raises(SystemExit):
        run(tmp_path, "--methods", "unknown")
