"""The flags of `run` and `chat` that llama.cpp has too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from click.testing import CliRunner, Result

from selfextend_gguf.cli import main
from selfextend_gguf.models import TINY_MODEL

PROMPT = "The king is in the castle. The king is"
GREEDY = ("--temp", "0")


def run(*flags: str) -> Result:
    """A run of 24 tokens with a fixed seed."""
    command = ["run", str(TINY_MODEL), PROMPT, "-n", "24", "-t", "1", "--raw", "--seed", "7", *flags]
    return CliRunner().invoke(main, command)


def text(*flags: str) -> str:
    result = run(*flags)
    assert result.exit_code == 0, result.stderr
    return result.stdout.removesuffix("\n")


@pytest.mark.parametrize(
    ("flags", "sampling", "loading"),
    [
        (["--typical", "0.3"], {"typical_p": 0.3}, {}),
        (["--presence-penalty", "3"], {"presence_penalty": 3.0}, {}),
        (["--frequency-penalty", "2"], {"frequency_penalty": 2.0}, {}),
        (["--repeat-penalty", "2", "--repeat-last-n", "3"], {"repeat_penalty": 2.0}, {"last_n_tokens_size": 3}),
        (["--mirostat", "1", "--mirostat-ent", "0.5"], {"mirostat_mode": 1, "mirostat_tau": 0.5}, {}),
        (["--mirostat", "2", "--mirostat-lr", "0.9"], {"mirostat_mode": 2, "mirostat_eta": 0.9}, {}),
    ],
)
def test_a_sampler_is_llama_cpps_own(flags: list[str], sampling: dict[str, Any], loading: dict[str, Any]):
    llm = llama_cpp.Llama(str(TINY_MODEL), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, **loading)
    defaults = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0}
    expected: Any = llm.create_completion(PROMPT, max_tokens=24, seed=7, **(defaults | sampling))
    assert text(*flags) == expected["choices"][0]["text"]
    assert text(*flags) != text()  # the flag does something


def test_a_bias_and_no_end():
    assert text("--logit-bias", "65+1000") == "A" * 24
    assert "A" not in text("--logit-bias", "65+1000", "--logit-bias", "65-inf")
    model = llama_cpp.Llama(str(TINY_MODEL), vocab_only=True, verbose=False)
    assert text("--logit-bias", f"{model.token_eos()}+1000") == ""
    assert text("--logit-bias", f"{model.token_eos()}+1000", "--ignore-eos") != ""


def test_grammars_and_schemas(tmp_path: Path):
    (tmp_path / "g").write_text('root ::= "from a file"')
    (tmp_path / "s").write_text('{"const": 12}')
    assert text("--grammar", 'root ::= "yes" | "no"') in ("yes", "no")
    assert text("--grammar-file", str(tmp_path / "g")) == "from a file"
    assert json.loads(text("-j", '{"enum": ["left", "right"]}')) in ("left", "right")
    assert text("-jf", str(tmp_path / "s")) == "12"
    assert text("-j", "{}").startswith("{")


def test_guessing_ahead_changes_no_answer():
    assert text(*GREEDY, "--draft", "lookup") == text(*GREEDY)


def test_flags_of_loading_change_no_answer():
    assert text(*GREEDY, "-fa", "off", "--no-mmap") == text(*GREEDY)


def test_a_system_message_from_a_file(tmp_path: Path):
    (tmp_path / "system").write_text("You are a poet.")

    def n_read(*flags: str) -> int:
        return int(json.loads(text("--json", *flags))["prompt_tokens"])

    assert n_read("-sysf", str(tmp_path / "system")) == n_read("--system", "You are a poet.") > n_read()


def test_chat_takes_the_same_flags():
    command = ["chat", str(TINY_MODEL), "-n", "8", "-t", "1", "-c", "256", "--grammar", 'root ::= "so be it"']
    assert "so be it" in CliRunner().invoke(main, command, input="Hello\n").stdout


def test_a_grammar_that_is_none():
    result = run("--grammar", "root ::= (")  # llama.cpp's parser itself prints where it failed, before that
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: llama.cpp cannot parse the grammar") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--logit-bias", "A+1"], "must be like"),
        (["--logit-bias", "3+1.2.3"], "must be like"),
        (["--logit-bias", "99999+1"], "logit_bias"),
        (["--presence-penalty", "nan"], "presence_penalty"),
        (["--mirostat", "3"], "--mirostat"),
        (["--grammar", "a", "-j", "{}"], "not both"),
        (["-j", "{"], "no JSON"),
        (["-jf", "/nowhere"], "/nowhere"),
        (["--lora", "/nowhere"], "/nowhere"),
        (["--lora-scaled", "adapter.gguf"], "--lora-scaled must be like"),
        (["--lora-scaled", "adapter.gguf:nan"], "lora_scale"),
        (["--draft", "other"], "--draft"),
        (["--system", "a", "-sysf", "b"], "not both"),
    ],
)
def test_bad_values(one_line_error, flags: list[str], message: str):
    assert message in one_line_error("run", str(TINY_MODEL), "text", "-n", "4", *flags)


# ---- -n -1 -----------------------------------------------------------------------------------------------------------

FULL = "The context of 256 tokens is full: a larger --ctx makes room.\n"


def test_answers_go_on_until_the_model_ends_or_the_context_is_full():
    ends = run("-n", "-1", "--grammar", f'root ::= "{"a" * 300}"')  # more than the 256 tokens of no -n
    assert (ends.exit_code, ends.stdout, ends.stderr) == (0, "a" * 300 + "\n", "")
    full = run("-n", "-1", "-c", "256", "--ignore-eos", "--json")
    record = json.loads(full.stdout)
    assert (full.exit_code, full.stderr, record["finish_reason"]) == (0, FULL, "length")
    assert record["prompt_tokens"] + record["generated_tokens"] == record["n_ctx"] == 256
    assert run("-n", "1000", "-c", "256", "--ignore-eos").stderr == FULL
    assert run("-n", "4", "-c", "256").stderr == ""


def test_chats_go_on_too():
    command = ["chat", str(TINY_MODEL), "-n", "-1", "-t", "1", "-c", "512", "--ignore-eos", "--raw"]
    result = CliRunner().invoke(main, command, input="Hello\n")
    assert result.stderr == "The context is full: /undo, /clear or a larger --ctx make room.\n"
    assert len(result.stdout) > 500 - len("Hello")  # a token is a byte


@pytest.mark.parametrize("number", ["0", "-2", "many"])
def test_other_numbers_are_refused(one_line_error, number: str):
    assert number in one_line_error("run", str(TINY_MODEL), "text", "-n", number)
