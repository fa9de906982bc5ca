"""Chat templates: whatever one does is an error in one line, at every door, in bounded time and memory."""

from __future__ import annotations

import json
import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from selfextend_gguf import Llama, templates
from selfextend_gguf.cli import main
from selfextend_gguf.errors import TemplateError
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.planning import PARAMETERS
from selfextend_gguf.server.jobs import chat_job
from selfextend_gguf.server.models import ServedModel
from selfextend_gguf.server.requests import ChatRequest
from selfextend_gguf.templates import ChatTemplate
from selfextend_gguf.tiny.model_file import LlamaShape, random_tensors, write_llama

MESSAGES = [{"role": "user", "content": 'Is "5 < 6"?'}, {"role": "assistant", "content": "Ü, 😀"}]


def render(template: str, **variables: object) -> str:
    return ChatTemplate(template, bos_token="<s>", eos_token="</s>")(messages=MESSAGES, **variables).prompt


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}\n  {% if loop.first %}[{{ m.role }}]{% endif %}\n"
        " {{ m['content'] | trim }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
        "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ tools is none }} {{ functions is defined }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
        "{% macro line(m) %}{{ m.role }}: {{ m.content }}\n{% endmacro %}"
        "{% for m in messages %}{{ line(m) }}{% endfor %}",
        "{{ strftime_now('%Y') }}{% set ns = namespace(n=0) %}{% set ns.n = 2 ** 3 %}{{ ns.n }}{{ undefined_name }}",
    ],
)
def test_rendered_as_llama_cpp_does(template):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    theirs = Jinja2ChatFormatter(template, eos_token="</s>", bos_token="<s>")
    for variables in ({}, {"tools": tools, "tool_choice": "auto"}):
        assert render(template, **variables) == theirs(messages=MESSAGES, **variables).prompt


