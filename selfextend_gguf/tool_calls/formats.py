"""Kinds of formats in which models write calls of tools. `families.py` has the formats themselves.

A call is what names a tool of the request: anything else is text.
"""

from __future__ import annotations

import ast
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

_LONGEST_HEAD = 256  # characters from where a call begins to its JSON
_NAMES = ("name", "tool_name")  # of a function, in JSON
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: str  #: a JSON object


@dataclass(frozen=True)
class Found:
    """Calls at the beginning of a text, of so many characters; () if there are none."""

    calls: tuple[Call, ...]
    length: int = 0


NOTHING = Found(())


Tools = Mapping[str, Mapping[str, Any]]  #: JSON schemas of the parameters, by the names of tools


@dataclass(frozen=True)
class Format(ABC):
    """How calls stand in a text. NAME in marks stands for the name of any tool."""

    name: str
    head: re.Pattern[str]  #: from where a call begins to its arguments; the group "name" has the tool's, if it is there
    begins: tuple[str, ...] = ()  #: marks with which calls begin
    bare: tuple[str, ...] = ()  #: with which they may also begin at the start of an answer, and after other calls
    more: tuple[str, ...] = ()  #: with which they may also begin after other calls
    ends: tuple[str, ...] = ()  #: marks after a call
    before_text: tuple[str, ...] = ()  #: marks at the start of an answer, and after calls
    inner: tuple[str, ...] = ()  #: marks within a call
    signs: tuple[str, ...] = ()  #: texts of prompts for models that write so

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks, which may be control tokens."""
        return (*self.begins, *self.ends, *self.before_text, *self.inner)

    def read(self, text: str, tools: Tools) -> Found | None:
        """The calls with which a text begins that may go on; None if more must come to know."""
        head = self.head.match(text)
        if head is None:
            return None if len(text) < _LONGEST_HEAD else NOTHING
        try:
            found = self._read(text, head, tools)
        except (
            ValueError,
            TypeError,
            SyntaxError,
            RecursionError,
            MemoryError,
        ):  # all that parsing what is none raises
            return NOTHING
        return found if found is None or all(call.name in tools for call in found.calls) else NOTHING

    @abstractmethod
    def _read(self, text: str, head: re.Match[str], tools: Tools) -> Found | None:
        """The same, after the head. Raises ValueError for what is no call."""


def _brackets(*strings: str) -> re.Pattern[str]:
    """Brackets and, before them, strings: of a text, those that are no part of a string."""
    return re.compile("|".join([*strings, r"[{}\[\]]"]), re.DOTALL)


_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'


class JsonFormat(Format):
    """Arguments, or whole calls, are JSON."""

    quotes: ClassVar[tuple[str, ...]] = ('"',)  #: around strings
    brackets = _brackets(_STRING, '"')  #: and strings

    def _read(self, text: str, head: re.Match[str], tools: Tools) -> Found | None:
        end = self._end(text, head.end())
        if end is None:
            return None
        value = self._value(text[head.end() : end])
        if name := head.groupdict().get("name"):
            value = {"name": name, "arguments": value}
        return Found(tuple(_calls_in(value)), end)

    def _end(self, text: str, start: int) -> int | None:
        """Where an object or a list ends that begins at `start`; None if it does not."""
        depth = 0
        for found in self.brackets.finditer(text, start):
            if found[0] in self.quotes:
                return None  # a string that has not ended
            depth += (found[0] in ("{", "[")) - (found[0] in ("}", "]"))
            if depth == 0:
                return found.end()
        return None

    def _value(self, written: str) -> Any:
        """The value of what is written. Raises ValueError."""
        return _json(written)


class GemmaFormat(JsonFormat):
    """Gemma's notation: names of properties are bare, and strings have marks of their own."""

    quotes = ('<|"|>',)
    brackets = _brackets(r'<\|"\|>.*?<\|"\|>', r'<\|"\|>')

    def _value(self, written: str) -> Any:
        parts = written.split(self.quotes[0])  # strings are between every other two
        parts[::2] = [re.sub(r"([{,]\s*)([^\s{}\[\],:]+)\s*:", r'\1"\2":', part) for part in parts[::2]]
        parts[1::2] = [json.dumps(part) for part in parts[1::2]]
        return _json("".join(parts))


class PythonFormat(JsonFormat):
    """A list of calls in Python."""

    quotes = ("'", '"')
    brackets = _brackets(_STRING, _STRING.replace('"', "'"), '"', "'")

    def _value(self, written: str) -> Any:
        calls = ast.parse(written, mode="eval").body
        return [_python_call(call) for call in calls.elts] if isinstance(calls, ast.List) else []


@dataclass(frozen=True)
class TaggedFormat(Format):
    """Each argument has tags of its own."""

    argument: re.Pattern[str] = re.compile("")  #: with the groups "key" and "value"
    end: re.Pattern[str] = re.compile("")  #: of a call

    def _read(self, text: str, head: re.Match[str], tools: Tools) -> Found | None:
        arguments, at, name = {}, head.end(), head["name"]
        while argument := self.argument.match(text, at):
            arguments[argument["key"]] = _typed(argument["value"], tools.get(name, {}), argument["key"])
            at = argument.end()
        end = self.end.match(text, at)
        return end and Found((_call(name, arguments),), end.end())


def _typed(value: str, schema: Mapping[str, Any], key: str) -> Any:
    """A value between tags, which is a text if the schema wants one, and else JSON if it can be."""
    properties = schema.get("properties")
    wanted = properties.get(key) if isinstance(properties, dict) else None
    if isinstance(wanted, dict) and wanted.get("type") == "string":
        return value
    try:
        return _json(value)
    except (ValueError, RecursionError):
        return value


def _json(text: str) -> Any:
    """A JSON value. Raises ValueError."""
    return json.loads(text, strict=False, parse_constant=_no_number)  # models break lines in strings


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _call(name: str, arguments: dict[str, Any]) -> Call:
    """A call. Raises ValueError or TypeError for arguments that JSON or UTF-8 cannot express."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()  # halves of characters
    return Call(name, text)


class _Words(ast.NodeTransformer):
    """JSON's words among Python's values."""

    words: ClassVar[dict[str, bool | None]] = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.words[node.id]) if node.id in self.words else node


def _python_call(call: ast.expr) -> dict[str, Any]:
    """A call in Python. Raises ValueError for one whose arguments have no names, or are no values."""
    if not isinstance(call, ast.Call) or call.args or any(argument.arg is None for argument in call.keywords):
        raise ValueError("no call of a tool")
    arguments = {argument.arg: ast.literal_eval(_Words().visit(argument.value)) for argument in call.keywords}
    return {"name": ast.unparse(call.func), "arguments": arguments}


def _calls_in(value: Any) -> list[Call]:
    """The calls that a JSON value is; [] if it is anything else."""
    if isinstance(value, list):
        found = [_calls_in(item) for item in value]
        return [call for calls in found for call in calls] if all(found) else []
    if not isinstance(value, dict):
        return []
    for wrapper in ("tool_calls", "tool_call", "function"):
        if isinstance(value.get(wrapper), dict | list):
            return _calls_in(value[wrapper])
    name = next((value[key] for key in _NAMES if key in value), None)
    arguments = next((value[key] for key in _ARGUMENTS if key in value), None)
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(name, str) or not isinstance(arguments or {}, dict):
        return []
    return [_call(name, arguments or {})]
