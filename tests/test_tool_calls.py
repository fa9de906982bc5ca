"""Calls of tools in what models write: outputs of each format, written after the templates; which of these are read."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from served import ARGUMENTS

from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.reasoning import Splitter
from selfextend_gguf.server.models import ServedModel
from selfextend_gguf.tool_calls.families import FORMATS, GENERIC
from selfextend_gguf.tool_calls.reading import CallReader

TEXT = {"type": "string"}
TOOLS = {
    "weather": {"type": "object", "properties": {"city": TEXT, "days": {"type": "integer"}}},
    "get-time": {"type": "object", "properties": {}},
}
ROME = ("weather", {"city": "Rome"})
JOPPA = ("weather", {"city": "Joppa", "days": 3})
NOW = ("get-time", {})
BY_NAME = {form.name: form for form in (*FORMATS, GENERIC)}

# What models write, by the names of formats: the output, its calls, and what of it is text.
OUTPUTS = [
    ("Hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', [ROME], ""),
    (
        "Hermes",
        "I look it up.\n\n<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n<tool_call>\n'
        '{"arguments": {"city": "Joppa", "days": 3}, "name": "weather"}\n</tool_call>\n',
        [ROME, JOPPA],
        "I look it up.",
    ),
    ("Hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}', [ROME], ""),
    ("Hermes", '<tool_call>\n{"name": "get-time", "arguments": {}}\n</tool_call>Done.', [NOW], "Done."),
    ("tool_calls", '<tool_calls>[{"name": "weather", "arguments": {"city": "Rome"}}]</tool_calls>', [ROME], ""),
    (
        "tool_calls",
        '<tool_calls>\n{"name": "weather", "arguments": {"city": "Rome"}}\n'
        '{"name": "get-time", "arguments": {}}\n</tool_calls>',
        [ROME, NOW],
        "",
    ),
    (
        "Mistral",
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}, "id": "abcdefghi"}, '
        '{"name": "get-time", "arguments": {}, "id": "123456789"}]',
        [ROME, NOW],
        "",
    ),
    ("Mistral", 'Well.[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]get-time[ARGS]{}', [ROME, NOW], "Well."),
    ("Mistral", '[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Rome"}', [ROME], ""),
    (
        "Functionary 3.1",
        'Yes. <function=weather>{"city": "Rome"}</function><function=get-time>{}</function>',
        [ROME, NOW],
        "Yes.",
    ),
    ("Functionary 3.2", 'weather\n{"city": "Rome"}', [ROME], ""),
    ("Functionary 3.2", 'all\nI look.\n>>>weather\n{"city": "Rome"}\n>>>get-time\n{}', [ROME, NOW], "I look."),
    ("Functionary 3.2", "all\n>>> is Python's prompt", [], ">>> is Python's prompt"),
    (
        "DeepSeek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Rome"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get-time\n```json\n'
        "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [ROME, NOW],
        "",
    ),
    (
        "DeepSeek",
        "Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        '{"city": "Rome"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        [ROME],
        "Hm.",
    ),
    (
        "Kimi",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Rome"}<|tool_call_end|><|tool_call_begin|>functions.get-time:1<|tool_call_argument_begin|>'
        "{}<|tool_call_end|><|tool_calls_section_end|>",
        [ROME, NOW],
        "",
    ),
    ("Granite", '<|tool_call|>[{"name": "weather", "arguments": {"city": "Rome"}}]', [ROME], ""),
    ("Nemotron", '<TOOLCALL>[{"name": "weather", "arguments": {"city": "Rome"}}]</TOOLCALL>', [ROME], ""),
    ("Firefunction", ' functools[{"name": "weather", "arguments": {"city": "Rome"}}]', [ROME], ""),
    (
        "Command R",
        "<|START_ACTION|>[\n"
        '    {"tool_call_id": "0", "tool_name": "weather", "parameters": {"city": "Rome"}}\n]<|END_ACTION|>',
        [ROME],
        "",
    ),
    ("GigaChat", '<|function_call|>{"name": "weather", "arguments": {"city": "Rome"}}<|message_sep|>', [ROME], ""),
    (
        "GigaChat",
        'So.<|message_sep|>\n\nfunction call<|role_sep|>\n{"name": "weather", "arguments": {"city": "Rome"}}',
        [ROME],
        "So.",
    ),
    (
        "Solar",
        "<|tool_calls|><|tool_call:begin|>ab12<|tool_call:name|>weather<|tool_call:args|>"
        '{"city": "Rome"}<|tool_call:end|><|calls|>',
        [ROME],
        "",
    ),
    (
        "gpt-oss",
        '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>',
        [ROME],
        "",
    ),
    (
        "gpt-oss",
        '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}',
        [ROME],
        "",
    ),
    (
        "function=",
        "Sure.\n<tool_call>\n<function=weather>\n<parameter=city>\nJoppa\n</parameter>\n<parameter=days>\n3\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=get-time>\n</function>\n</tool_call>",
        [JOPPA, NOW],
        "Sure.",
    ),
    (
        "function=",
        "<seed:tool_call>\n<function=weather>\n<parameter=city>7</parameter>\n</function>\n</seed:tool_call>",
        [("weather", {"city": "7"})],  # a text, as the schema has it
        "",
    ),
    (
        "arg_key",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Joppa</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>get-time</tool_call>",
        [JOPPA, NOW],
        "",
    ),
    (
        "invoke",
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Joppa</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="get-time">\n</invoke>\n</minimax:tool_call>',
        [JOPPA, NOW],
        "",
    ),
    (
        "invoke",
        "So.\n\n<｜DSML｜function_calls>\n"
        '<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        [ROME],
        "So.",
    ),
    (
        "Gemma",
        'So.<|tool_call>call:weather{city:<|"|>Joppa<|"|>,days:3}<tool_call|><|tool_call>call:get-time{}<tool_call|>',
        [JOPPA, NOW],
        "So.",
    ),
    (
        "Gemma",
        '<|tool_call>call:weather{city:<|"|>a "}\n: {b<|"|>,at:{<|"|>x<|"|>:[1,true]},near:[<|"|>c<|"|>]}<tool_call|>',
        [("weather", {"city": 'a "}\n: {b', "at": {"x": [1, True]}, "near": ["c"]})],
        "",
    ),
    ("Python", "<|tool_call_start|>[weather(city='Joppa', days=3)]<|tool_call_end|>Done.", [JOPPA], "Done."),
    (
        "Python",
        "<|tool_call_start|>[weather(city=\"it's ]\", at={\"x\": [true, null]}), "
        "weather(city='Rome')]<|tool_call_end|>",
        [("weather", {"city": "it's ]", "at": {"x": [True, None]}}), ROME],
        "",
    ),
    ("Llama 3", '{"name": "weather", "parameters": {"city": "Rome"}}', [ROME], ""),
    (
        "Llama 3",
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}; '
        '{"type": "function", "name": "get-time", "parameters": {}}',
        [ROME, NOW],
        "",
    ),
    ("JSON", '```json\n{"tool_call": {"name": "weather", "arguments": {"city": "Rome"}}}\n```', [ROME], ""),
    ("JSON", '{"tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}]}', [ROME], ""),
    ("JSON", '[{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "get-time"}]', [ROME, NOW], ""),
]  # fmt: skip
# What is no call, though it may look like one, is text as it stands.
TEXTS = [
    ("Hermes", "No tool is needed: <b> 3 < 4 </b>\n\nSee?\n"),
    ("Hermes", "The tag <tool_call> begins a call." + 300 * " Yes."),
    ("Hermes", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
    ("Hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Ro'),  # cut
    ("Hermes", '<tool_call>\n{"name": "weather", "arguments": {city: Rome}}\n</tool_call>'),
    ("Hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
    ("Hermes", "a <tool_"),
    ("Hermes", '<tool_call>{"name": "weather", "arguments": {"city": NaN}}</tool_call>'),
    ("Hermes", '<tool_call>{"name": "weather", "arguments": {"city": "\\ud800"}}</tool_call>'),
    ("Hermes", '<tool_call>{"name": "weather", "arguments": "Rome"}</tool_call>'),
    (
        "Hermes",
        '<tool_call>{"name": "weather", "arguments": {"city": ' + "[" * 20_000 + "]" * 20_000 + "}}</tool_call>",
    ),
    ("Mistral", "[TOOL_CALLS]weather[ARGS]"),
    ("Llama 3", '{"city": "Rome"}\n'),
    ("Llama 3", 'It is {"name": "weather", "parameters": {}}'),  # within a text
    ("Functionary 3.2", "weather is fine"),
    ("function=", "<tool_call>\n<function=weather>\n<parameter=city>\nRome"),
    ("Gemma", '<|tool_call>call:weather{city:<|"|>Rome'),
    ("Gemma", "<|tool_call>call:weather{city:Rome}<tool_call|>"),
    ("Python", "<|tool_call_start|>[weather(city=town)]<|tool_call_end|>"),
    ("Python", "<|tool_call_start|>[weather(**{})]<|tool_call_end|>"),
    ("Python", "<|tool_call_start|>[weather('Rome')]<|tool_call_end|>"),
    ("Python", "<|tool_call_start|>[weather(city={1, 2})]<|tool_call_end|>"),
    ("Python", "<|tool_call_start|>[weather(city=b'a', days=2j)]<|tool_call_end|>"),
    ("Python", "<|tool_call_start|>[weather(city=1e999)]<|tool_call_end|>"),
    ("Python", "<|tool_call_start|>[" + 30_000 * "-" + "1]<|tool_call_end|>"),
    ("JSON", "[1, 2] are numbers"),
    ("JSON", "  \n"),
    ("JSON", "```python\nprint(1)\n```"),
    ("JSON", "{" * 3000),
]


def read(name: str, pieces: list[str], **more: object) -> tuple[list[tuple[str, dict]], str, str]:
    """Calls, text, and all that was written."""
    reader = CallReader(BY_NAME[name], TOOLS, **more)
    parts = [part for piece in pieces for part in reader.feed(piece)] + list(reader.finish())
    calls: list[list[str]] = []
    for part in parts:
        if part.name is not None:
            calls.append([part.name, ""])
        if part.arguments:
            calls[-1][1] += part.arguments
    return (
        [(name, json.loads(arguments)) for name, arguments in calls],
        "".join(part.text for part in parts),
        "".join(part.written for part in parts),
    )


@pytest.mark.parametrize(("name", "output", "calls", "text"), OUTPUTS)
def test_outputs_of_each_format(name, output, calls, text):
    """However they are cut."""
    for pieces in ([output], list(output), [output[i : i + 7] for i in range(0, len(output), 7)]):
        assert read(name, pieces) == (calls, text, output)


@pytest.mark.parametrize(("name", "output"), TEXTS)
def test_what_is_no_call_is_text(name, output):
    for pieces in ([output], list(output)):
        assert read(name, pieces) == ([], output, output)


def test_all_formats_are_tried():
    assert {name for name, *_ in OUTPUTS} == set(BY_NAME)


def test_a_text_comes_as_it_is_written():
    """But for blanks, and what may begin a call, until more has come."""
    for form in BY_NAME.values():
        reader = CallReader(form, TOOLS)
        told = ["".join(part.text for part in reader.feed(piece)) for piece in ("Look", " here:", " 3 ", "< 4", ".")]
        assert told == ["Look", " here:", " 3", " < 4", "."] or told == ["Look", " here:", " 3", " <", " 4."], form.name


@pytest.mark.parametrize("cut", [1, 5, 1000])
def test_a_call_after_a_thought(cut):
    """gpt-oss thinks and calls in channels, which share their marks."""
    output = (
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Rome"}<|call|>'
    )
    splitter, reader = Splitter(), CallReader(BY_NAME["gpt-oss"], TOOLS)
    split = [part for i in range(0, len(output), cut) for part in splitter.feed(output[i : i + cut])]
    split += splitter.finish()
    assert "".join(text for kind, text in split if kind == "thought") == "Hm"
    parts = [part for kind, text in split if kind == "answer" for part in reader.feed(text)] + list(reader.finish())
    assert [(part.name, part.arguments) for part in parts if part.name] == [("weather", '{"city": "Rome"}')]
    assert "".join(part.text for part in parts) == ""


def test_a_long_call_takes_no_long_time():
    """100 kB in 25,000 pieces took half a minute when each piece was looked through."""
    files = [{"name": f"f{i}", "content": "print('hello')\n" * 5} for i in range(900)]
    output = f"<tool_call>{json.dumps({'name': 'weather', 'arguments': {'files': files}})}</tool_call>"
    began = time.process_time()
    calls, text, _ = read("Hermes", [output[i : i + 4] for i in range(0, len(output), 4)])
    assert (calls, text) == ([("weather", {"files": files})], "")
    assert time.process_time() - began < 10


def test_one_call_at_most():
    output = next(output for name, output, calls, _ in OUTPUTS if calls == [ROME, JOPPA])
    reader = CallReader(BY_NAME["Hermes"], TOOLS, at_most_one=True)
    names = [part.name for part in reader.feed(output) if part.name is not None]
    assert (names, reader.is_done, list(reader.finish())) == (["weather"], True, [])


# ---- templates ---------------------------------------------------------------------------------------------------

HERMES = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = HERMES.replace("<tool_call>\n", "").replace("\n</tool_call>", "")
SILENT = "{{ tools }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
OTHER = HERMES.replace(
    "<tool_call>\n{{ c.function | tojson }}", "{{ c.function.name }} of {{ c.function.arguments.word }}"
)
MISTRAL = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{% if c.id | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}"
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}{{ m.content }}{% endfor %}"
)


def served(template: str) -> ServedModel:
    return ServedModel.from_file(TINY_MODEL, "tiny", 512, ARGUMENTS, None, chat_template=template)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (HERMES, "Hermes"),
        (BARE, "Llama 3"),
        (MISTRAL, "Mistral"),
        (SILENT, "JSON"),
        (SILENT + "Write <tool_call> ...", "Hermes"),
        (OTHER, None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_format_of_a_template(template, name):
    form = served(template).call_format
    assert (form and form.name) == name


# ---- llama.cpp's templates -----------------------------------------------------------------------------------------

TEMPLATES = os.environ.get("SX_GGUF_TEMPLATES")  # a folder, such as models/templates of llama.cpp's source
DOCUMENT = Path(__file__).parents[1] / "docs" / "tools.md"


def listed(heading: str) -> dict[str, str]:
    """The table under a heading of the document: first column to second."""
    section = DOCUMENT.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1] for row in rows}


def test_the_document_has_all_formats():
    assert set(listed("Formats")) == set(BY_NAME)


@pytest.mark.skipif(not TEMPLATES, reason="SX_GGUF_TEMPLATES names no folder of templates")
def test_the_document_says_which_templates_are_unread():
    found = {
        path.stem: served(path.read_text(encoding="utf-8")).call_format for path in Path(TEMPLATES).glob("*.jinja")
    }
    unread = {stem for stem, form in found.items() if form is None}
    assert unread == set(listed("Templates that are not read"))
    silent = {stem for stem, form in found.items() if form is GENERIC}
    assert silent == set(listed("Templates that say nothing of calls"))