HOSTILE = {
    "{{ 1 // 0 }}": "failed: ZeroDivisionError: integer division or modulo by zero",
    "{% for i in range(10**9) %}x{% endfor %}": "failed: OverflowError: Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself without end, or nests too deeply",
    "{{ 'x' * 10**10 }}": "takes more than 1024 MiB of memory",
    "{{ raise_exception('no\ntools') }}": "refuses the messages: no tools",
    "{{ messages.foo.bar }}": "failed: 'list object' has no attribute 'foo'",
    "{{ ''.__class__.__mro__ }}": "failed: access to attribute '__class__' of 'str' object is unsafe",
    "{% include 'x' %}": "failed: TypeError: no loader for this environment specified",
    "{{ messages[0] + 1 }}": "failed: TypeError: unsupported operand type(s)",
    "{{ '\ud800' }}": "failed: UnicodeEncodeError: ",
    "{% if": "is no template: unexpected 'end of template'",
    "{{" + "(" * 20000: "calls itself without end, or nests too deeply",
}
ENDLESS = [  # in loops, in one operation, and while it is compiled, where constants are folded
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** (9 ** (messages | length + 7)) }}",
    "{{ 9 ** (9 ** 9) }}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_what_a_template_raises_is_one_line(template):
    with pytest.raises(TemplateError) as caught:
        render(template)
    assert str(caught.value).startswith(f"the model's chat template {HOSTILE[template]}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_may_take_some_time_only(template, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    with pytest.raises(TemplateError, match=r"takes more than 0\.2 s of processor time"):
        render(template)
    assert render("{{ messages[0].role }}") == "user"  # the next one


def test_variables_that_are_no_json():
    with pytest.raises(TemplateError, match="is given what JSON cannot express"):
        render("{{ x }}", x=object())


def test_a_fork_has_a_process_of_its_own():
    assert render("{{ messages[0].role }}") == "user"
    child = os.fork()
    if child == 0:
        os._exit(render("{{ messages[1].role }}") != "assistant")
    assert os.waitpid(child, 0)[1] == 0
    assert render("{{ messages[0].role }}") == "user"


# ---- doors -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_template(tmp_path_factory):
    """Path of a tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("templates")

    def make(template: str):
        path = folder / f"{abs(hash(template))}.gguf"
        shape = LlamaShape(n_ctx_train=64, n_layer=1, n_embd=32, n_head=2, n_head_kv=1, head_dim=16, n_ff=32)
        write_llama(path, shape, random_tensors(shape, seed=1), chat_template=template)
        return str(path)

    return make


def test_a_template_does_not_keep_a_model_from_loading(with_template):
    """llama_cpp.Llama compiles it when it loads the model."""
    for template in (ENDLESS[-1], "{% if"):
        llm = Llama(with_template(template), verbose=False)
        assert llm.chat_format == "chat_template.default"
        assert llm.metadata["tokenizer.chat_template"] == template
        llm.eval([1, 2, 3])


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", ENDLESS[0]])
@pytest.mark.parametrize("stream", [False, True])
def test_in_python(template, stream, with_template, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    llm = Llama(with_template(template), verbose=False)
    with pytest.raises(TemplateError, match=r"the model's chat template (failed|takes)"):
        llm.create_chat_completion(MESSAGES[:1], stream=stream)


@pytest.mark.parametrize("arguments", [["run", "MODEL", "hello"], ["chat", "MODEL"]])
def test_on_the_command_line(arguments, with_template, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    for template in ("{{ 1 // 0 }}", ENDLESS[-1]):
        command = [with_template(template) if argument == "MODEL" else argument for argument in arguments]
        result = CliRunner().invoke(main, command, input="hello\n")
        assert "the model's chat template " in result.stderr
        assert "; --raw leaves it out" in result.stderr
        assert "Traceback" not in result.output
        assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1
        assert CliRunner().invoke(main, [*command, "--raw", "-n", "2"], input="hello\n").exit_code == 0


def test_a_server_does_not_begin_with_what_is_no_template(with_template):
    result = CliRunner().invoke(main, ["serve", with_template("{% if"), "--port", "0"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: the model's chat template is no template: unexpected 'end of template'\n"


def test_the_worker_takes_one_request_a_line():
    """What a text holds does not end its line."""
    text = "a\nb\r\nc\u2028d\x00e"
    assert render("{{ x }}", x=text) == text
    assert json.loads(render("{{ x | tojson }}", x=text)) == text


# ---- what a template does not take -----------------------------------------------------------------------------

TEMPLATES = os.environ.get("SX_GGUF_TEMPLATES")  # a folder, such as models/templates of llama.cpp's source
USER = [{"role": "user", "content": "Q1"}]
CONVERSATIONS = {
    "a question": USER,
    "with a system message": [{"role": "system", "content": "S1"}, *USER],
    "three turns": [
        *USER,
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "A2"},
        {"role": "user", "content": "Q3"},
    ],
}
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
)


def rendered(template: str, messages: list[dict[str, str]], **variables: object) -> str:
    return ChatTemplate(template, bos_token="<s>", eos_token="</s>")(messages=messages, **variables).prompt


def test_a_refused_system_message_begins_the_users_first():
    assert rendered(NO_SYSTEM, CONVERSATIONS["with a system message"]) == "[user]S1\nQ1"


@pytest.mark.parametrize(
    "messages", [[{"role": "system", "content": "S1"}], [*USER, {"role": "system", "content": "S1"}]]
)
def test_a_system_message_elsewhere_stays_refused(messages):
    with pytest.raises(TemplateError, match="refuses the messages: System role not supported"):
        rendered(NO_SYSTEM, messages)


def test_the_usual_variables_are_those_of_llama_cpp():
    """A thought is not ended before it begins, and the date is today's, unless others are given."""
    template = "{{ date_string }}|{{ datetime }}|<think>{% if not enable_thinking %}</think>{% endif %}"
    day, time, thought = rendered(template, USER).split("|")
    assert abs(datetime.strptime(day, "%d %b %Y") - datetime.now()) < timedelta(days=2)
    assert datetime.strptime(time, "%b %d %Y %H:%M:%S GMT")
    assert thought == "<think>"
    assert rendered(template, USER, enable_thinking=False, date_string="d", datetime="t") == "d|t|<think></think>"


def test_what_filters_make_can_be_written_as_json():
    assert rendered("{{ messages | map(attribute='content') | tojson }}", USER) == '["Q1"]'
    with pytest.raises(TemplateError, match="not iterable"):
        rendered("{{ range | tojson }}", USER)


def test_a_template_that_needs_tools_works_without():
    template = "{% for t in tools %}{{ t.name }}{% endfor %}{{ messages[0].content }}"
    assert rendered(template, USER) == "Q1"
    assert rendered(template, USER, tools=[{"name": "find "}]) == "find Q1"
    assert rendered("{{ 'Use ' + functions + messages[0].content }}", USER) == "Use Q1"


@pytest.mark.skipif(not TEMPLATES, reason="SX_GGUF_TEMPLATES names no folder of templates")
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("path", sorted(Path(TEMPLATES or "/nowhere").glob("*.jinja")), ids=lambda path: path.stem)
def test_templates_of_a_folder(path: Path, messages: list[dict[str, str]]):
    text = rendered(path.read_text(encoding="utf-8"), messages)
    assert [m["content"] for m in messages if m["content"] not in text] == []


# ---- another template, and more variables ------------------------------------------------------------------------

OTHER = "{{ name or 'nobody' }} asks: {{ messages[-1].content }}|"


def asked(*arguments: str) -> int:
    """Tokens (bytes) of the prompt that `run` reads."""
    command = ["run", str(TINY_MODEL), "hello", "-n", "1", "-t", "1", "--json", *arguments]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["prompt_tokens"]


@pytest.fixture
def other(tmp_path) -> str:
    path = tmp_path / "other.jinja"
    path.write_text(OTHER)
    return str(path)


def test_a_template_from_a_file_with_variables(other):
    assert asked() == len("hello")  # the model has none
    assert asked("--chat-template", other) == len("nobody asks: hello|")
    assert asked("--chat-template", other, "--chat-template-kwargs", '{"name": "Max"}') == len("Max asks: hello|")
    assert asked("--chat-template", other, "--raw") == len("hello")


def test_a_template_from_a_file_in_a_chat(other, with_template):
    command = ["chat", with_template("{{ messages[-1].content }}"), "--chat-template-file", other, "-n", "1", "-t", "1"]
    for variables, text in ((), "nobody"), (("--chat-template-kwargs", '{"name": "Max"}'), "Max"):
        result = CliRunner().invoke(main, [*command, *variables], input="hello\n/stats\n")
        assert f"read {len(text + ' asks: hello|')} tokens" in result.stderr


def test_a_template_from_a_file_on_a_server(other):
    arguments = {"verbose": False, **dict.fromkeys(PARAMETERS)}
    served = ServedModel.from_file(
        TINY_MODEL, "a", 256, arguments, lambda: None, chat_template=OTHER, template_variables={"name": "Max"}
    )
    body = ChatRequest(messages=[{"role": "user", "content": "hello"}])
    assert len(chat_job(body, served).prompts[0].tokens) == len("Max asks: hello|")
    served.info.close()


def test_tools_of_a_call_go_before_those_of_the_template():
    template = ChatTemplate("{{ tools[0] }}{{ name }}", variables={"tools": ["a"], "name": "b"})
    assert template(messages=USER, tools=None).prompt == "ab"
    assert template(messages=USER, tools=["c"]).prompt == "cb"


@pytest.mark.parametrize("command", [["run", "MODEL", "text"], ["chat", "MODEL"], ["serve", "MODEL", "--port", "0"]])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chat-template", "/nowhere"], "/nowhere"),
        (["--chat-template", "BAD"], "bad.jinja: the model's chat template is no template: unexpected 'end of"),
        (["--chat-template-kwargs", "{"], "'{' is no JSON"),
        (["--chat-template-kwargs", "[" * 100000], "is no JSON"),
        (["--chat-template-kwargs", "[1]"], "must be a JSON object, not [1]"),
        (["--chat-template-kwargs", '{"messages": []}'], "the chat template gets messages from the conversation"),
    ],
)
def test_bad_templates_and_variables(one_line_error, tmp_path, command, flags, message):
    (tmp_path / "bad.jinja").write_text("{% if")
    names = {"MODEL": str(TINY_MODEL), "BAD": str(tmp_path / "bad.jinja")}
    assert message in one_line_error(*(names.get(word, word) for word in [*command, *flags]))
