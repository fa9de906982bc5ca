"""Commands whose modules are imported when they are used: llama.cpp and numpy take longer than printing a help."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module

import click

from .settings import let_variables_set

MODULES = {"eval": "evaluate"}  # of commands that have another name than their module and function


class LazyCommands(MutableMapping[str, click.Command]):
    """The commands of the program by name. Each takes its options from environment variables as well."""

    def __init__(self, help_lines: Mapping[str, str]) -> None:
        """`help_lines`: of all commands, in their order; tests see that they are the commands' own."""
        self.help_lines = dict(help_lines)
        self._loaded: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self.help_lines:
            raise KeyError(name)
        if name not in self._loaded:
            module = MODULES.get(name, name)
            command: click.Command = getattr(import_module(f"{__package__}.{module}"), module)
            let_variables_set(command, name)
            self._loaded[name] = command
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.help_lines)

    def __len__(self) -> int:
        return len(self.help_lines)

    def __contains__(self, name: object) -> bool:
        return name in self.help_lines

    def __setitem__(self, name: str, command: click.Command) -> None:
        raise TypeError("the commands of the program are fixed")

    def __delitem__(self, name: str) -> None:
        raise TypeError("the commands of the program are fixed")
