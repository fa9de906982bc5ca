"""Perplexity, tuning and the study: what they compute, and the commands that print it."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import F32

from selfextend_gguf import Llama, plan
from selfextend_gguf.cli import main
from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.kept import Kept
from selfextend_gguf.evaluation.perplexity import by_position, compare, perplexity, perplexity_ratio, stretches
from selfextend_gguf.evaluation.readers import METHODS, LlamaReader, open_reader, pretended, token_losses
from selfextend_gguf.evaluation.readings import Readings
from selfextend_gguf.evaluation.tune import candidates, parameters_of, tune
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import TINY_MODEL, TINY_MODELS
from selfextend_gguf.schedule import SCHEDULES
from selfextend_gguf.studies import methods as study

MODEL = str(TINY_MODEL)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.fixture(scope="module")
def tokens(heldout_text) -> list[int]:
    return list(heldout_text.encode())


@pytest.fixture(scope="module")
def text_file(heldout_text, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(heldout_text[:12000])
    return str(path)


# ---- readers -----------------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_logits():
    # One row, three tokens with logits 0, 1, 2: -log(e^1 / (e^0 + e^1 + e^2)) = log(11.107) - 1 = 1.40761
    assert token_losses(np.array([[0, 1, 2]], np.float32), [1]) == pytest.approx([1.407606], abs=1e-6)


def test_self_extend_reads_as_llama_does(tokens):
    llm = Llama(MODEL, n_ctx=1024, logits_all=True, flash_attn=False, verbose=False, **F32)
    llm.eval(tokens[:1000])
    wanted = token_losses(llm.scores[:999], tokens[1:1000])
    reader = open_reader("selfextend", MODEL, 1024, flash_attn=False, **F32)
    assert reader.losses(tokens[:1000]) == pytest.approx(wanted, abs=1e-9)
    first, second = reader.losses(tokens[:500]), reader.losses(tokens[:500])
    assert np.array_equal(first, second)  # reading again starts afresh


def test_fresh_windows_give_every_token_half_a_context_or_more(tokens):
    """Token 300 stands in the window that starts at 128, so its loss is that of reading tokens 128 to 300."""
    reader = open_reader("window", MODEL, 600, flash_attn=False)
    losses = reader.losses(tokens[:600])
    assert len(losses) == 599
    plain = llama_cpp.Llama(MODEL, n_ctx=512, logits_all=True, verbose=False)
    plain.eval(tokens[128:301])
    assert losses[299] == pytest.approx(token_losses(plain.scores[171:172], [tokens[300]])[0], abs=0.01)


def test_the_loop_is_plain_until_it_starts(tokens):
    plain, loop = (
        open_reader(method, MODEL, 512, flash_attn=False).losses(tokens[:512]) for method in ("plain", "loop")
    )
    assert loop[:100] == pytest.approx(plain[:100], abs=0.05)
    assert np.abs(loop[300:] - plain[300:]).max() > 1


@pytest.mark.parametrize("method", ["selfextend", "restart", "dca"])
def test_within_the_trained_context_methods_read_as_plain_does(tokens, method):
    """With the same attention kernel: what remains is the order of sums, as steps differ in length."""
    plain, extended = (open_reader(m, MODEL, 1024).losses(tokens[:256]) for m in ("plain", method))
    assert extended == pytest.approx(plain, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_read_and_answer(tokens, method):
    reader = open_reader(method, MODEL, 400)
    question = list(b"\nWhat is the oak key? The oak key is ")
    fact = list(b"The oak key is 48213. ")
    found = reader.answers([*tokens[:150], *fact], [question, question], 5)
    losses = reader.losses(tokens[:300])
    reader.close()
    assert bytes(found[0]) == b"48213" or method in ("linear", "loop")
    assert np.isfinite(losses).all()
    assert len(losses) == 299


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="unknown method 'dynamic'; choose from selfextend"):
        open_reader("dynamic", MODEL, 400)


# ---- perplexity --------------------------------------------------------------------------------------------------


def test_perplexity_and_its_standard_error():
    losses = np.array([1.0, 2.0, 3.0])
    # e^2 = 7.389; standard deviation sqrt(2/3), error of the mean sqrt(2/3)/sqrt(3) = 0.4714
    assert perplexity(losses).value == pytest.approx(7.389, abs=1e-3)
    assert perplexity(losses).error == pytest.approx(7.389 * 0.4714, abs=1e-2)
    ratio = perplexity_ratio(losses + 0.1, losses)
    assert (ratio.value, ratio.error) == pytest.approx((np.exp(0.1), 0.0), abs=1e-9)


def test_stretches_do_not_overlap():
    assert stretches(range(10), 4, 5) == [[0, 1, 2, 3], [6, 7, 8, 9]]
    with pytest.raises(ConfigError, match="the text has 10 tokens, 11 were asked for"):
        stretches(range(10), 11, 1)


def test_perplexity_by_position_covers_all_positions():
    middles, values = by_position(np.full((2, 1000), 0.5))
    assert values == pytest.approx(np.exp(0.5))
    assert middles[0] > 16
    assert middles[-1] < 1000


def test_self_extend_keeps_what_others_lose(tokens):
    results = list(compare(Readings(MODEL), tokens, ["window", "selfextend", "plain", "yarn"], [1024], n_texts=2))
    ratio = {r.method: r.ratio.value for r in results}
    assert ratio["window"] == 1
    assert ratio["selfextend"] < 1.03 < ratio["yarn"] < ratio["plain"]


# ---- tune --------------------------------------------------------------------------------------------------------


def test_the_first_candidates_are_of_all_schedules():
    automatic = [plan(256, 512, schedule=schedule) for schedule in SCHEDULES]
    first = list(islice(candidates(256, 512), len(SCHEDULES)))
    assert first[0] == plan(256, 512) and set(first) == set(automatic)


@pytest.mark.parametrize("n_ctx", [512, 4096])
def test_candidates_start_with_the_default_and_can_be_written_down(n_ctx):
    configs = list(candidates(256, n_ctx))
    assert configs[0] == plan(256, n_ctx)
    assert len(set(configs)) == len(configs) > 10
    assert {config.schedule for config in configs} == set(SCHEDULES)
    for config in configs:
        assert plan(256, n_ctx, **parameters_of(config)) == config


def test_tuned_parameters_are_no_worse_on_other_text(tokens):
    with ModelInfo(MODEL) as info:
        *_, trials = tune(Readings(MODEL), tokens[:20000], 512, tokenizer=info.tokenizer)
    assert all(trial.retrieval in (0, 0.25, 0.5, 0.75, 1) for trial in trials)  # four keys
    assert trials[0].retrieval == 1
    best, default = trials[0], next(t for t in trials if t.is_default)
    assert best.ratio_to(default).value <= 1
    other = tokens[60000:90000]

    def losses(trial) -> np.ndarray:
        parameters = dict(trial.parameters)
        reader = open_reader(parameters.pop("schedule"), MODEL, 512, parameters=parameters)
        return np.concatenate([reader.losses(text)[256:] for text in stretches(other, 512, 10)])

    ratio = perplexity_ratio(losses(best), losses(default))
    assert ratio.value < 1 + 2 * ratio.error


# ---- study -------------------------------------------------------------------------------------------------------


def test_key_texts_hold_their_keys(heldout_text):
    made = study.key_text(np.random.default_rng(1), heldout_text, 2000, 3, 0.5)
    assert 1900 < len(made.prompt) + max(map(len, made.questions)) <= 2000
    for i, (question, answer) in enumerate(zip(made.questions, made.answers, strict=True)):
        name = re.search(rb"the (\w+) key", question)[1]
        at = made.prompt.index(b"The " + name + b" key is " + answer)
        assert at / len(made.prompt) == pytest.approx((i + 0.5) / 3, abs=0.05)


def test_the_study_writes_its_document(heldout_text, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "TINY_MODELS", TINY_MODELS[:1])
    monkeypatch.setattr(study, "texts_and_keys", lambda times: (2, 1))
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))  # no time to start programs
    assert pickle.loads(pickle.dumps(study.read)) is study.read  # as they would need it
    text = tmp_path / "text.txt"
    text.write_text(heldout_text[:5000])
    out = tmp_path / "a" / "new folder"
    arguments = ["--text", str(text), "--kept", str(tmp_path / "kept"), "--out", str(out), "--times", "1", "2"]
    study.main(arguments)
    document = (out / "results.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(study, "read", None)  # nothing is read again
        study.main(arguments)
    assert (out / "results.md").read_text() == document
    for method in METHODS:
        assert re.search(rf"\| {method} \| [\d.]+ / [\d.]+ \| [\d.]+ / [\d.]+ \|", document)
    assert is_png(out / "tiny-256-perplexity.png")
    assert is_png(out / "tiny-256-keys.png")


@pytest.mark.parametrize("model", TINY_MODELS, ids=lambda path: path.name)
def test_both_models_reach_eight_times_their_context(heldout_text, monkeypatch, model):
    monkeypatch.setattr(study, "texts_and_keys", lambda times: (2, 4))
    n_ctx_train = 512 if "512" in model.name else 256
    ours = study.read(str(model), heldout_text, "selfextend", n_ctx_train, 8)
    window = study.read(str(model), heldout_text, "window", n_ctx_train, 8)
    assert len(ours.found) == 8
    assert sum(ours.found) >= 7  # `tiny.evaluate` and its test ask for more
    assert sum(window.found) <= 1
    assert perplexity_ratio(ours.losses, window.losses).value < 1.06


# ---- commands ----------------------------------------------------------------------------------------------------


def test_eval_ppl(text_file, tmp_path):
    plot = tmp_path / "ppl.png"
    arguments = ["eval", "ppl", MODEL, "-f", text_file, "--lengths", "256,1024", "--against", "window"]
    result = invoke(*arguments, "--plot", str(plot))
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [(line[0], line[2]) for line in lines[1:]] == [
        (n, method) for n in ("256", "1024") for method in ("selfextend", "plain", "window")
    ]
    assert is_png(plot)
    record = json.loads(invoke(*arguments, "--json").stdout)
    relative = {r["method"]: r["relative"]["value"] for r in record["results"] if r["n_tokens"] == 1024}
    assert relative["selfextend"] == 1
    assert relative["plain"] > 3


def test_a_picture_that_cannot_be_written_loses_no_measurement(text_file, tmp_path):
    plot = str(tmp_path / "missing" / "a.png")
    result = invoke("eval", "ppl", MODEL, "-f", text_file, "--lengths", "256", "--plot", plot)
    assert (result.exit_code, result.stdout.splitlines()[1].split()[2]) == (1, "selfextend")
    assert result.stderr.startswith("Error: ") and "missing" in result.stderr
    result = invoke("eval", "passkey", MODEL, "--lengths", "256", "--plot", plot)
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 2)


def test_eval_ppl_says_what_is_wrong(text_file, tmp_path):
    result = invoke("eval", "ppl", MODEL, "-f", text_file, "--lengths", "20000")
    assert (result.exit_code, result.stderr) == (1, "Error: the text has 12000 tokens, 20000 were asked for\n")
    assert "token counts with commas" in invoke("eval", "ppl", MODEL, "-f", text_file, "--lengths", "1k").stderr
    binary = tmp_path / "binary"
    binary.write_bytes(bytes(range(256)))
    assert "is binary, no text" in invoke("eval", "ppl", MODEL, "-f", str(binary)).stderr
    assert invoke("eval", "ppl", MODEL, "-f", str(tmp_path / "none")).exit_code == 1


def test_tune_writes_what_config_reads(text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("selfextend_gguf.evaluation.tune.candidates", lambda *sizes: islice(candidates(*sizes), 8))
    tuned = tmp_path / "tuned.json"
    result = invoke("tune", MODEL, "-c", "1024", "-f", text_file, "--budget", "3600", "-o", str(tuned))
    assert result.exit_code == 0, result.output
    assert "(automatic)" in result.stdout
    command = result.stdout.splitlines()[-1]
    parameters = json.loads(tuned.read_text())
    assert f"--schedule {parameters['schedule']}" in command

    facts = json.loads(invoke("info", MODEL, "-c", "1024", "--config", str(tuned), "--json").stdout)
    assert parameters.items() <= facts["self_extend"].items()
    run = invoke("run", MODEL, "x" * 300, "-c", "1024", "-n", "1", "--config", str(tuned), "--json")
    assert parameters.items() <= json.loads(run.stdout)["self_extend"].items()


def test_results_replace_a_file_whole_or_not_at_all(text_file, tmp_path, monkeypatch):
    """A disk that fills up while a picture or parameters are written leaves what was there."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name, arguments in (
        ("ppl.png", ["eval", "ppl", MODEL, "-f", text_file, "--lengths", "256", "--plot"]),
        ("tuned.json", ["tune", MODEL, "-c", "512", "-f", text_file, "--budget", "5", "-o"]),
    ):
        file = tmp_path / name
        file.write_text("before")
        result = invoke(*arguments, str(file))
        assert (result.exit_code, file.read_text()) == (1, "before")
        assert result.stderr.endswith(f"Error: [Errno 28] No space left on device: '{file}'\n")
        assert list(tmp_path.iterdir()) == [file]
        file.unlink()


