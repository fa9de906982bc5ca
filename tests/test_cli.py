"""The `sx-gguf` command as a user meets it."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import llama_cpp._internals as internals
import numpy as np
import psutil
import pytest
from click.testing import CliRunner, Result
from helpers import SHAPES
from processes import run_python

from selfextend_gguf import plan, planning
from selfextend_gguf.cli import main
from selfextend_gguf.errors import ModelFileError
from selfextend_gguf.evaluation.bench import write_random_model
from selfextend_gguf.memory import demand_of
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.planning import default_context, longest_context
from selfextend_gguf.tiny.keys import key_task
from selfextend_gguf.tiny.model_file import LlamaShape, random_tensors, write_llama

COMMAND = [str(Path(sys.executable).with_name("sx-gguf"))]
MODEL = str(TINY_MODEL)


def invoke(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), input=stdin)


@pytest.fixture(scope="module")
def task(heldout_text):
    return key_task(np.random.default_rng(3), heldout_text, 1024, 0.4)


# ---- run -----------------------------------------------------------------------------------------------------


def test_run_extends_without_asking(task):
    """Four trained contexts, no --ctx: the answer is right. (CliRunner's stdout holds the answer alone.)"""
    result = invoke("run", MODEL, task.prompt, "-n", "5", "--temp", "0")
    assert (result.exit_code, result.stdout) == (0, task.answer + "\n")


def test_prompt_from_option_file_and_standard_input(task, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(task.prompt)
    for arguments, stdin in (
        (["-p", task.prompt], None),
        (["-f", str(file)], None),
        (["-f", "-"], task.prompt),
        ([], task.prompt),
    ):
        result = invoke("run", MODEL, *arguments, "-n", "5", "--temp", "0", stdin=stdin)
        assert (result.exit_code, result.stdout) == (0, task.answer + "\n"), arguments


def test_a_question_comes_after_the_file(task, tmp_path):
    file = tmp_path / "text.txt"
    text, question = task.prompt.rsplit("\n", 1)
    file.write_text(text)
    result = invoke("run", MODEL, "-f", str(file), "-p", question, "-n", "5", "--temp", "0")
    assert result.stdout == task.answer + "\n"


def test_json_is_one_record(task):
    result = invoke("run", MODEL, task.prompt, "-n", "5", "--temp", "0", "--json")
    record = json.loads(result.stdout)
    assert record["text"] == task.answer
    assert record["prompt_tokens"] == len(task.prompt)
    assert record["generated_tokens"] == 5
    assert record["finish_reason"] == "length"
    assert record["n_ctx"] == 1280  # 1024 + 5 + 1 tokens, rounded up to llama.cpp's multiple of 256
    assert record["self_extend"]["n_ctx_train"] == 256
    assert record["timings"]["prompt_tokens_per_second"] > 0


def test_within_the_trained_context_nothing_is_extended():
    record = json.loads(invoke("run", MODEL, "And it came to pass", "-n", "8", "--json").stdout)
    assert record["self_extend"] is None
    assert record["n_ctx"] == 256


def test_parameters_and_seed_reach_the_engine(task):
    arguments = [
        "run",
        MODEL,
        task.prompt,
        "-n",
        "20",
        "--json",
        "-c",
        "2048",
        "-gan",
        "40",
        "-gaw",
        "32",
        "-t",
        "1",
        "--seed",
        "7",
        "-ctk",
        "f32",
        "-ctv",
        "f32",
        "--schedule",
        "paper",
    ]
    first, second = (json.loads(invoke(*arguments).stdout) for _ in range(2))
    assert first["text"] == second["text"]
    config = first["self_extend"]
    assert (config["group_size"], config["neighbor_window"], config["schedule"]) == (40, 32, "paper")
    other = json.loads(invoke(*[a if a != "7" else "8" for a in arguments]).stdout)
    assert other["text"] != first["text"]


def test_without_a_seed_every_run_is_another():
    answers = {invoke("run", MODEL, "In the beginning", "-n", "60", "--temp", "1").stdout for _ in range(3)}
    assert len(answers) == 3


def test_timings_go_to_standard_error(task):
    result = invoke("run", MODEL, task.prompt, "-n", "5", "--temp", "0", "--timings")
    assert result.stdout == task.answer + "\n"
    assert re.search(r"prompt 1\d\d\d tokens, .* tokens/s \| generated 5 tokens", result.stderr)


def test_chat_template_is_applied_unless_raw(model):
    path = str(model("bundled-chat"))
    counts = [
        json.loads(invoke("run", path, "hello", "-n", "1", "--json", *more).stdout)["prompt_tokens"]
        for more in ([], ["--raw"], ["--system", "Be brief."])
    ]
    assert counts == [
        len("[user] hello\n[assistant] "),
        len("hello"),
        len("[system] Be brief.\n[user] hello\n[assistant] "),
    ]


def test_a_progress_bar_on_a_terminal(task):
    """In a real pseudo-terminal: the bar is on standard error, with tokens and speed, and the answer comes through."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(COMMAND[0], [*COMMAND, "run", MODEL, task.prompt, "-n", "5", "--temp", "0"])
    output = b""
    while True:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # Linux reports the end of a terminal this way
            break
        if not chunk:
            break
        output += chunk
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    screen = output.decode()
    assert re.search(r"Reading .*(1\d\d\d) of \1 tokens, [\d.]+ tokens/s", screen)
    assert task.answer in screen


# ---- bad input -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.gguf").write_bytes(b"")
    content = TINY_MODEL.read_bytes()
    (folder / "truncated.gguf").write_bytes(content[: len(content) // 2])
    (folder / "header.gguf").write_bytes(content[:100])
    (folder / "random.gguf").write_bytes(np.random.default_rng(0).bytes(100_000))
    (folder / "magic.gguf").write_bytes(b"GGUF" + np.random.default_rng(0).bytes(100_000))
    (folder / "directory.gguf").mkdir()
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.gguf", "does not exist"),
        ("directory.gguf", "is a directory"),
        ("empty.gguf", "is empty"),
        ("truncated.gguf", "is not within the file bounds, model is corrupted or incomplete"),
        ("header.gguf", "failed to read key-value pairs"),
        ("random.gguf", "is not a GGUF file"),
        ("magic.gguf", "GGUF"),
    ],
)
@pytest.mark.parametrize("command", [["run", "-p", "x"], ["info"]])
def test_bad_model_files(one_line_error, bad_models, command, name, message):
    assert message in one_line_error(command[0], str(bad_models / name), *command[1:])


def test_a_bad_model_file_in_a_process_of_its_own(bad_models):
    command = [*COMMAND, "run", str(bad_models / "truncated.gguf"), "-p", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*model is corrupted or incomplete.*\n", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "1000000"], "beyond the reach of Self-Extend"),
        (["-c", "1000000000"], "1000000000 tokens are beyond the reach"),
        (["-c", "512", "-p", "x" * 600], "Requested tokens (600) exceed context window of 512"),
        (["-c", "512", "--group-size", "0"], "group_size must be between 1 and 256"),
        (["-c", "512", "--group-size", "-2"], "group_size must be between 1 and 256"),
        (["-c", "512", "--neighbor-window", "300"], "the model is trained on 256 tokens"),
        (["-c", "4096", "-gan", "2"], "take a group size of at least"),
        (["--schedule", "yarn"], "'yarn' is not one of"),
        (["-c", "0"], "0 is not in the range x>=1"),
        (["-f", "no-such-file.txt"], "No such file"),
    ],
)
def test_bad_numbers(one_line_error, arguments, message):
    prompt = [] if "-p" in arguments or "-f" in arguments else ["-p", "x"]
    assert message in one_line_error("run", MODEL, *prompt, *arguments)


def test_files_that_are_no_text(one_line_error, tmp_path):
    file = tmp_path / "noise"
    file.write_bytes(bytes(range(256)) * 4)
    assert one_line_error("run", MODEL, "-f", str(file)).endswith(f"{file} is binary, no text")
    assert one_line_error("run", MODEL, stdin=file.read_bytes()).endswith("standard input is binary, no text")


def test_an_empty_prompt(one_line_error):
    assert "the prompt is empty" in one_line_error("run", MODEL)


def test_a_model_without_rope(one_line_error, tmp_path):
    path = tmp_path / "gpt2.gguf"
    write_gpt2(path)
    assert "no rotary position embeddings (RoPE)" in one_line_error("run", str(path), "-c", "512", "-p", "x")
    result = invoke("info", str(path))
    assert result.exit_code == 0
    assert "not possible: the model has no rotary position embeddings (RoPE)" in result.stdout


def write_gpt2(path: Path) -> None:
    """A small GPT-2: learned absolute positions, no RoPE."""
    from selfextend_gguf.tiny.model_file import add_byte_vocabulary

    rng = np.random.default_rng(0)
    n, ctx = 64, 128
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_context_length(ctx)
    writer.add_embedding_length(n)
    writer.add_block_count(1)
    writer.add_feed_forward_length(n)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    add_byte_vocabulary(writer, 256)
    shapes = {
        "token_embd.weight": (256, n),
        "position_embd.weight": (ctx, n),
        "output.weight": (256, n),
        "output_norm.weight": (n,),
        "output_norm.bias": (n,),
        "blk.0.attn_norm.weight": (n,),
        "blk.0.attn_norm.bias": (n,),
        "blk.0.attn_qkv.weight": (3 * n, n),
        "blk.0.attn_qkv.bias": (3 * n,),
        "blk.0.attn_output.weight": (n, n),
        "blk.0.attn_output.bias": (n,),
        "blk.0.ffn_norm.weight": (n,),
        "blk.0.ffn_norm.bias": (n,),
        "blk.0.ffn_up.weight": (n, n),
        "blk.0.ffn_up.bias": (n,),
        "blk.0.ffn_down.weight": (n, n),
        "blk.0.ffn_down.bias": (n,),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape, np.float32) * np.float32(0.1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_verbose_shows_the_traceback(bad_models):
    done = subprocess.run(
        [*COMMAND, "run", str(bad_models / "empty.gguf"), "-p", "x", "-v"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ModelFileError" in done.stderr
    assert "Traceback" in done.stderr


# An answer that waits for its reader when the pipe is full: however slow a test is, it has not ended.
ANSWERING = {
    "args": [*COMMAND, "run", MODEL, "In the beginning", "-n", "20000"],
    "stdout": subprocess.PIPE,
    "stderr": subprocess.PIPE,
    "pipesize": 4096,
}


def test_closed_standard_output():
    with subprocess.Popen(**ANSWERING) as process:
        process.stdout.read(5)
        process.stdout.close()
        error = process.stderr.read().decode()
        assert process.wait(60) == 1
    assert error.splitlines() == ["Error: the output was closed before the answer was complete"]


# ---- Ctrl-C --------------------------------------------------------------------------------------------------


def test_ctrl_c_while_reading_stops_at_once(tmp_path):
    """In the middle of a batch, whose computation takes half a minute."""
    model, file = tmp_path / "slow.gguf", tmp_path / "long.txt"
    # Much attention and few weights.
    shape = LlamaShape(n_ctx_train=4096, n_layer=64, n_embd=64, n_head=16, n_head_kv=1, head_dim=64, n_ff=64)
    write_random_model(model, shape)
    file.write_text("x" * 6000)
    told, tell = os.pipe()
    code = (
        "import os\n"
        "from selfextend_gguf.cli import main\n"
        "from selfextend_gguf.context import SelfExtendContext\n"
        "decode = SelfExtendContext.decode\n"
        f"SelfExtendContext.decode = lambda self, batch: (os.write({tell}, b'!'), decode(self, batch))\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", str(model), "-f", str(file), "-b", "4096"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[tell],
        cwd=tmp_path,  # not the source tree, where `selfextend_gguf.cli` is a folder `cli`
    )
    os.close(tell)
    with os.fdopen(told, "rb") as beginning:
        assert beginning.read(1) == b"!"
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=120)
        assert beginning.read() == b""  # no other batch was begun
    assert process.returncode == 130
    assert output == b""
    assert error.decode() == "Interrupted after reading 0 of 6000 tokens.\n"


def test_ctrl_c_while_generating_keeps_the_text_so_far():
    process = subprocess.Popen(**ANSWERING)
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _rest, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first) == 20
    assert error.decode().strip() == "Interrupted while generating."


# ---- info, demo, bench ---------------------------------------------------------------------------------------


def test_info_says_what_will_happen():
    result = invoke("info", MODEL, "--ctx", "4096")
    assert result.exit_code == 0
    rows = dict(re.split(r":\s+", line, maxsplit=1) for line in result.stdout.splitlines())
    assert rows["Architecture"] == "llama"
    assert rows["Trained context"] == "256 tokens"
    assert rows["RoPE"] == "norm, base 10000"
    assert rows["Quantisation"] == "Q8_0"
    # 4 layers x 2 KV heads x 32 elements x (keys and values) x 4096 tokens x 2 bytes = 4 MiB; q8_0: 34 bytes for 32.
    assert rows["KV cache at 4096 tokens"] == "4.0 MiB (f16), 2.1 MiB (q8_0)"
    assert rows["Self-Extend"].startswith("Up to 4096 tokens (16x the trained 256)")
    facts = json.loads(invoke("info", MODEL, "--ctx", "4096", "--json").stdout)
    assert facts["extendable"]
    assert rows["Arithmetic limit"] == f"{facts['longest_context']} tokens, not a promise"
    # 16 trained contexts, which were measured. Weights 1.8 MB, f16 cache 4 MiB.
    sensible = facts["sensible_context"]
    assert (sensible["n_ctx"], sensible["is_all_memory"]) == (4096, False)
    assert sensible["group_size"] == plan(256, 4096).group_size
    assert rows["Sensible context"] == (
        f"up to 4096 tokens (16x the trained one, groups of {sensible['group_size']}, "
        f"{sensible['n_bytes'] / 2**20:.1f} MiB of memory)"
    )


def test_info_names_a_context_that_the_memory_holds(monkeypatch):
    with ModelInfo(MODEL) as model_info:
        needed = demand_of(model_info, 1024, 512, flash_attn=None).total
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed, total=2**40))
    result = invoke("info", MODEL)
    assert re.search(r"Sensible context: +up to 1024 tokens \(4x .*, which is all there is\)\n", result.stdout)


@pytest.mark.parametrize(
    "parameters",
    [["-gan", "2"], ["-gan", "8"], ["--schedule", "adagrope"], ["--schedule", "leaky-rerope", "-gaw", "252"]],
)
def test_info_respects_the_parameters_it_is_given(parameters):
    """Also where the default context, 4 times the trained one, is out of their reach."""
    result = invoke("info", MODEL, *parameters, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    names = {"-gan": "group_size", "-gaw": "neighbor_window", "--schedule": "schedule"}
    given = {
        names[flag]: value if flag == "--schedule" else int(value)
        for flag, value in zip(parameters[::2], parameters[1::2], strict=True)
    }
    assert facts["longest_context"] == longest_context(256, **given)
    assert facts["n_ctx"] == default_context(256, **given)
    assert facts["sensible_context"]["n_ctx"] <= max(256, facts["longest_context"])


def test_help_names_the_default_distances():
    assert "3/4 of the trained context" in " ".join(invoke("run", "--help").stdout.split())


def test_a_prompt_that_looks_like_an_option_is_no_option():
    result = invoke("run", "/nonexistent.gguf", "-p", "-v")
    assert (result.exit_code, result.stderr) == (1, "Error: Model path does not exist: /nonexistent.gguf\n")
    assert isinstance(invoke("run", "/nonexistent.gguf", "hello", "-v").exception, ModelFileError)


def test_llama_cpps_reason_is_given_when_it_loads_no_model(tmp_path):
    for field, value, reason in (
        ("general.architecture", "nonsense", "unknown model architecture: 'nonsense'"),
        (None, None, "check_tensor_dims: tensor 'output_norm.weight' not found"),
    ):
        path = tmp_path / f"{field}.gguf"
        shape = LlamaShape(arch=value or "llama", n_layer=1)
        tensors = random_tensors(shape, seed=0)
        if field is None:
            del tensors["output_norm.weight"]
        write_llama(path, shape, tensors)
        result = invoke("run", str(path), "hello")
        assert result.exit_code == 1
        assert result.stderr == f"Error: Failed to load model from file: {path}: {reason}\n"


def test_a_run_opens_the_file_twice_and_plans_once(monkeypatch, task):
    """The vocabulary for the prompt's length, then the weights."""
    loaded, planned = [], []
    load, make_plan = internals.LlamaModel.__init__, planning.plan

    def noted(self, *, path_model, params, verbose=True):
        loaded.append(params.vocab_only)
        load(self, path_model=path_model, params=params, verbose=verbose)

    def counted(*arguments, **parameters):
        planned.append(arguments)
        return make_plan(*arguments, **parameters)

    monkeypatch.setattr(internals.LlamaModel, "__init__", noted)
    monkeypatch.setattr(planning, "plan", counted)
    assert invoke("run", MODEL, task.prompt, "-n", "1").exit_code == 0
    assert loaded == [True, False]
    assert planned == [(256, 1280)]


def test_info_within_the_trained_context():
    assert "not needed: 200 tokens fit" in invoke("info", MODEL, "-c", "200").stdout


def test_info_refuses_what_run_would_refuse():
    result = invoke("info", MODEL, "-c", "4096", "-gan", "3")
    assert result.exit_code == 1
    assert "take a group size of at least" in result.stderr


def test_demo():
    result = invoke("demo", "--times", "4")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert re.search(r"with Self-Extend +(\d{5}) +yes", result.stdout)
    assert re.search(r"plain llama.cpp +.* no", result.stdout)
    assert any(re.fullmatch(r" +.*The \w+ key is \d{5}\.", line) for line in lines)


def test_bench_reports_ratios():
    result = invoke("bench", "--length", "1024", "-n", "4", "--repeat", "1", "--json")
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)
    for part in ("read", "generate"):
        assert numbers[part]["ratio"] == pytest.approx(
            numbers[part]["extended_seconds"] / numbers[part]["plain_seconds"]
        )
    assert numbers["extended_peak"] > 2**20
    assert 0 < numbers["file_seconds"] < numbers["resume_seconds"] < numbers["read"]["extended_seconds"]
    assert 0 < numbers["rewrite_share"] < 1
    assert numbers["own_programs"] == {}


def test_bench_prints_tables():
    flags = ("bench", "--length", "512", "-n", "1", "--repeat", "1", "-t", "1", "-o")
    table = list(csv.DictReader(invoke(*flags, "csv").stdout.splitlines()))
    names = ["read 512 tokens", "then 1 one by one", "rewriting keys", "or from a prompt cache"]
    names += ["its file alone", "peak memory"]
    assert [row["measured"] for row in table] == names
    for row in (table[0], table[1], table[-1]):
        assert float(row["ratio"]) == pytest.approx(float(row["Self-Extend"]) / float(row["llama.cpp"]))
    assert {row["model"] for row in table} == {TINY_MODEL.name}
    head, line, *rows = [row.split("|")[1:-1] for row in invoke(*flags, "md").stdout.splitlines()]
    assert [cell.strip() for cell in head] == list(table[0])
    assert all(set(cell) <= set("-:") for cell in line)
    assert [row[1].strip() for row in rows] == names


PROGRAM = """#!{python}
import json, sys, time
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv) + "\\n")
time.sleep(0.05)
print({output!r})
print("one line\\nand another", file=sys.stderr)
sys.exit({status})
"""


def own_program(folder: Path, name: str, output: str, status: int = 0) -> tuple[Path, Path]:
    """A program in place of one of llama.cpp's, which notes its arguments; and the file of its notes."""
    path, log = folder / name, folder / f"{name}.log"
    path.write_text(PROGRAM.format(python=sys.executable, log=str(log), output=output, status=status))
    path.chmod(0o755)
    return path, log


def test_bench_compares_with_llama_cpps_own_programs(tmp_path):
    bench, bench_log = own_program(tmp_path, "llama-bench", '[{"avg_ns": 250000000}]')
    completion, completion_log = own_program(tmp_path, "llama-completion", "")
    flags = ("--length", "512", "-n", "3", "--repeat", "2", "-t", "1", "-fa", "on", "-ctk", "q8_0", "--json")
    result = invoke("bench", *flags, "--llama-bench", str(bench), "--llama-completion", str(completion))
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)
    theirs = numbers["own_programs"]
    assert [*theirs] == [
        "read, llama-bench",
        "generate, llama-bench",
        "run, llama-completion",
        "load, llama-completion",
    ]
    for name in ("read", "generate"):
        assert theirs[f"{name}, llama-bench"]["plain_seconds"] == 0.25
        assert theirs[f"{name}, llama-bench"]["extended_seconds"] == numbers[name]["extended_seconds"]
    for name in ("run", "load"):
        pair = theirs[f"{name}, llama-completion"]
        assert pair["plain_seconds"] >= 0.05
        assert pair["extended_seconds"] > 0.1  # a whole process of ours

    def options(line: str) -> dict[str, str]:
        arguments = json.loads(line)[1:]
        return dict(zip(arguments, [*arguments[1:], ""], strict=True))

    read, generate = map(options, bench_log.read_text().splitlines()[:2])
    assert (read["-p"], read["-n"], generate["-p"], generate["-n"], generate["-d"]) == ("512", "0", "0", "3", "512")
    for given in (read, generate):
        assert (given["-m"], given["-t"], given["-fa"]) == (str(TINY_MODEL), "1", "1")
        assert (given["-ctk"], given["-ctv"], given["-r"]) == ("q8_0", "f16", "1")
    lines = [options(line) for line in completion_log.read_text().splitlines()]
    assert len(lines) == 4
    assert [line["-n"] for line in lines] == ["3", "1", "3", "1"]
    assert all((line["-c"], line["-fa"], line["-ctk"]) == ("768", "on", "q8_0") for line in lines)


