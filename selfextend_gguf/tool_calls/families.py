"""The families of models, and the formats in which they write calls of tools."""

from __future__ import annotations

import re

from selfextend_gguf.tool_calls.formats import Format, GemmaFormat, JsonFormat, PythonFormat, TaggedFormat


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
    GemmaFormat(
        "Gemma",
        re.compile(r"<\|tool_call>call:(?P<name>[\w.-]+)(?=\{)"),
        ("<|tool_call>",),
        ends=("<tool_call|>",),
        inner=('<|"|>',),
    ),
    PythonFormat(
        "Python",
        re.compile(r"<\|tool_call_start\|>\s*(?=\[)"),
        ("<|tool_call_start|>",),
        ends=("<|tool_call_end|>",),
        signs=("List of tools: [", "List of tools: <|tool_list_start|>"),  # LFM2
    ),
    JsonFormat("Llama 3", _marked("<|python_tag|>"), ("<|python_tag|>",), bare=_JSON, ends=(";", "<|eom_id|>")),
)

# Of templates that say nothing of calls.
GENERIC: Format = JsonFormat(
    "JSON", re.compile(r"(?:```(?:json)?)?\s*(?=\{|\[\s*\{)"), bare=("```json", *_JSON), ends=("```",)
)
