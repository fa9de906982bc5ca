"""Thoughts: where they stand in a text, what is shown of them, and what a conversation keeps."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import closing
from itertools import groupby
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import example, given
from hypothesis import strategies as st
from llama_cpp.llama_grammar import LlamaGrammar

from selfextend_gguf import Llama
from selfextend_gguf.cli import main
from selfextend_gguf.conversation import Conversation
from selfextend_gguf.errors import ConversationError
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.prompt import always_thinks, render_chat
from selfextend_gguf.reasoning import FAMILIES, OFF, Splitter, end_of_open_thought

# ---- the splitter --------------------------------------------------------------------------------------------------

Parts = list[tuple[str, str]]
END_OF = {tags.begin: tags.end for tags in FAMILIES}
BEFORE_ANSWERS = [*END_OF, *(other for tags in FAMILIES for other in tags.others)]
ALL_TAGS = sorted({*BEFORE_ANSWERS, *END_OF.values()})


def joined(parts: Iterable[tuple[str, str]]) -> Parts:
    """Parts with neighbours of one kind as one, without empty ones."""
    kept = [part for part in parts if part[1]]
    return [(kind, "".join(text for _, text in group)) for kind, group in groupby(kept, lambda part: part[0])]


def split(pieces: Iterable[str], end: str | None = None) -> Parts:
    splitter = Splitter(end)
    parts = [part for piece in pieces for part in splitter.feed(piece)]
    return joined([*parts, *splitter.finish()])


def expected(text: str, end: str | None, has_tags: bool = False) -> Parts:
    """The parts of a whole text, found from its beginning."""
    if end is not None:
        thought, tag, rest = text.partition(end)
        return [("thought", thought), ("tag", tag), *(expected(rest, None, True) if tag else [])]
    tag_first = re.match(r"\s*(" + "|".join(map(re.escape, BEFORE_ANSWERS)) + ")", text)
    if tag_first:
        return [("tag", tag_first[0]), *expected(text[tag_first.end() :], END_OF.get(tag_first[1]), True)]
    blank = len(text) - len(text.lstrip())
    return [("tag" if has_tags else "answer", text[:blank]), ("answer", text[blank:])]


FRAGMENTS = st.one_of(
    st.sampled_from(ALL_TAGS),
    st.sampled_from(ALL_TAGS).flatmap(lambda tag: st.integers(0, len(tag)).map(lambda n: tag[:n])),
    st.sampled_from(["\n", " ", "word", "<", "</", "ü😀"]),
)


@given(st.lists(FRAGMENTS, max_size=8), st.data(), st.sampled_from([None, *END_OF.values()]))
@example(["<thi", "nk>a</th", "</think>", "\n", "b<think>"], None, None)
def test_any_cutting_gives_the_same_parts(fragments, data, end):
    text = "".join(fragments)
    cuts = [] if data is None else sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    parts = split(pieces, end)
    assert "".join(part for _, part in parts) == text
    assert parts == split([text], end) == split(text, end) == joined(expected(text, end))


def test_no_tag_begins_another():
    """Else it would matter which one is looked for first."""
    assert [(a, b) for a in BEFORE_ANSWERS for b in BEFORE_ANSWERS if a != b and b.startswith(a)] == []
    assert all(tag == tag.lstrip() for tag in ALL_TAGS)


def test_what_is_known_is_not_held_back():
    splitter = Splitter()
    seen = [list(splitter.feed(piece)) for piece in ("<think>", "a", "<", "b", "</thi", "nk>", "\n", "c", "<think>")]
    assert seen == [
        [("tag", "<think>")], [("thought", "a")], [], [("thought", "<b")], [], [("tag", "</think>")], [],
        [("tag", "\n"), ("answer", "c")], [("answer", "<think>")],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>\nhm\n</think>\n\nYes.", "\nhm\n", "Yes."),
        ("\n<thinking>hm</thinking>Yes.", "hm", "Yes."),
        ("[THINK]hm[/THINK]Yes.", "hm", "Yes."),
        ("<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>Yes.", "hm", "Yes."),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.", "hm", "Yes."),
        ("<|channel|>final<|message|>Yes.", "", "Yes."),
        ("<|channel>thought\nhm\n<channel|>Yes.", "hm\n", "Yes."),
        ("<|think|>hm<|end|><|begin|>assistant<|content|>Yes.", "hm", "Yes."),
        ("<think></think>Yes.", "", "Yes."),
        ("  Yes.\n", "", "  Yes.\n"),
        ("Write <think>a</think> so.", "", "Write <think>a</think> so."),
        ("<think>cut of", "cut of", ""),
        ("<thin", "", "<thin"),
        ("", "", ""),
    ],
)
def test_thoughts_and_answers(text, thought, answer):
    of_kind = {kind: "".join(part for k, part in split([text]) if k == kind) for kind in ("thought", "answer")}
    assert of_kind == {"thought": thought, "answer": answer}


def test_prompts_that_begin_a_thought():
    assert end_of_open_thought("<|im_start|>assistant\n<think>\n") == "</think>"
    assert end_of_open_thought("[user] hi [assistant] [THINK]") == "[/THINK]"
    assert end_of_open_thought("<|im_start|>assistant\n<think>\n\n</think>\n\n") is None
    assert end_of_open_thought("") is None


# ---- on the command line -------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}\n{% endfor %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
OPENING = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]<think>{{ '\\n' }}"
THINKS = 'root ::= "<think>\\nhm\\n</think>\\n\\nYes."'
WRITTEN = "<think>\nhm\n</think>\n\nYes."
GOES_ON = 'root ::= "hm\\n</think>\\n\\nYes."'
FOREVER = 'root ::= "<think>" [a-z]*'
NO_SWITCH = "Warning: the chat template cannot switch thinking off; what the model thinks is hidden\n"


@pytest.fixture
def template(tmp_path):
    """Path of a file with a template."""

    def write(text: str) -> str:
        (tmp_path / "template.jinja").write_text(text)
        return str(tmp_path / "template.jinja")

    return write


def invoke(command: str, template: str, *flags: str, grammar: str = THINKS, lines: str | None = None) -> Result:
    words = [command, str(TINY_MODEL), "-t", "1", "--temp", "0", "--chat-template", template, "--grammar", grammar]
    result = CliRunner().invoke(main, [*words, *flags], input=lines)
    assert result.exit_code == 0, result.stderr
    return result


def test_thoughts_are_shown_or_hidden(template):
    path = template(TEMPLATE)
    assert invoke("run", path, "hello").stdout == WRITTEN + "\n"  # no colours in a pipe
    assert invoke("run", path, "hello", "--reasoning", "hide").stdout == "Yes.\n"
    assert invoke("run", path, "hello", "--reasoning", "hide", "--raw").stdout == "Yes.\n"
    for flags, text in (("show", WRITTEN), ("hide", "Yes.")):
        record = json.loads(invoke("run", path, "hello", "--json", "--reasoning", flags).stdout)
        assert (record["text"], record["reasoning"]) == (text, "hm")
    record = json.loads(invoke("run", path, "hello", "--json", grammar='root ::= "Yes."').stdout)
    assert (record["text"], record["reasoning"]) == ("Yes.", None)


def test_a_template_that_begins_the_thought(template):
    path = template(OPENING)
    assert invoke("run", path, "hello", grammar=GOES_ON).stdout == "hm\n</think>\n\nYes.\n"
    assert invoke("run", path, "hello", "--reasoning", "hide", grammar=GOES_ON).stdout == "Yes.\n"
    chat = invoke("chat", path, "--reasoning", "hide", grammar=GOES_ON, lines="hello\nhello\n")
    assert chat.stdout == "Yes.\nYes.\n"


def test_thoughts_are_switched_off_by_the_templates_own_variable(template):
    path = template(TEMPLATE)

    def prompt_tokens(*flags: str) -> int:
        record = json.loads(invoke("run", path, "hello", "--json", *flags, grammar='root ::= "Yes."').stdout)
        return record["prompt_tokens"]

    assert prompt_tokens("--reasoning", "off") == prompt_tokens() + len("<think></think>")
    on = ("--chat-template-kwargs", '{"enable_thinking": true}')
    assert prompt_tokens("--reasoning", "off", *on) == prompt_tokens()
    assert invoke("run", path, "hello", "--reasoning", "off").stderr == ""


def test_thoughts_are_switched_off_during_a_chat(template):
    path = template(TEMPLATE)
    lines = "hello\n/stats\n/clear\n/set reasoning off\nhello\n/stats\n/clear\n/set reasoning\nhello\n/stats\n"
    result = invoke("chat", path, grammar='root ::= "Yes."', lines=lines)
    counts = [int(n) + int(m) for n, m in re.findall(r"read (\d+) tokens .*?, (\d+) were cached", result.stderr)]
    assert counts == [counts[0], counts[0] + len("<think></think>"), counts[0]]
    result = invoke("chat", template(OPENING), grammar=GOES_ON, lines="hello\n/set reasoning off\nhello\n")
    assert result.stdout.endswith("Yes.\nYes.\n")
    assert result.stderr.startswith(NO_SWITCH)


def test_a_template_that_cannot_switch_it_off(template):
    for command, text, lines in (("run", ["hello"], None), ("chat", [], "hello\n")):
        result = invoke(command, template(OPENING), *text, "--reasoning", "off", grammar=GOES_ON, lines=lines)
        assert (result.stdout, result.stderr) == ("Yes.\n", NO_SWITCH)
    result = invoke("run", template("{{ messages[0].content }}"), "hello", "--reasoning", "off")
    assert (result.stdout, result.stderr) == ("Yes.\n", "")  # it says nothing of thoughts


def test_an_answer_cut_within_its_thought(template):
    path = template(TEMPLATE)
    hidden = invoke("run", path, "hello", "-n", "20", "--reasoning", "hide", grammar=FOREVER)
    assert (hidden.stdout, hidden.stderr) == ("\n", "The model was still thinking after 20 tokens (-n).\n")
    assert invoke("run", path, "hello", "-n", "20", grammar=FOREVER).stderr == ""


# ---- in a conversation ---------------------------------------------------------------------------------------------


class Talk:
    """A conversation whose answers follow a grammar, and the tokens it evaluated."""

    def __init__(self, template: str, **options: bool) -> None:
        self.info = ModelInfo(TINY_MODEL, chat_template=template)
        self.llm = Llama(str(TINY_MODEL), n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
        self.conversation = Conversation(self.llm, self.info, **options)

    def ask(self, text: str, grammar: str) -> str:
        rules = LlamaGrammar.from_string(grammar, verbose=False)
        self.pieces = list(self.conversation.ask(text, max_tokens=80, temperature=0.0, grammar=rules))
        return "".join(piece.text for piece in self.pieces)

    def read(self) -> str:
        return bytes(self.llm.input_ids[: self.llm.n_tokens].tolist()).decode()

    def close(self) -> None:
        self.llm.close()
        self.info.close()


def test_thoughts_are_no_part_of_the_message():
    with closing(Talk(TEMPLATE)) as talk:
        assert talk.ask("A", THINKS) == WRITTEN
        assert talk.conversation.messages[-1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"}
        talk.ask("B", THINKS)
        # The template decides what the model sees of its earlier thoughts.
        assert talk.read().startswith("[user]A\n[assistant](hm)Yes.\n[user]B\n[assistant]<think>")
        assert talk.pieces[0].timings.cached_tokens == len("[user]A\n[assistant]")


def test_a_thought_that_the_template_began():
    with closing(Talk(OPENING)) as talk:
        talk.ask("A", GOES_ON)
        assert talk.conversation.messages[-1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"}
        talk.ask("B", GOES_ON)
        assert talk.read().startswith("[user]A\n[assistant]Yes.\n[user]B\n[assistant]<think>\nhm")


def test_without_thoughts_nothing_is_read_twice():
    with closing(Talk(TEMPLATE)) as talk:
        talk.ask("A", 'root ::= " Yes."')
        assert talk.conversation.messages[-1] == {"role": "assistant", "content": " Yes."}
        talk.ask("B", 'root ::= "No."')
        assert talk.pieces[0].timings.cached_tokens == len("[user]A\n[assistant] Yes.")


def test_raw_texts_keep_their_thoughts():
    with closing(Talk(TEMPLATE, raw=True)) as talk:
        talk.ask("A", THINKS)
        assert talk.conversation.messages[-1] == {"role": "assistant", "content": WRITTEN}


def test_thoughts_are_saved_and_loaded(tmp_path: Path):
    file = tmp_path / "c.json"
    with closing(Talk(TEMPLATE)) as talk:
        talk.ask("A", THINKS)
        messages = talk.conversation.messages
        talk.conversation.save(file)
        talk.conversation.save_cache(tmp_path / "c.kv")
    with closing(Talk(TEMPLATE)) as talk:
        talk.conversation.load(file)
        talk.conversation.load_cache(tmp_path / "c.kv")
        assert talk.conversation.messages == messages
        talk.ask("B", THINKS)
        assert talk.read().startswith("[user]A\n[assistant](hm)Yes.\n[user]B\n[assistant]<think>")
        saved = json.loads(file.read_text())
        for wrong in ({"reasoning_content": 5}, {"role": None}):
            file.write_text(json.dumps({"messages": [saved["messages"][0], saved["messages"][1] | wrong]}))
            with pytest.raises(ConversationError, match="message 2 is no text of role assistant"):
                talk.conversation.load(file)


# ---- real templates ------------------------------------------------------------------------------------------------

TEMPLATES = os.environ.get("SX_GGUF_TEMPLATES")  # a folder, such as models/templates of llama.cpp's source


@pytest.mark.parametrize(
    ("template", "always"),
    [
        ("{{ messages[0].content }}<think>", True),
        ("{{ messages[0].content }}", False),
        ("{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}", False),
        ("{{ messages[0].content }}{% if messages[0].enable_thinking %}<think>{% endif %}", True),
        ("<think>{{ 1 // 0 }}", False),
    ],
)
def test_templates_that_cannot_switch_thinking_off(template, always):
    with ModelInfo(TINY_MODEL, chat_template=template) as info:
        assert always_thinks(info) is always


@pytest.mark.skipif(not TEMPLATES, reason="SX_GGUF_TEMPLATES names no folder of templates")
@pytest.mark.parametrize("path", sorted(Path(TEMPLATES or "/nowhere").glob("*.jinja")), ids=lambda path: path.stem)
def test_templates_of_a_folder_without_thoughts(path: Path):
    """The variables are taken, and no thought is begun unless the user is told so."""
    text = path.read_text(encoding="utf-8")
    with ModelInfo(TINY_MODEL, chat_template=text, template_variables=OFF) as info:
        prompt = render_chat(info, [{"role": "user", "content": "Q1"}]).text
        assert "Q1" in prompt
        assert always_thinks(info) or end_of_open_thought(prompt) is None


def test_the_document_has_all_tags_and_variables():
    text = (Path(__file__).parents[1] / "docs" / "thinking.md").read_text(encoding="utf-8").replace("\\|", "|")
    assert [t for t in FAMILIES if f"`{t.begin.strip()}` ... `{t.end}`" not in text] == []
    assert [name for name in OFF if f"`{name}`" not in text] == []
