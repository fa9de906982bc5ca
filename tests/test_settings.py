"""Options from environment variables and a file, and completion in a shell."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pexpect
import pytest
from click.testing import CliRunner, Result

from selfextend_gguf.cli import main
from selfextend_gguf.cli.settings import key_of, leaves, settable, settings_file, variables
from selfextend_gguf.models import TINY_MODEL

COMMAND = str(Path(sys.executable).with_name("sx-gguf"))
MODEL = str(TINY_MODEL)
FACT = "The stone key is 57901. What is the stone key? The stone key is "
GIVE_UP = 60  # seconds


def sx_gguf(*arguments: str, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(main, list(arguments))


def answer(*arguments: str, **environment: str) -> str:
    result = sx_gguf("run", MODEL, FACT, "-t", "1", *arguments, **environment)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture
def settings(tmp_path):
    """Writes a file of settings, for its path."""

    def write(text: str | bytes) -> str:
        file = tmp_path / "config.toml"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(file)

    return write


def test_what_is_nearer_comes_first(settings):
    assert answer(SX_GGUF_CONFIG=settings("predict = 1\ntemp = 0")) == "5\n"
    file = settings("predict = 1\ntemp = 0\n[run]\npredict = 2\n[chat]\npredict = 9")
    assert answer(SX_GGUF_CONFIG=file) == "57\n"
    assert answer(SX_GGUF_CONFIG=file, SX_GGUF_PREDICT="3") == "579\n"
    assert answer(SX_GGUF_CONFIG=file, SX_GGUF_PREDICT="3", SX_GGUF_RUN_PREDICT="4") == "5790\n"
    assert answer("-n", "5", SX_GGUF_CONFIG=file, SX_GGUF_PREDICT="3", SX_GGUF_RUN_PREDICT="4") == "57901\n"


def test_a_file_that_tune_wrote_comes_before_the_settings(settings, tmp_path):
    (tmp_path / "tuned.json").write_text('{"group_size": 8}')
    file = settings("group-size = 16\nneighbor-window = 64")
    for arguments, group_size in ([], 16), (["--config", str(tmp_path / "tuned.json")], 8):
        result = sx_gguf("info", MODEL, "-c", "512", "--json", *arguments, SX_GGUF_CONFIG=file)
        config = json.loads(result.stdout)["self_extend"]
        assert (config["group_size"], config["neighbor_window"]) == (group_size, 64)


def test_options_that_exclude_each_other_may_come_from_different_places(settings, tmp_path, model):
    path = str(model("bundled-chat"))
    (tmp_path / "system").write_text("one")
    file = settings('system = "two"\n[run]\npredict = 1')

    def n_read(*arguments: str, **environment: str) -> str:
        result = sx_gguf("run", path, "x", "-t", "1", "--timings", *arguments, SX_GGUF_CONFIG=file, **environment)
        assert result.exit_code == 0, result.stderr
        return result.stderr.split("prompt ")[1].split(" tokens")[0]

    assert n_read("-sysf", str(tmp_path / "system")) == n_read("--system", "one")
    variable = {"SX_GGUF_SYSTEM_PROMPT_FILE": str(tmp_path / "system")}
    assert n_read("--system", "longer", **variable) == n_read("--system", "longer")
    result = sx_gguf("run", path, "x", "--system", "a", "-sysf", str(tmp_path / "system"))
    assert "give --system or -sysf, not both" in result.stderr


def test_every_option_can_be_set_in_both_places(settings):
    for path, command in leaves(main):
        for option in settable(command):
            assert option.envvar == variables(path, option)
            assert all(name.startswith("SX_GGUF_") for name in option.envvar)
    names = [(variables(path, option)[0], path) for path, command in leaves(main) for option in settable(command)]
    assert len(set(names)) == len({name for name, _ in names})
    # At the top of the file a setting is for all commands.
    kinds: dict[str, set[str]] = {}
    for _, command in leaves(main):
        for option in settable(command):
            kinds.setdefault(key_of(option), set()).add(option.type.name.removesuffix(" range"))
    assert not {key for key, kind in kinds.items() if len(kind) > 1}
    # Lists and switches too; nothing is asked to be what it is not.
    file = settings('json = true\nagainst = ["yarn"]\n[run]\nfile = ["a", "b"]\nlogit-bias = "1+2"\nflash-attn = "on"')
    result = sx_gguf("info", MODEL, SX_GGUF_CONFIG=file)
    assert result.stdout.startswith("{")
    result = sx_gguf("info", MODEL, SX_GGUF_INFO_JSON="1")
    assert result.stdout.startswith("{")
    result = sx_gguf("info", MODEL, SX_GGUF_INFO_JSON="0", SX_GGUF_JSON="1")
    assert result.stdout.startswith("Model:")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("tempp = 1", "FILE: no command has an option tempp"),
        ("ctk = 'f16'", "FILE: no command has an option ctk"),
        ("[eval.ppl]\nchunks = 3", "FILE: sx-gguf eval ppl has no option chunks"),
        ("[eval]\ntexts = 3", "FILE: sx-gguf eval has no option texts"),
        ("run = 3", "FILE: run must be a table of settings, [run]"),
        ("[eval]\nppl = 3", "FILE: eval.ppl must be a table of settings, [eval.ppl]"),
        ("threads = 1.5", "FILE: threads must be a whole number, not 1.5"),
        ("threads = true", "FILE: threads must be a whole number, not True"),
        ("threads = []", "FILE: threads must be a whole number, not []"),
        ("[run]\ntemp = '1'", "FILE: run.temp must be a number, not '1'"),
        ("[run]\nraw = 1", "FILE: run.raw must be true or false, not 1"),
        ("file = ['a', 3]", "FILE: file must be a text, or a list of them, not ['a', 3]"),
        ("[info]\nctx = 0", "FILE: ctx: 0 is not in the range x>=1."),
        ("cache-type-k = 'z'", "FILE: cache-type-k: 'z' is not one of 'f32', 'f16'"),
        ("x = [", "FILE is no TOML: "),
        ("x = " + "[" * 10000, "FILE is no TOML: "),
        (b"\xff", "FILE is no TOML: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_bad_settings_are_a_line(settings, text, error):
    file = settings(text)
    result = sx_gguf("info", MODEL, SX_GGUF_CONFIG=file)
    assert result.exit_code != 0
    assert result.stderr.startswith("Error: " + error.replace("FILE", file))
    assert result.stderr.count("\n") == 1


def test_files_that_cannot_be_read_are_a_line(tmp_path):
    for file in tmp_path / "none", tmp_path:
        result = sx_gguf("info", MODEL, SX_GGUF_CONFIG=str(file))
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: [Errno ")
        assert result.stderr.endswith(f"'{file}'\n")


def test_bad_variables_are_a_line_that_names_them():
    for name, value, error in [
        ("SX_GGUF_CTX", "many", "'many' is not a valid integer range."),
        ("SX_GGUF_INFO_CTX", "0", "0 is not in the range x>=1."),
        ("SX_GGUF_JSON", "perhaps", "'perhaps' is not a valid boolean"),
    ]:
        result = sx_gguf("info", MODEL, **{name: value})
        assert result.exit_code == 2
        assert result.stderr.startswith(f"Error: {name}: {error}")
        assert result.stderr.count("\n") == 1


def test_no_settings_are_no_error(monkeypatch, tmp_path):
    monkeypatch.delenv("SX_GGUF_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings_file().is_relative_to(tmp_path)
    assert sx_gguf("info", MODEL).stdout.startswith("Model:")
    settings_file().parent.mkdir(parents=True, exist_ok=True)
    settings_file().write_text("json = true")
    assert sx_gguf("info", MODEL).stdout.startswith("{")
    assert sx_gguf("info", MODEL, SX_GGUF_CONFIG="").stdout.startswith("{")


def test_help_shows_what_is_set(settings):
    result = sx_gguf("run", "--help", SX_GGUF_CONFIG=settings("temp = 0.25"))
    assert "0.25" in result.stdout.split("--temp")[1].split("--top-k")[0]


# ---- completion ------------------------------------------------------------------------------------------------------


def test_scripts_for_each_shell():
    for shell, word in ("bash", "complete -o nosort"), ("zsh", "#compdef sx-gguf"), ("fish", "complete --no-files"):
        result = sx_gguf("completion", shell)
        assert result.exit_code == 0
        assert word in result.stdout
    assert sx_gguf("completion", "tcsh").exit_code == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_takes_the_script(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = sx_gguf("completion", shell).stdout
    done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, timeout=GIVE_UP)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(COMMAND).parent), prepend=":")
    (tmp_path / "a-model.gguf").touch()
    shell = pexpect.spawn("bash", ["--norc"], encoding="utf-8", timeout=GIVE_UP, dimensions=(30, 160))
    shell.sendline("PS1='$ '; bind 'set enable-bracketed-paste off'; eval \"$(sx-gguf completion bash)\"; echo re''ady")
    shell.expect("ready")
    for typed, completed in [
        ("sx-gguf ru", "sx-gguf run "),
        ("sx-gguf eval pp", "sx-gguf eval ppl "),
        ("sx-gguf run a-m", "sx-gguf run a-model.gguf "),
        ("sx-gguf run a-model.gguf --repeat-p", "--repeat-penalty "),
        ("sx-gguf run a-model.gguf --reasoning h", "--reasoning hide "),
    ]:
        shell.send(typed + "\t")
        shell.expect_exact(completed)
        shell.send("\x15")  # an empty line
    shell.close(force=True)


def test_options_are_known_by_their_long_flag():
    @click.command()
    @click.option("-x", "--long-name", "--other", "name")
    def command(name: str) -> None: ...

    assert [key_of(option) for option in settable(command)] == ["long-name"]
