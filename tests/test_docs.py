"""The documentation names every command and option, and CI runs the command that the README gives."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from selfextend_gguf.cli import main
from selfextend_gguf.cli.chat import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_help_an_example_and_a_place_in_the_readme(name):
    command = main.commands[name]
    assert command.help
    assert re.search(r"Examples?:\n +sx-gguf " + name, command.help)
    assert f"sx-gguf {name}" in README
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.name


def test_every_option_of_run_is_in_the_readme():
    for option in main.commands["run"].params:
        if isinstance(option, click.Option):
            assert any(f"`{name}" in README for name in option.opts), option.opts


def test_every_command_of_a_chat_is_in_the_readme():
    section = README.split("### Chat\n")[1].split("\n### ")[0]
    for name, command in COMMANDS.items():
        assert f"`/{name} {command.argument}".rstrip() + "`" in section


def test_ci_runs_the_readmes_test_command():
    commands = re.findall(r"^```sh\n(.*?)\n```", README, re.M | re.S)
    assert commands[0].endswith("sx-gguf demo")
    assert commands[1].endswith("pytest")
    assert "README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_readme_has_no_unfilled_places():
    assert not re.findall(r"\b[A-Z]+_(?:TABLE|OUTPUT|NUMBERS|MINUTES)\b", README)


def test_the_error_table_covers_every_status_of_the_library():
    from selfextend_gguf import _native

    header = (ROOT / "native" / "selfextend.h").read_text(encoding="utf-8")
    codes = {name: int(code) for name, code in re.findall(r"SX_(OK|ERR_\w+) += +(-?\d+),", header)}
    assert codes == {status.name: status.value for status in _native.Status}
    assert set(_native._ERRORS) == set(_native.Status) - {_native.Status.OK, _native.Status.ERR_ABORTED}