def test_config_files_that_tune_did_not_write_are_refused(tmp_path):
    file = tmp_path / "config.json"
    for content, message in (("{", "is no file that `sx-gguf tune` wrote"), ('{"G": 3}', "unknown parameters: G")):
        file.write_text(content)
        result = invoke("info", MODEL, "--config", str(file))
        assert result.exit_code == 2
        assert message in result.stderr


def test_tune_counts_what_it_did_not_reach(text_file, monkeypatch):
    monkeypatch.setattr("selfextend_gguf.evaluation.tune.candidates", lambda *sizes: islice(candidates(*sizes), 3))
    clock = Clock(monkeypatch, 0.2)  # 512 tokens take 100 s, and some to ask for keys
    monkeypatch.setitem(Readings.__init__.__kwdefaults__, "clock", clock)
    for budget, n_left in (("150", 2), ("300", 1), ("1e6", 0)):
        result = invoke("tune", MODEL, "-c", "512", "-f", text_file, "--budget", budget)
        said = f"{n_left} of 3 candidates not reached: budget"
        assert (said in result.stdout) == (n_left > 0), result.output
    assert invoke("tune", MODEL, "-c", "512", "-f", text_file, "--budget", "0").stderr == (
        "Error: no time to read anything within 0 s: give a larger --budget\n"
    )


