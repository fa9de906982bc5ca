"""The formats in which families of models write calls of tools: a table, and what reads a call by it.

A family of models is a line of FORMATS. A call is what names a tool of the request: anything else is text.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LONGEST_HEAD = 256  #: characters from where a call begins to its JSON
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["{}\[\]]', re.DOTALL)
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

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks, which may be control tokens."""
        return (*self.begins, *self.ends, *self.before_text, *self.inner)

    def read(self, text: str, tools: Tools) -> Found | None:
        """The calls with which a text begins that may go on; None if more must come to know."""
        head = self.head.match(text)
        if head is None:
            return None if len(text) < LONGEST_HEAD else NOTHING
        found = self._read(text, head, tools)
        return found if found is None or all(call.name in tools for call in found.calls) else NOTHING

    @abstractmethod
    def _read(self, text: str, head: re.Match[str], tools: Tools) -> Found | None:
        """The same, after the head."""


class JsonFormat(Format):
    """Arguments, or whole calls, are JSON."""

    def _read(self, text: str, head: re.Match[str], tools: Tools) -> Found | None:
        end = _end_of_json(text, head.end())
        if end is None:
            return None
        try:
            value = json.loads(text[head.end() : end], strict=False)  # models break lines in strings
        except (ValueError, RecursionError):
            return NOTHING
        if name := head.groupdict().get("name"):
            value = {"name": name, "arguments": value}
        return Found(tuple(_calls_in(value)), end)


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
        return end and Found((Call(name, json.dumps(arguments, ensure_ascii=False)),), end.end())


def _typed(value: str, schema: Mapping[str, Any], key: str) -> Any:
    """A value between tags, which is a text if the schema wants one, and else JSON if it can be."""
    properties = schema.get("properties")
    wanted = properties.get(key) if isinstance(properties, dict) else None
    if isinstance(wanted, dict) and wanted.get("type") == "string":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _end_of_json(text: str, start: int) -> int | None:
    """Where an object or a list ends that begins at `start`; None if it does not."""
    depth = 0
    for found in _BRACKETS.finditer(text, start):
        if found[0] == '"':
            return None  # a string that has not ended
        depth += (found[0] in "{[") - (found[0] in "}]")
        if depth == 0:
            return found.end()
    return None


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
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return []
    if not isinstance(name, str) or not isinstance(arguments or {}, dict):
        return []
    return [Call(name, json.dumps(arguments or {}, ensure_ascii=False))]


def _marked(begin: str) -> re.Pattern[str]:
    """A head that is a mark before JSON; calls after the first may do without."""
    return re.compile(rf"(?:{re.escape(begin)})?\s*(?=\{{|\[\s*\{{)")


_JSON = ("{", "[")

