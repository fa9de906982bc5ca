"""The flags of `run` and `chat` that llama.cpp has too."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import llama_cpp._internals as internals
import pytest
from click.testing import CliRunner, Result
from helpers import write_adapter

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


class Chained(llama_cpp.Llama):
    """llama_cpp's own, with a chain in the order of llama.cpp's tools."""

    def __init__(self, **numbers: Any) -> None:
        super().__init__(str(TINY_MODEL), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
        self.numbers = SimpleNamespace(
            **{
                "temp": 0.8,
                "dry": (0.0, 1.75, 2, 512),
                "top_n_sigma": -1.0,
                "xtc": (0.0, 0.1),
                "dynatemp": (0.0, 1.0),
                "order": None,
            }
            | numbers
        )

    def _init_sampler(self, **_: Any) -> internals.LlamaSampler:
        numbers, sampler = self.numbers, internals.LlamaSampler()
        add = {
            "dry": lambda: sampler.add_dry(self._model, *numbers.dry, ["\n", ":", '"', "*"]),
            "top_n_sigma": lambda: sampler.add_top_n_sigma(numbers.top_n_sigma),
            "top_k": lambda: sampler.add_top_k(40),
            "top_p": lambda: sampler.add_top_p(0.95, 1),
            "min_p": lambda: sampler.add_min_p(0.05, 1),
            "xtc": lambda: sampler.add_xtc(*numbers.xtc, 1, self._seed),
            "temperature": lambda: sampler.add_temp_ext(numbers.temp, *numbers.dynatemp),
        }
        for name in ("dry",) if numbers.temp == 0 else numbers.order or add:
            add[name]()
        if numbers.temp == 0:
            sampler.add_greedy()
        else:
            sampler.add_dist(self._seed)
        return sampler


@pytest.mark.parametrize(
    ("flags", "numbers"),
    [
        ([], {}),
        (["--top-nsigma", "0.2"], {"top_n_sigma": 0.2}),
        (["--xtc-probability", "0.9", "--xtc-threshold", "0.05"], {"xtc": (0.9, 0.05)}),
        (["--dynatemp-range", "0.8", "--dynatemp-exp", "0.5"], {"dynatemp": (0.8, 0.5)}),
        (["--dry-multiplier", "3", "--dry-base", "2", "--dry-allowed-length", "1"], {"dry": (3.0, 2.0, 1, 512)}),
        (["--dry-multiplier", "9", "--dry-penalty-last-n", "40", *GREEDY], {"dry": (9.0, 1.75, 2, 40), "temp": 0}),
        (["--dry-multiplier", "9", *GREEDY], {"dry": (9.0, 1.75, 2, 512), "temp": 0}),
        (["--temp", "3", "--samplers", "temp;top-k;top_p"], {"temp": 3.0, "order": ("temperature", "top_k", "top_p")}),
        (
            ["--temp", "3", "--samplers", "top_p;temperature;min_p"],
            {"temp": 3.0, "order": ("top_p", "temperature", "min_p")},
        ),
        (
            ["--temp", "3", "--samplers", "xtc;top_k", "--xtc-probability", "1"],
            {"xtc": (1.0, 0.1), "order": ("xtc", "top_k")},
        ),
    ],
)
def test_more_samplers_are_llama_cpps_own(flags: list[str], numbers: dict[str, Any]):
    long = ("-n", "96")  # enough for repetitions
    expected: Any = Chained(**numbers).create_completion(PROMPT, max_tokens=96, seed=7)
    assert text(*long, *flags) == expected["choices"][0]["text"]
    if flags:
        assert text(*long, *flags) != text(*long, *flags[-2:] if "--temp" in flags else ())  # the flag does something


def test_texts_that_end_repetitions():
    flags = ("-n", "96", "--temp", "0", "--dry-multiplier", "9")
    assert text(*flags, "--dry-sequence-breaker", " ") != text(*flags)
    assert text(*flags, "--dry-sequence-breaker", "none") == text(*flags, "--dry-sequence-breaker", "~")


def test_more_samplers_beside_a_grammar_and_a_schema():
    flags = ("--top-nsigma", "0.1", "--xtc-probability", "0.5", "--dry-multiplier", "1", "--dynatemp-range", "0.3")
    assert set(text(*flags, "--grammar", "root ::= [ab]*")) <= set("ab")
    assert json.loads(text(*flags, "-j", '{"enum": ["left", "right"]}')) in ("left", "right")
    assert text(*flags, "-n", "8", "--logit-bias", "65+1000") == "A" * 8  # a few more, and the repetition is broken
    assert text(*flags, "--mirostat", "2")
    assert set(text("--samplers", "xtc;temp;dry", "--grammar", "root ::= [ab]*", *flags)) <= set("ab")
    assert text("--samplers", "", *GREEDY) == text(*GREEDY)


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


def test_adapters(tmp_path: Path):
    first, same = (str(write_adapter(tmp_path / name)) for name in ("a", "b:c"))
    changed = text(*GREEDY, "--lora-scaled", f"{first}:4")
    assert changed != text(*GREEDY)
    assert text(*GREEDY, "--lora-scaled", f"{first}:3", "--lora", same) == changed
    assert text(*GREEDY, "--lora-scaled", f"{first}:3", "--lora-scaled", f"{same}:-3") == text(*GREEDY)


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
        (["--top-nsigma", "nan"], "top_n_sigma"),
        (["--xtc-threshold", "2"], "--xtc-threshold"),
        (["--dynatemp-exp", "inf"], "dynatemp_exponent"),
        (["--dry-base", "1e40"], "dry_base"),
        (["--samplers", "top_k;top_q"], "samplers: there is no 'top_q', but penalties, dry"),
        (["--samplers", "temp;temperature"], "samplers names temperature twice"),
        (["--dry-penalty-last-n", "9999999999"], "dry_penalty_last_n"),
        (["--grammar", "a", "-j", "{}"], "not both"),
        (["-j", "{"], "no JSON"),
        (["-jf", "/nowhere"], "/nowhere"),
        (["--lora", "/nowhere"], "/nowhere"),
        (["--lora-scaled", "adapter.gguf"], "--lora-scaled must be like"),
        (["--lora-scaled", "adapter.gguf:nan"], "adapters['adapter.gguf'] must be a finite number, not nan"),
        (["--lora", "a", "--lora-scaled", "a:2"], "an adapter is given twice"),
        (["--lora-scaled", ":2"], "--lora-scaled must be like"),
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


def test_answers_of_chats_end_with_the_model(model: Any):
    def said(path: str, *flags: str) -> Result:
        command = ["chat", path, "-t", "1", "-c", "512", "--grammar", f'root ::= "{"a" * 300}"', *flags]
        return CliRunner().invoke(main, command, input="Hello\n")

    with_template = str(model("bundled-chat"))
    ends = said(with_template)
    assert (ends.exit_code, ends.stdout, ends.stderr) == (0, "a" * 300 + "\n", "")
    assert said(with_template, "-n", "8").stderr == "The answer was cut after 8 tokens (-n).\n"
    assert said(with_template, "--raw").stdout == said(str(TINY_MODEL)).stdout == "a" * 256 + "\n"


def test_chats_go_on_too():
    command = ["chat", str(TINY_MODEL), "-n", "-1", "-t", "1", "-c", "512", "--ignore-eos", "--raw"]
    result = CliRunner().invoke(main, command, input="Hello\n")
    assert result.stderr == "The context is full: /undo, /clear or a larger --ctx make room.\n"
    assert len(result.stdout) > 500 - len("Hello")  # a token is a byte


@pytest.mark.parametrize("number", ["0", "-2", "many"])
def test_other_numbers_are_refused(one_line_error, number: str):
    assert number in one_line_error("run", str(TINY_MODEL), "text", "-n", number)
