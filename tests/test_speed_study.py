"""The study of speed: what it measures, and that it measures nothing twice. The measurements are stand-ins."""

from __future__ import annotations

import pytest

from selfextend_gguf.evaluation import bench
from selfextend_gguf.evaluation.bench import BenchResult, Ratio
from selfextend_gguf.models import TINY_MODELS
from selfextend_gguf.studies import speed

SLOW, FAST = Ratio(2.0, 1.0, 2.0, 1.5, 2.5), Ratio(1.0, 1.0, 1.0, 0.9, 1.1)


@pytest.fixture
def calls(monkeypatch):
    """Calls of the stand-ins, in their order."""
    made: list = []

    def run(model, length, generate, repeats, arguments, programs):
        made.append((model.name, length, repeats, arguments))
        own = {"run, llama-completion": SLOW} if programs.llama_completion else {}
        return BenchResult(FAST, SLOW, 0.0123, 0.3, 0.1, 1, 1, True, own)

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(speed, "_take_turns", lambda *given: made.append("choices") or [(1.0, 2.0)] * len(given[1]))
    monkeypatch.setattr(speed, "_start", lambda: made.append("starts") or {"a command": 0.0421})
    monkeypatch.setattr(speed, "fast_cores", lambda: 2)
    return made


def test_the_document(calls, tmp_path):
    model = str(TINY_MODELS[1])
    command = [model, "--llama-bench", "a", "--llama-completion", "b", "--kept", str(tmp_path / "kept.jsonl")]
    command += ["--lengths", "512", "16384", "--trained", "256", "--tiny-trained", "128", "256", "--out", str(tmp_path)]
    speed.main(command)
    text = (tmp_path / "performance.md").read_text()
    n_cells = 2 * 8 + 4  # two contexts of the bundled model, with one thread and with two; one of the other
    assert text.count("| 1.00 | 1.000 | 2.00 | 2.000 | 1.23 |") == n_cells
    assert f"Reading is within 1.01 in {n_cells} of {n_cells} settings, generating in 0." in text
    assert text.count("| run, llama-completion | 2.00 | 1.00 | 2.000 | 1.500 to 2.500 |") == 4
    assert text.count("| 1.00 | 0.300 | 0.100 | 3.00 |") == 4
    assert "| a command | 42 |" in text
    assert text.count("| 1.00 | 2.00 |\n") == 2 * 12

    measured = [call for call in calls if isinstance(call, tuple)]
    assert len(measured) == n_cells + 4
    repeats = {(name, length): n for name, length, n, _ in measured}
    assert repeats["tiny-256.Q8_0.gguf", 16384] == repeats["tiny-512.Q8_0.gguf", 512] == 5
    assert repeats["tiny-512.Q8_0.gguf", 16384] == 1
    pretended = [arguments.get("kv_overrides") for name, length, _, arguments in measured if length in (512, 1024)]
    assert pretended.count({"llama.context_length": 128}) == 8
    assert pretended.count({"llama.context_length": 256}) == 4  # the other was trained on 512, the bundled one on 256

    n_calls = len(calls)
    speed.main(command)
    assert len(calls) == n_calls
    assert (tmp_path / "performance.md").read_text() == text