# The first that reads what a template makes of a call is its format, so that those without marks come last.
FORMATS: tuple[Format, ...] = (
    JsonFormat("Hermes", _marked("<tool_call>"), ("<tool_call>",), more=_JSON, ends=("</tool_call>",)),
    JsonFormat("tool_calls", _marked("<tool_calls>"), ("<tool_calls>",), more=_JSON, ends=("</tool_calls>",)),
    JsonFormat(
        "Mistral",
        re.compile(
            r"\[TOOL_CALLS\]\s*(?:(?P<name>[\w.-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)|(?=\{|\[\s*\{))",
        ),
        ("[TOOL_CALLS]",),
        inner=("[CALL_ID]", "[ARGS]"),
    ),
    JsonFormat(
        "Functionary 3.1",
        re.compile(r"<function=(?P<name>[\w.-]+)>\s*(?=\{)"),
        ("<function=NAME>",),
        ends=("</function>",),
    ),
    JsonFormat(
        "Functionary 3.2",
        re.compile(r"(?:>>>)?(?P<name>[\w.-]+)\n\s*(?=\{)"),
        (">>>NAME\n",),
        bare=("NAME\n",),
        before_text=("all\n", ">>>all\n"),
    ),
    JsonFormat(
        "DeepSeek",
        re.compile(
            r"(?:<｜tool▁calls▁begin｜>)?\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[\w.-]+)"
            r"(?:<｜tool▁sep｜>|\s*```json)\s*(?=\{)"
        ),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        ends=("```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
        inner=("<｜tool▁sep｜>",),
    ),
    JsonFormat(
        "Kimi",
        re.compile(
            r"(?:<\|tool_calls_section_begin\|>)?\s*<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[\w.-]+)(?::\d+)?"
            r"\s*<\|tool_call_argument_begin\|>\s*(?=\{)"
        ),
        ("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
        ends=("<|tool_call_end|>", "<|tool_calls_section_end|>"),
        inner=("<|tool_call_argument_begin|>",),
    ),
    JsonFormat("Granite", _marked("<|tool_call|>"), ("<|tool_call|>",)),
    JsonFormat("Nemotron", _marked("<TOOLCALL>"), ("<TOOLCALL>",), ends=("</TOOLCALL>",)),
    JsonFormat("Firefunction", _marked("functools"), ("functools[",)),
    JsonFormat("Command R", _marked("<|START_ACTION|>"), ("<|START_ACTION|>",), ends=("<|END_ACTION|>",)),
    JsonFormat(
        "GigaChat",
        re.compile(r"(?:<\|function_call\|>|<\|message_sep\|>\s*function call<\|role_sep\|>)\s*(?=\{)"),
        ("<|function_call|>", "<|message_sep|>\n\nfunction call"),
        ends=("<|message_sep|>",),
        inner=("<|role_sep|>",),
    ),
    JsonFormat(
        "Solar",
        re.compile(
            r"(?:<\|tool_calls\|>)?\s*<\|tool_call:begin\|>[^<]*<\|tool_call:name\|>(?P<name>[\w.-]+)"
            r"<\|tool_call:args\|>\s*(?=\{)"
        ),
        ("<|tool_calls|>", "<|tool_call:begin|>"),
        ends=("<|tool_call:end|>", "<|calls|>"),
        inner=("<|tool_call:name|>", "<|tool_call:args|>"),
    ),
    JsonFormat(
        "gpt-oss",
        re.compile(
            r"(?:<\|start\|>assistant)?\s*(?:<\|channel\|>\w+)?\s*to=functions\.(?P<name>[\w.-]+)[^{}]*<\|message\|>"
            r"\s*(?=\{)"
        ),
        ("<|start|>assistant", "<|channel|>commentary", "to=functions.NAME"),
        ends=("<|call|>", "<|end|>"),
        inner=("<|channel|>", "<|message|>", "<|constrain|>", "<|start|>"),
    ),
    TaggedFormat(
        "function=",
        re.compile(r"(?:<(?:seed:)?tool_call>)?\s*<function=(?P<name>[\w.-]+)>"),
        ("<tool_call>", "<seed:tool_call>", "<function=NAME>"),
        ends=("</tool_call>", "</seed:tool_call>"),
        argument=re.compile(r"\s*<parameter=(?P<key>[^>]+)>\n?(?P<value>.*?)\n?</parameter>", re.DOTALL),
        end=re.compile(r"\s*</function>"),
    ),
    TaggedFormat(
        "arg_key",
        re.compile(r"<tool_call>\s*(?P<name>[\w.-]+)"),
        ("<tool_call>",),
        argument=re.compile(r"\s*<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>", re.DOTALL),
        end=re.compile(r"\s*</tool_call>"),
        inner=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>"),
    ),
    TaggedFormat(
        "invoke",
        re.compile(
            r"(?:<(?:minimax:tool_call|｜DSML｜(?:function|tool)_calls)>)?\s*"
            r"<(?:｜DSML｜)?invoke name=\"(?P<name>[\w.-]+)\">"
        ),
        ("<minimax:tool_call>", "<｜DSML｜function_calls>", "<｜DSML｜tool_calls>"),
        more=("<invoke", "<｜DSML｜invoke"),
        ends=(
            "</minimax:tool_call>",
            "</｜DSML｜function_calls>",
            "</｜DSML｜tool_calls>",
        ),
        argument=re.compile(
            r"\s*<(?:｜DSML｜)?parameter name=\"(?P<key>[^\"]+)\"[^>]*>(?P<value>.*?)</(?:｜DSML｜)?parameter>",
            re.DOTALL,
        ),
        end=re.compile(r"\s*</(?:｜DSML｜)?invoke>"),
        inner=("｜DSML｜",),
    ),
    JsonFormat("Llama 3", _marked("<|python_tag|>"), ("<|python_tag|>",), bare=_JSON, ends=(";", "<|eom_id|>")),
)

# Of templates that say nothing of calls.
GENERIC: Format = JsonFormat(
    "JSON", re.compile(r"(?:```(?:json)?)?\s*(?=\{|\[\s*\{)"), bare=("```json", *_JSON), ends=("```",)
)
