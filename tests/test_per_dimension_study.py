"""The experiment with a group size for each range of RoPE frequencies, on a bundled model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from selfextend_gguf._native import schedule_step
from selfextend_gguf.models import TINY_MODELS
from selfextend_gguf.planning import plan
from selfextend_gguf.reference import Reference
from selfextend_gguf.schedule import schedule_positions_numpy
from selfextend_gguf.studies import per_dimension as study

MODEL = TINY_MODELS[0]  # trained on 256 tokens
TEXT = Path(__file__).parent / "data" / "heldout.txt"
CONFIG = plan(128, 512)


def test_each_range_of_frequencies_has_the_positions_of_its_group_size():
    positions = study.positions(CONFIG, (1, 4), 16, 300, 320)
    assert positions.shape == (300, 16)
    assert np.array_equal(positions[:, 7], np.arange(300))
    uniform = study.positions(CONFIG, (CONFIG.group_size,) * 8, 16, 300, 320)
    assert np.array_equal(uniform, np.tile(schedule_positions_numpy(CONFIG, 300, 320)[:, None], (1, 16)))
    assert (positions[:, 8:] != positions[:, :8]).any()


def test_one_size_for_all_is_the_schedule():
    reference = Reference(MODEL)
    tokens = list(TEXT.read_bytes()[:300])
    sizes, steps = [1, 4], []
    while sum(steps) < len(tokens):
        steps.append(schedule_step(CONFIG, sum(steps), len(tokens) - sum(steps)))
    uniform = reference.logits(tokens, steps, lambda a, b: study.positions(CONFIG, (CONFIG.group_size,) * 8, 16, a, b))
    assert np.array_equal(uniform, reference.logits(tokens, steps, CONFIG))
    mixed = reference.logits(tokens, steps, lambda a, b: study.positions(CONFIG, sizes, 16, a, b))
    assert np.abs(mixed - uniform)[-1].max() > 1e-3


def test_a_second_call_measures_nothing_again(tmp_path, monkeypatch):
    arguments = [str(MODEL), "--text", str(TEXT), "--pretend", "64", "--times", "4"]
    arguments += ["--kept", str(tmp_path / "kept.jsonl"), "--out", str(tmp_path)]
    study.main(arguments)
    first = (tmp_path / "per-dimension.md").read_text()
    assert first.count("\n| ") == 2 + len(study.sizes(2))

    def read_again(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(study, "losses", read_again)
    study.main(arguments)
    assert (tmp_path / "per-dimension.md").read_text() == first
    with pytest.raises(SystemExit):
        study.main(arguments[1:])
