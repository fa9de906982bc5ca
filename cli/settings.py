"""Options from elsewhere than the command line: environment variables, and a file of settings.

Both name an option as its long flag does: --top-k is SX_GGUF_TOP_K, SX_GGUF_RUN_TOP_K for `run` alone, and `top-k` in
the file, at the top or in the table of a command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from selfextend_gguf.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

FILE_VARIABLE = "SX_GGUF_CONFIG"  #: names another file, and therefore no option
_PREFIX = "SX_GGUF"
_SOURCES = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)  # the first wins
_ASK_SOMETHING_ELSE = ("help", "version")

# What a value of TOML must be, by click's name of the option's type; whatever is not here is a text.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "boolean": ((bool,), "true or false"),
    "integer": ((int,), "a whole number"),
    "integer range": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "float range": ((int, float), "a number"),
}
_TEXT = ((str,), "a text")


def key_of(option: click.Parameter) -> str:
    """How users know an option: its first long flag, without the dashes."""
    return next(flag for flag in option.opts if flag.startswith("--")).removeprefix("--")


def settable(command: click.Command) -> Iterator[click.Option]:
    """The options of a command that can be set elsewhere."""
    for option in command.params:
        if isinstance(option, click.Option) and key_of(option) not in _ASK_SOMETHING_ELSE:
            yield option


def leaves(command: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """The commands with options, each with its path from `command`, such as ("eval", "ppl")."""
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from leaves(child, *path, name)
    else:
        yield path, command


def variables(path: tuple[str, ...], option: click.Option) -> list[str]:
    """The environment variables of a command's option: the command's own, and that of all commands."""
    names = ["_".join((_PREFIX, *words, key_of(option))).upper().replace("-", "_") for words in (path, ())]
    return [name for name in names if name != FILE_VARIABLE]


def let_variables_set(command: click.Command, name: str) -> None:
    """Let each option of a command of the program, and of those below it, be given by its environment variables."""
    for path, leaf in leaves(command, name):
        for option in settable(leaf):
            option.envvar = variables(path, option)


# ---- the file --------------------------------------------------------------------------------------------------------


def settings_file() -> Path:
    """Where the settings are, whether or not there are any."""
    from pathlib import Path

    from platformdirs import user_config_path  # neither is for a help

    named = os.environ.get(FILE_VARIABLE)
    return Path(named) if named else user_config_path("sx-gguf") / "config.toml"


def read_settings(group: click.Group) -> dict[str, Any]:
    """The settings, as click's `default_map` for `group`; {} where there is no file. Raises ConfigError, OSError.

    Settings at the top are for all commands that have such an option, those in a command's table come before them.
    """
    file = settings_file()
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        if os.environ.get(FILE_VARIABLE):
            raise
        return {}
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        settings = tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is no TOML: {error}") from error
    tables = {key: value for key, value in settings.items() if key in group.commands}
    top = {key: value for key, value in settings.items() if key not in group.commands}
    found: set[str] = set()
    defaults = _defaults(file, group, tables, top, found, ())
    if unknown := top.keys() - found:
        raise ConfigError(f"{file}: no command has an option {', '.join(sorted(unknown))}")
    return defaults


def _defaults(
    file: Path, command: click.Command, settings: Any, top: dict[str, Any], found: set[str], path: tuple[str, ...]
) -> dict[str, Any]:
    """click's `default_map` for a command; which of `top` it has is added to `found`."""
    name = ".".join(path)
    if not isinstance(settings, dict):
        raise ConfigError(f"{file}: {name} must be a table of settings, [{name}]")
    if isinstance(command, click.Group):
        children, others = command.commands, settings.keys() - command.commands.keys()
        defaults: dict[str, Any] = {
            key: _defaults(file, child, settings.get(key, {}), top, found, (*path, key))
            for key, child in children.items()
        }
    else:
        options = {key_of(option): option for option in settable(command)}
        found |= options.keys() & top.keys()
        others = settings.keys() - options.keys()
        given = {key: (key, value) for key, value in top.items() if key in options}
        given |= {key: (f"{name}.{key}", value) for key, value in settings.items() if key in options}
        defaults = {
            options[key].name or key: _checked(file, whole, options[key], value)
            for key, (whole, value) in given.items()
        }
    if others:
        raise ConfigError(f"{file}: sx-gguf {' '.join(path)} has no option {', '.join(sorted(others))}")
    return defaults


def _checked(file: Path, key: str, option: click.Option, value: Any) -> Any:
    """A value of the kind that its option takes: click would make 1 of true and of 1.5. ConfigError."""
    kinds, words = _KINDS.get(option.type.name, _TEXT)
    values = value if option.multiple and isinstance(value, list) else [value]
    if not all(type(one) in kinds for one in values):
        raise ConfigError(f"{file}: {key} must be {words}{', or a list of them' * option.multiple}, not {value!r}")
    return values if option.multiple else value


def blame(error: click.BadParameter) -> click.UsageError:
    """The error of a bad value, with the variable or file that it came from in place of the flag."""
    option, context = error.param, error.ctx
    if not isinstance(option, click.Option) or option.name is None or context is None:
        return error
    source = context.get_parameter_source(option.name)
    if source == ParameterSource.ENVIRONMENT:
        place = next(name for name in option.envvar or () if os.environ.get(name))
    elif source == ParameterSource.DEFAULT_MAP:
        place = f"{settings_file()}: {key_of(option)}"
    else:
        return error
    return click.UsageError(f"{place}: {error.message}")


def precedence(flag: str, context: click.Context | None = None) -> int:
    """Where a command, by default the running one, has a flag's value from: 0 = typed, and the more the further away.

    What is no flag was typed."""
    context = context or click.get_current_context()
    name = next((option.name for option in context.command.params if flag in option.opts), None)
    source = ParameterSource.COMMANDLINE if name is None else context.get_parameter_source(name)
    return _SOURCES.index(source) if source in _SOURCES else len(_SOURCES)
