"""The documents name every command and option and nothing that does not exist, and CI runs the README's command."""

from __future__ import annotations

import ast
import contextlib
import doctest
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import metadata, requires
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path

import click
import pytest
import yaml
from cli_reference import DOCUMENT, commands, document
from first_hour import REPO

import selfextend_gguf
from selfextend_gguf import Llama, plan
from selfextend_gguf.cli import main
from selfextend_gguf.cli.chat import COMMANDS
from selfextend_gguf.models import TINY_MODEL

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMAND_LINE = list(commands())
README = (ROOT / "README.md").read_text(encoding="utf-8")
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

each_command = pytest.mark.parametrize(("name", "command"), COMMAND_LINE, ids=[name for name, _ in COMMAND_LINE])


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a document in a language."""
    return re.findall(rf"^```{language}\n(.*?)\n```$", text, re.M | re.S)


def prose(text: str) -> str:
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


# ---- the command line ------------------------------------------------------------------------------------------------


def examples_of(command: click.Command) -> str:
    """The last part of a command's help."""
    return re.split(r"^Examples?:\n", cleandoc(command.help or ""), flags=re.M)[1]


@each_command
def test_every_command_has_help_an_example_and_a_place_in_the_reference(name, command):
    assert f"    {name}" in examples_of(command)
    assert all(re.match("    .*sx-gguf ", line) for line in examples_of(command).splitlines())
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.name
    section = DOCUMENT.read_text(encoding="utf-8").split(f"\n## {name}\n")[1].split("\n## ")[0]
    for option in command.params:
        assert all(name in section for name in (*option.opts, *option.secondary_opts) if name.startswith("-"))


def test_the_reference_is_what_help_says():
    current = DOCUMENT.read_text(encoding="utf-8")
    assert current == document(current), "run: python tests/cli_reference.py"


def test_every_command_of_a_chat_has_its_line():
    text = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        assert f"| `/{name} {command.argument}".rstrip() + "` |" in text


def commands_in(text: str) -> Iterator[list[str]]:
    """The arguments of each `sx-gguf` in lines of a shell."""
    text = re.sub(r"(^| )#.*", "", text.replace("\\\n", " "), flags=re.M)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="\n;&|<>()")
    lexer.commenters = ""
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    words: list[str] | None = None
    for token in [*lexer, "\n"]:
        if not token.strip("\n;&|<>()"):
            if words is not None:
                yield words
            words = None
        elif words is not None:
            words.append(token)
        elif token == "sx-gguf":
            words = []


def test_commands_are_found_in_a_shell():
    script = "a | sx-gguf run x --y 1,2 'p q' \\\n  -z > f  # sx-gguf no\nsx-gguf info && sx-gguf demo"
    assert list(commands_in(script)) == [["run", "x", "--y", "1,2", "p q", "-z"], ["info"], ["demo"]]