@pytest.mark.parametrize(
    ("output", "status", "words"),
    [("", 3, "failed (3): one line and another"), ("no JSON", 0, "printed no measurement of llama-bench")],
)
def test_bench_says_why_another_program_did_not_measure(output, status, words, tmp_path):
    path, _ = own_program(tmp_path, "llama-bench", output, status)
    flags = ("--length", "512", "-n", "1", "--repeat", "1", "-t", "1")
    result = invoke("bench", *flags, "--llama-bench", str(path))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {path} ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_bench_looks_for_other_programs_before_it_measures(tmp_path):
    result = invoke("bench", "--llama-completion", str(tmp_path / "nothing"))
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (
        2,
        f"Error: Invalid value for '--llama-completion': File '{tmp_path / 'nothing'}' does not exist.",
    )
    program, _ = own_program(tmp_path, "llama-completion", "")
    result = invoke("bench", "--llama-completion", str(program), "--pretend-trained", "128")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (
        2,
        "Error: give --pretend-trained or --llama-completion, not both",
    )


@pytest.mark.parametrize("name", SHAPES)
def test_info_of_other_architectures(model, name):
    facts = json.loads(invoke("info", str(model(name)), "--json").stdout)
    assert facts["architecture"] == SHAPES[name].arch
    assert facts["extendable"]


