"""Write the second part of docs/cli.md, the --help of every command and what can be set elsewhere:

python tests/cli_reference.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from selfextend_gguf.cli import main
from selfextend_gguf.cli.settings import key_of, leaves, settable, variables

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
BEGIN = "<!-- From here on written by `python tests/cli_reference.py`. -->\n"
ABOUT_SETTINGS = """\
As a key of the file of settings, and as an environment variable for all commands that have the option. For one command
alone the variable has its name as well, as in `SX_GGUF_RUN_TEMP` or `SX_GGUF_EVAL_PPL_TEXTS`
([configuration.md](configuration.md))."""
WIDTH = 100  # columns, however wide the terminal is


def commands(command: click.Command = main, name: str = "sx-gguf") -> Iterator[tuple[str, click.Command]]:
    """A command and those below it, each with its whole name, as in "sx-gguf eval ppl"."""
    yield name, command
    if isinstance(command, click.Group):
        for child_name, child in command.commands.items():
            yield from commands(child, f"{name} {child_name}")


def help_of(name: str, command: click.Command) -> str:
    """What `--help` prints in a terminal of WIDTH columns."""
    context = click.Context(command, info_name=name, terminal_width=WIDTH, **main.context_settings)
    lines = command.get_help(context).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def settings_table() -> str:
    """Every option that can be set elsewhere, and where."""
    found: dict[str, tuple[str, list[str]]] = {}
    for path, command in leaves(main):
        for option in settable(command):
            *_, variable = variables(path, option)
            found.setdefault(key_of(option), (variable, []))[1].append(" ".join(path))
    rows = ["| setting | variable | commands |", "|---|---|---|"]
    for key, (variable, names) in sorted(found.items()):
        rows.append(f"| `{key}` | `{variable}` | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(rows)


def document(current: str) -> str:
    """The text of docs/cli.md with the help of today below the part written by hand."""
    by_hand = current.partition(BEGIN)[0]
    sections = [f"## {name}\n\n```\n{help_of(name, command)}\n```\n" for name, command in commands()]
    sections.append(f"## Settings\n\n{ABOUT_SETTINGS}\n\n{settings_table()}\n")
    return by_hand + BEGIN + "\n" + "\n".join(sections)


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