def test_tune_goes_on_and_an_interrupt_loses_nothing(text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("selfextend_gguf.evaluation.tune.candidates", lambda *sizes: islice(candidates(*sizes), 3))
    real, tuned = Readings.measured, tmp_path / "tuned.json"
    arguments = ["tune", MODEL, "-c", "512", "-f", text_file, "--resume", str(tmp_path / "kept.jsonl")]

    def interrupt_reading(number: int) -> None:
        calls = iter(range(100))

        def interrupted(*given, **named):
            if next(calls) == number:
                raise KeyboardInterrupt
            return real(*given, **named)

        monkeypatch.setattr(Readings, "measured", interrupted)

    interrupt_reading(0)
    first = invoke(*arguments)
    assert (first.exit_code, first.stdout, first.stderr) == (130, "", "Interrupted.\n")
    interrupt_reading(2)
    part = invoke(*arguments, "-o", str(tuned))
    lines = part.stdout.splitlines()
    assert (part.exit_code, lines[3]) == (130, "1 of 3 candidates not reached: interrupted")
    assert all(
        f"--{name.replace('_', '-')} {value}" in lines[-1] for name, value in json.loads(tuned.read_text()).items()
    )
    monkeypatch.setattr(Readings, "measured", real)
    again = invoke(*arguments, "--budget", "0")
    assert again.exit_code == 0
    assert again.stdout == part.stdout.replace("interrupted", "budget")


def test_tune_says_what_is_wrong(text_file):
    assert "nothing to tune" in invoke("tune", MODEL, "-c", "256", "-f", text_file).stderr
    assert "give a longer" in invoke("tune", MODEL, "-c", "16384", "-f", text_file).stderr


# ---- a model read as if trained on less --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_see_the_pretended_context(tokens, method):
    """All but plain read a text within the true context in another way than without."""
    overrides = pretended(MODEL, 128)
    readers = [open_reader(method, MODEL, 256, **arguments) for arguments in (overrides, {})]
    shorter, own = [reader.losses(tokens[:256]) for reader in readers]
    for reader in readers:
        reader.close()
    assert np.array_equal(shorter, own) == (method == "plain")


def test_plain_is_the_measure_under_a_pretended_context(text_file):
    arguments = ["eval", "ppl", MODEL, "-f", text_file, "--lengths", "256", "--pretend-trained", "128", "--json"]
    record = json.loads(invoke(*arguments, "--against", "window").stdout)
    assert record["n_ctx_train"] == 128
    by_method = {r["method"]: r["perplexity"]["value"] for r in record["results"]}
    assert by_method["plain"] != by_method["selfextend"]
    own = json.loads(invoke("eval", "ppl", MODEL, "-f", text_file, "--lengths", "256", "--json").stdout)
    assert by_method["plain"] == pytest.approx(own["results"][1]["perplexity"]["value"])


def test_passkey_and_tune_pretend(text_file, monkeypatch):
    passkey = invoke("eval", "passkey", MODEL, "--lengths", "256", "--pretend-trained", "128")
    methods = [line.split()[:3] for line in passkey.stdout.splitlines()[1:]]
    assert methods == [["256", "2x", "selfextend"], ["256", "2x", "plain"]], passkey.output
    monkeypatch.setattr("selfextend_gguf.evaluation.tune.candidates", lambda *sizes: islice(candidates(*sizes), 2))
    tuned = invoke("tune", MODEL, "-c", "256", "-f", text_file, "--pretend-trained", "128")
    assert tuned.exit_code == 0, tuned.output
    command = shlex.split(tuned.stdout.splitlines()[-1])
    assert ("--pretend-trained", "128") in pairwise(command)
    assert invoke(*command[1:]).exit_code == 0


@pytest.mark.parametrize("command", [["eval", "ppl"], ["eval", "passkey"], ["tune", "-c", "512"]])
@pytest.mark.parametrize("n", ["256", "4096"])
def test_only_a_shorter_context_can_be_pretended(text_file, command, n):
    text = [] if "passkey" in command else ["-f", text_file]
    result = invoke(*command, MODEL, *text, "--pretend-trained", n)
    message = f"Error: {TINY_MODEL.name} was trained on 256 tokens: pretend fewer than that, not {n}\n"
    assert (result.exit_code, result.stderr) == (1, message)


# ---- results that are kept, within a time --------------------------------------------------------------------------


def test_readings_go_on_where_they_were(tokens, tmp_path):
    file = tmp_path / "kept.jsonl"
    first = Readings(MODEL, kept=Kept(file)).losses("plain", tokens[:200])
    again = Readings(MODEL, kept=Kept(file), seconds=0)  # no time to read anything
    assert np.array_equal(first, again.losses("plain", tokens[:200]))
    assert again.losses("plain", tokens[1:201]) is None
    assert again.losses("yarn", tokens[:200]) is None
    assert Readings(MODEL, kept=Kept(file), seconds=0, type_k=8).losses("plain", tokens[:200]) is None


class Clock:
    """Tells the time; a reading takes `per_token` seconds a token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, per_token: float) -> None:
        self.now = 0.0
        real = LlamaReader._read

        def read(reader, tokens, begin, **options):
            self.now += per_token * (len(tokens) - begin)
            return real(reader, tokens, begin, **options)

        monkeypatch.setattr(LlamaReader, "_read", read)

    def __call__(self) -> float:
        return self.now


def test_a_reading_that_might_not_fit_is_not_begun(tokens, monkeypatch):
    readings = Readings(MODEL, seconds=60, clock=Clock(monkeypatch, 0.05))
    assert readings.losses("plain", tokens[:200]) is not None  # takes 10 s
    assert readings.losses("plain", tokens[:480]) is None  # 24 s, or 57.6 s if attention takes all: 50 s are left
    assert readings.losses("plain", tokens[:400]) is not None  # at most 40 s: takes 20
    assert readings.losses("plain", tokens[:480]) is not None  # by the longer one at most 28.8 s: takes 24
    assert readings.losses("yarn", tokens[:150]) is None  # 7.5 s by plain's: 6 s are left
    assert readings.losses("yarn", tokens[:100]) is not None


def test_how_long_a_reading_takes_follows_from_methods_that_are_as_fast(tokens, monkeypatch):
    readings = Readings(MODEL, clock=Clock(monkeypatch, 0.05))
    assert readings.estimate("plain", 200) == 0
    readings.losses("window", tokens[:512])  # reads 257 tokens three times, more or less
    slow = readings.estimate("window", 512)
    assert slow > 0.05 * 512 * 1.3
    assert readings.estimate("plain", 512) == slow  # nothing better is known
    readings.losses("plain", tokens[:128])
    assert readings.estimate("selfextend", 512) == pytest.approx(0.05 * 128 * 16)
    readings.losses("selfextend", tokens[:512])
    assert readings.estimate("plain", 512) == pytest.approx(0.05 * 512)  # by the other method's at this length
    assert readings.estimate("window", 512) == slow


def test_other_parameters_are_other_results(tokens, tmp_path, monkeypatch):
    """Automatic ones are the same result as these numbers given, until another version chooses others."""
    file = tmp_path / "kept.jsonl"

    def kept(parameters=None, method="selfextend", text=tokens[:512], model=MODEL) -> bool:
        readings = Readings(model, kept=Kept(file), seconds=0)
        return readings.losses(method, text, parameters) is not None

    for method in ("selfextend", "plain"):
        Readings(MODEL, kept=Kept(file)).losses(method, tokens[:512])
    automatic = parameters_of(plan(256, 512))
    assert automatic.pop("schedule") == "selfextend"
    assert kept() and kept(automatic) and not kept({"group_size": automatic["group_size"] + 1})
    assert kept({"group_size": 7}, "plain")  # which has no use for it
    other = tmp_path / TINY_MODEL.name
    content = bytearray(TINY_MODEL.read_bytes())
    other.write_bytes(content)
    assert kept(model=str(other))  # the same file elsewhere
    content[-1] ^= 1
    other.write_bytes(content)
    assert not kept(model=str(other))
    monkeypatch.setattr(
        "selfextend_gguf.evaluation.readers.plan_if_beyond", lambda *sizes, **_: plan(*sizes, group_size=9)
    )
    assert not kept() and kept(method="plain")
    monkeypatch.setattr("selfextend_gguf.evaluation.kept.__version__", "0.0.1")
    assert not kept(method="plain")


def test_stretches_that_did_not_fit_are_left_out_for_all(text_file, monkeypatch):
    clock = Clock(monkeypatch, 1 / 256)
    monkeypatch.setitem(Readings.__init__.__kwdefaults__, "clock", clock)
    arguments = ["eval", "ppl", MODEL, "-f", text_file, "--lengths", "256", "--texts", "3"]
    whole = invoke(*arguments)
    assert "of 3 texts" not in whole.stdout, whole.output
    clock.now = 0.0
    part = invoke(*arguments, "--budget", "3.5")  # each reading takes 1 s
    assert part.stdout.splitlines()[-2:] == [
        f"256 tokens, {method}: {n} of 3 texts: budget" for method, n in (("selfextend", 2), ("plain", 1))
    ]
    real, calls = Readings.losses, iter(range(100))

    def interrupted(*given):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(Readings, "losses", interrupted)
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (130, part.stdout.replace("budget", "interrupted"))


def test_eval_ppl_goes_on_and_says_what_it_left_out(text_file, tmp_path, monkeypatch):
    kept = str(tmp_path / "kept.jsonl")
    arguments = ["eval", "ppl", MODEL, "-f", text_file, "--resume", kept]
    whole = invoke(*arguments, "--lengths", "256,512")
    assert whole.exit_code == 0, whole.output
    assert invoke(*arguments, "--lengths", "256,512", "--budget", "0").stdout == whole.stdout
    more = [*arguments, "--lengths", "512,1024", "--budget", "0"]
    table = invoke(*more).stdout
    assert [line.split()[2:] for line in table.splitlines()[3:]] == [
        [method, "not", "measured:", "budget"] for method in ("selfextend", "plain")
    ]
    assert json.loads(invoke(*more, "--json").stdout)["not_measured"] == {
        "why": "budget",
        "readings": [{"method": method, "n_tokens": 1024} for method in ("selfextend", "plain")],
    }
    real = Readings.losses

    def interrupted(self, method, *others):
        if method == "plain":
            raise KeyboardInterrupt
        return real(self, method, *others)

    monkeypatch.setattr(Readings, "losses", interrupted)
    result = invoke(*arguments, "--lengths", "256")
    assert result.exit_code == 130
    assert result.stdout.splitlines()[1] == whole.stdout.splitlines()[1]
    assert result.stdout.splitlines()[2].split()[2:] == ["plain", "not", "measured:", "interrupted"]