def parse(arguments: list[str]) -> None:
    """Raise what click raises for an unknown command or option, a bad value, or a missing argument."""
    command: click.Command = main
    while isinstance(command, click.Group) and arguments:
        command = command.commands[arguments.pop(0)]
    command.make_context(command.name, arguments, **main.context_settings)  # click keeps the first -h


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place where files that commands name can be found."""
    (tmp_path / "model.gguf").symlink_to(TINY_MODEL)
    # A path comes before a name, so nothing is downloaded.
    for name in ("hf:USER/REPO", f"hf:{REPO}:Q4_1", f"hf:{REPO}:Q5_K_M", "ollama:smollm2:135m"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(TINY_MODEL)
    (tmp_path / "tuned.json").write_text("{}")
    monkeypatch.chdir(tmp_path)


@each_document
def test_every_command_that_a_document_tells_to_type_is_one(path, folder):
    for block in blocks(path.read_text(encoding="utf-8"), "sh"):
        for arguments in commands_in(block):
            parse(arguments)


def test_the_first_lines_of_help_fit_a_list_of_commands():
    for _, group in COMMAND_LINE:
        if isinstance(group, click.Group):
            width = 80 - max(map(len, group.commands)) - 8  # what click leaves of a terminal's line
            assert not [c.name for c in group.commands.values() if c.get_short_help_str(width).endswith("...")]


@each_command
def test_the_examples_of_help_are_commands(name, command, folder):
    for arguments in commands_in(examples_of(command)):
        parse(arguments)


@each_document
def test_every_command_that_is_mentioned_has_the_options_it_is_mentioned_with(path):
    for mention in re.findall(r"`(sx-gguf [^`]+)`", path.read_text(encoding="utf-8")):
        for arguments in commands_in(mention):
            with contextlib.suppress(click.BadParameter):  # MODEL and N stand for something
                parse(arguments)


# ---- links, files, modules -------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        assert other.is_file(), target
        assert not anchor or anchor in anchors(other.read_text(encoding="utf-8")), target


def test_every_document_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"^\* \[(\S+\.md)\]\(\1\): ", index, re.M)
    assert sorted(names) == sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")


@each_document
def test_files_and_modules_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    folders = "native|selfextend_gguf|cli|tests|docs|.ci|.github"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"python ((?:\w+/)+\w+\.py)", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"python -m (selfextend_gguf[\w.]*\w)", text):
        assert find_spec(name), name


@each_document
def test_lines_are_wrapped(path):
    for line in prose(path.read_text(encoding="utf-8")).splitlines():
        assert len(line) <= 120 or line.startswith("|"), line


@each_document
def test_there_are_no_unfilled_places(path):
    assert not re.findall(r"\b[A-Z]+_(?:TABLE|OUTPUT|NUMBERS|MINUTES)\b", path.read_text(encoding="utf-8"))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_ci_runs_the_readmes_test_command():
    demo, tests = blocks(README, "sh")[:2]
    assert demo.endswith("sx-gguf demo")
    assert tests.endswith("pytest")
    assert "README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


# ---- examples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_examples_in_python_run(name, folder):
    examples = blocks((ROOT / name).read_text(encoding="utf-8"), "python")
    assert examples
    for example in examples:
        exec(compile(example, name, "exec"), {})


@each_document
def test_examples_in_python_are_python(path):
    for example in blocks(path.read_text(encoding="utf-8"), "python"):
        ast.parse(example)


@pytest.mark.parametrize(
    "item", [Llama, Llama.save_prompt, Llama.load_prompt, plan], ids=lambda item: item.__qualname__
)
def test_examples_in_docstrings_say_what_they_print(item, folder):
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    (example,) = finder.find(item, item.__qualname__, globs={})
    assert runner.run(example).attempted > 0
    assert runner.failures == 0


# ---- the package -----------------------------------------------------------------------------------------------------


def test_versions_and_addresses_agree():
    project = metadata("selfextend-gguf")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["Version"] == citation["version"] == selfextend_gguf.__version__
    assert project["License-Expression"] == citation["license"]
    addresses = dict(entry.split(", ") for entry in project.get_all("Project-URL"))
    assert addresses["Repository"] == citation["repository-code"]
    assert all(address.startswith(citation["repository-code"]) for address in addresses.values())


def test_documents_name_the_pinned_version_of_llama_cpp_python():
    (pinned,) = {name for name in requires("selfextend-gguf") or [] if name.startswith("llama-cpp-python==")}
    named = {name for path in DOCUMENTS for name in re.findall(r"llama-cpp-python==[\w.]+", path.read_text("utf-8"))}
    assert named == {pinned}


def test_the_package_is_marked_as_typed():
    assert (Path(selfextend_gguf.__file__).parent / "py.typed").is_file()


def test_the_error_table_covers_every_status_of_the_library():
    from selfextend_gguf import _native

    header = (ROOT / "native" / "selfextend.h").read_text(encoding="utf-8")
    codes = {name: int(code) for name, code in re.findall(r"SX_(OK|ERR_\w+) += +(-?\d+),", header)}
    assert codes == {status.name: status.value for status in _native.Status}
    assert set(_native._ERRORS) == set(_native.Status) - {_native.Status.OK, _native.Status.ERR_ABORTED}
