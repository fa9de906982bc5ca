"""Results of measurements that outlast their process."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.kept import Kept


def unmeasured() -> None:
    raise AssertionError("measured again")


def test_a_result_is_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    first = Kept(path)
    assert first.measured({"method": "plain", "n": 1}, lambda: [1.5, None]) == [1.5, None]
    assert first.measured({"n": 1, "method": "plain"}, unmeasured) == [1.5, None]
    again = Kept(path)
    assert again.measured({"method": "plain", "n": 1}, unmeasured) == [1.5, None]
    assert again.has({"method": "plain", "n": 1}) and not again.has({"method": "plain", "n": 2})


def test_two_objects_add_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    one, two = Kept(path), Kept(path)
    one.measured({"n": 1}, lambda: 1)
    two.measured({"n": 2}, lambda: 2)
    assert len(Kept(path)) == 2


def test_a_line_that_was_not_finished_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    kept = Kept(path)
    kept.measured({"n": 1}, lambda: 1)
    kept.measured({"n": 2}, lambda: 2)
    path.write_bytes(path.read_bytes()[:-3])
    again = Kept(path)
    assert len(again) == 1
    assert again.measured({"n": 2}, lambda: 3) == 3
    assert Kept(path).measured({"n": 2}, unmeasured) == 3


@pytest.mark.parametrize("content", [b"text\n", b"{}\n", b"[1, 2]\n", b"\xff\n", b'[{"n": 1}]\n'])
def test_a_file_of_something_else_is_refused_and_left(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="line 1: no result of a measurement"):
        Kept(path)
    assert path.read_bytes() == content


def test_without_a_file_results_are_kept_in_the_object() -> None:
    kept = Kept(None)
    assert kept.measured({"n": 1}, lambda: 1) == 1
    assert kept.measured({"n": 1}, unmeasured) == 1
