"""The study on published models, on a bundled one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.kept import Kept
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import TINY_MODELS
from selfextend_gguf.studies import real_models as study

MODEL = TINY_MODELS[0]
TEXT = Path(__file__).parent / "data" / "heldout.txt"


def test_keys_stand_evenly_in_the_text_and_are_told_apart_from_it():
    with ModelInfo(MODEL) as info:
        tokenizer = info.tokenizer
        tokens = tokenizer.tokens(TEXT.read_text())
        text = study.key_text(tokenizer, tokens, 3000, 20)
    assert len(text.tokens) == len(text.is_text) == 3000
    assert [t for t, flag in zip(text.tokens, text.is_text, strict=True) if flag] == tokens[: text.is_text.sum()]
    read = bytes(text.tokens).decode()
    places = []
    for city, number in zip(study.CITIES[:20], text.answers, strict=True):
        sentence = study.FACT.format(city=city, number=number)
        assert read.count(sentence) == 1
        places.append(read.index(sentence))
        assert not text.is_text[places[-1] : places[-1] + len(sentence)].any()
    assert len(set(text.answers)) == 20
    apart = np.diff(places)
    assert (places[0], 3000 - places[-1]) == pytest.approx((apart.mean() / 2,) * 2, rel=0.5)
    assert apart.max() - apart.min() < 10


def test_a_text_that_is_too_short_is_refused():
    with ModelInfo(MODEL) as info, pytest.raises(ConfigError, match="3000 tokens with 20 keys need a text of"):
        study.key_text(info.tokenizer, [65] * 100, 3000, 20)


def run(folder: Path, *arguments: str) -> str:
    kept = ["--kept", str(folder / "kept.jsonl"), "--out", str(folder), "--threads", "1", "--keys", "20"]
    study.main([str(MODEL), "--text", str(TEXT), *kept, *arguments])
    return (folder / "real-models.md").read_text()


@pytest.mark.parametrize("pretend", ["0", "128"])
def test_an_interrupted_study_goes_on(tmp_path, monkeypatch, pretend):
    methods, times = ["selfextend", "plain", "window", "yarn"], {"0": "4", "128": "8"}[pretend]
    arguments = ["--pretend", pretend, "--times", times]
    first = run(tmp_path, *arguments, "--methods", *methods[:3])
    assert "yarn |" not in first
    one_more = run(tmp_path, *arguments, "--methods", *methods)
    assert one_more.count("\n| ") == first.count("\n| ") + 2  # in the summary, and in the group

    def read_again(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(study, "read", read_again)
    assert run(tmp_path, *arguments, "--methods", *methods) == one_more
    measure = "window" if pretend == "0" else "plain"
    assert f"| {measure} | (measure) |" in one_more
    assert "| selfextend | " in one_more and "0 of 20" in one_more
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_what_was_not_measured_is_said(tmp_path):
    run(tmp_path, "--methods", "selfextend", "window", "paper")
    text = run(tmp_path, "--write-only", "--methods", "selfextend", "window", "paper", "yarn", "loop")
    assert "Not measured, or out of reach: yarn, loop." in text


def test_losses_are_those_of_the_text_beyond_the_trained_context():
    result = {
        "losses": [1.0, 2.0, 3.0, 4.0, 5.0],
        "is_text": "11101",
        "answers": [" 12345 and", " no"],
        "wanted": ["12345", "67890"],
    }
    reading = study.reading(result, 2)
    assert reading.losses.tolist() == [2.0, 3.0, 5.0]  # of tokens 2, 3, 5; token 4 is a key's
    assert np.isnan(reading.by_position).tolist() == [False, False, False, True, False]
    assert reading.found == [True, False]


def test_a_result_depends_on_the_texts_content(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one")
    setting = study.Setting(MODEL, 0, 100, text)
    kept = Kept(None)
    kept.measured(setting.what("plain"), lambda: 1)
    text.write_text("two")
    assert not kept.has(setting.what("plain"))


def test_the_summary_marks_what_is_not_beaten(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("")
    noise = np.random.default_rng(0).normal(0, 0.02, 400)
    noise -= noise.mean()

    def told(loss: float, found: int) -> list[study.Reading]:
        losses = loss + noise if loss != 2 else np.full(400, 2.0)
        return [study.Reading(losses, losses, [True] * found + [False] * (40 - found))]

    readings = {"plain": told(2, 40), "selfextend": told(2.1, 20), "yarn": told(2.1, 19), "window": told(2.3, 2)}
    pretended = study.Group(study.Setting(MODEL, 64, 256, text), 64, [text], readings, [])
    trained = study.Group(study.Setting(MODEL, 0, 256, text), 64, [text], readings | {"plain": told(9, 0)}, [])
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in study.summary([pretended, trained]).splitlines()]
    assert rows[2] == ["plain", "1.000, 100%", "812, 0%", "0 and 0 of 1"]
    assert rows[3] == ["selfextend", "**1.105**, **50%**", "**0.819**, **50%**", "2 and 2 of 2"]
    assert rows[4] == ["yarn", "**1.105**, **48%**", "**0.819**, **48%**", "2 and 2 of 2"]
    assert rows[5] == ["window", "1.350, 5%", "1.000, 5%", "0 and 0 of 2"]