def test_a_key_path_that_is_not_recognised_is_refused_in_one_line_before_reading(model):
    path = str(model("hunyuan-dense"))
    reason = "layer 0 passes its rotated keys through MUL, which Self-Extend does not know how to undo"
    result = invoke("run", path, "x" * 100, "-n", "4")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"Error: {reason}\n")
    assert invoke("run", path, "x" * 10, "-n", "4").exit_code == 0  # within its trained context it is plain llama.cpp

    facts = json.loads(invoke("info", path, "--json").stdout)
    assert not facts["extendable"]
    assert facts["explanation"] == f"not possible: {reason}"
    assert facts["longest_context"] == facts["n_ctx_train"]


@pytest.mark.parametrize(("name", "rewritten"), [("gemma3", "1 of 6"), ("smollm3", "3 of 4"), ("llama4", "0 of 4")])
def test_info_counts_the_layers_that_are_rewritten(model, name, rewritten):
    result = invoke("info", str(model(name)))
    assert re.search(rf"Rewritten layers: +{rewritten}\n", result.stdout)
    assert ("layers with RoPE look back a window only" in result.stdout) == rewritten.startswith("0")


def test_keys_of_few_bits_are_warned_of_in_one_line(model):
    result = invoke("run", str(model("gemma2")), "x" * 100, "-c", "512", "-n", "1", "-ctk", "q4_0")
    assert result.exit_code == 0
    assert re.fullmatch(r"Warning: reading 512 tokens .* use q8_0 or f16 keys\n", result.stderr)


def test_llama_cpps_reason_is_given_when_it_makes_no_context(model):
    result = invoke("run", str(model("deepseek2 (MLA)")), "x" * 100, "-ctk", "q8_0", "-n", "1")
    assert result.exit_code == 1
    assert "model does not support different K (q8_0) and V (f16) cache types" in result.stderr


# ---- start -----------------------------------------------------------------------------------------------------------


def test_the_list_of_commands_says_what_they_say_themselves():
    for name, command in main.commands.items():
        assert (command.name, main.commands.help_lines[name]) == (name, command.get_short_help_str(80))
    with pytest.raises(TypeError):
        main.commands["other"] = main.commands["run"]


def test_a_help_needs_neither_llama_cpp_nor_numpy():
    code = (
        "import sys\nfrom selfextend_gguf.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    print({'llama_cpp', 'numpy', 'jinja2'} & set(sys.modules))"
    )
    assert run_python(code).stdout.endswith("set()\n")
