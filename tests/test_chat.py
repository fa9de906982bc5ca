"""`sx-gguf chat` as a user meets it: on a pseudo-terminal whose screen is rendered, and in a pipe."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from click.testing import CliRunner, Result
from held import ANSWERED, READ
from terminal import COMMAND, GIVE_UP, Terminal

from selfextend_gguf.cli import main
from selfextend_gguf.devices import placement, usual_layers
from selfextend_gguf.models import TINY_MODEL

MODEL = str(TINY_MODEL)
FACT = "And it came to pass. The stone key is 57901."
QUESTION = "What is the stone key? The stone key is "
NO_TEMPLATE = "The model has no chat template: texts are continued as they are."


def piped(*arguments: str, lines: str | bytes, model: str = MODEL) -> Result:
    return CliRunner().invoke(main, ["chat", model, *arguments], input=lines)


# ---- on a terminal -------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(request):
    """Starts `sx-gguf` on a terminal; with a folder in `held`, the one that waits (see held.py)."""

    def make(*arguments: str, held: Path | None = None, **size: int) -> Terminal:
        command = [COMMAND] if held is None else [sys.executable, str(Path(__file__).with_name("held.py")), str(held)]
        one = Terminal(*command, *arguments, **size)
        request.addfinalizer(lambda: one.program.close(force=True))
        one.until(r"^>$")
        return one

    return make


def test_a_conversation(terminal, tmp_path):
    file = tmp_path / "c.json"
    term = terminal("chat", MODEL, "-n", "5", "--temp", "0")
    assert term.lines() == [
        f"{TINY_MODEL.name}, context 1024 tokens (trained on 256), {placement(usual_layers())}. /help for help.",
        NO_TEMPLATE,
        ">",
    ]
    term.enter(FACT)
    assert term.enter(QUESTION)[-3:] == ["> " + QUESTION.rstrip(), "57901", ">"]
    assert term.enter("/undo")[-2:] == ["Taken back: What is the stone key? The stone key is", ">"]
    assert term.enter(QUESTION)[-3:] == ["> " + QUESTION.rstrip(), "57901", ">"]
    assert term.enter("/regen")[-3:] == ["> /regen", "57901", ">"]
    assert term.enter("/what")[-2].startswith("Error: no command /what: see /help")
    assert term.enter(f"/save {file}")[-2].endswith("4 messages saved.")
    term.type("\x04")
    assert term.exit_code() == 0
    messages = json.loads(file.read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == [FACT, QUESTION]
    assert messages[-1]["content"] == "57901"

    # `run` without a prompt is a chat, with run's options.
    term = terminal("run", MODEL, "-n", "5", "--temp", "0", "-c", "2048")
    assert "context 2048 tokens" in term.lines()[0]
    assert term.enter(f"/load {file}")[-2].endswith("4 messages loaded.")
    # The last digit was sampled and not read; so what is new is that and the question.
    assert term.enter(QUESTION)[-2] == "57901"
    assert re.search(rf"read {len('1' + QUESTION)} tokens \(.*\), \d\d\d? were cached", "\n".join(term.enter("/stats")))
    term.enter("/undo")
    term.type("/exit\r")
    assert term.exit_code() == 0


def test_run_as_a_chat_takes_the_settings_of_chat_and_what_it_was_given(terminal, tmp_path, monkeypatch):
    (tmp_path / "config.toml").write_text("[chat]\npredict = 3\ntemp = 0\n[run]\npredict = 4\nctx = 1024")
    monkeypatch.setenv("SX_GGUF_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("SX_GGUF_RUN_CTX", "512")
    term = terminal("run", MODEL, "--system", "x")
    assert "context 512 tokens" in term.lines()[0]
    assert term.enter(FACT + " " + QUESTION)[-2] == "579"


def test_line_editing(terminal, tmp_path):
    file = tmp_path / "c.json"
    term = terminal("chat", MODEL, "-n", "1", "--temp", "0")
    term.type("one\\\r")  # Enter after a backslash
    term.until(r"^> one\n$|^> one$")
    term.type("two\x1b\r")  # Alt-Enter
    term.type("three\r")
    term.until(r"^  two\n  three\n(.|\n)*^>$")
    term.type("\x1b[200~pasted\r\n/help\r\ntext\x1b[201~")
    term.until(r"^> pasted\n  /help\n  text$")
    term.type("\r")
    term.until(r"text\n(.|\n)*^>$")
    term.type("never sent\x03")  # Ctrl-C clears the line
    term.until(r"never sent(.|\n)*^>$")
    term.type("\x1b[A")  # the last message again
    term.until(r"^> pasted\n  /help\n  text\Z")
    term.type("\x03")
    term.until(r"text(.|\n)*^>$\Z")
    term.enter("//slash")
    term.enter(f"/save {file}")
    term.type("\x04")
    assert term.exit_code() == 0
    messages = [m["content"] for m in json.loads(file.read_text())["messages"][::2]]
    assert messages == ["one\ntwo\nthree", "pasted\n/help\ntext", "/slash"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, where the history of chats is kept."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("SX_GGUF_NO_HISTORY")
    return tmp_path


def test_messages_are_there_in_the_next_chat(terminal, home):
    term = terminal("chat", MODEL, "-n", "1")
    term.type("\x1b[200~one\ntwo\x1b[201~\r")
    term.until(r"two\n(.|\n)*^>\Z")
    term.enter("/stats")
    term.enter("\N{CYRILLIC SMALL LETTER ZHE}")
    term.type("\x1b[200~" + "long " * 3000 + "\x1b[201~\x03")  # not sent, so not kept
    term.until(r"long(.|\n)*^>\Z")
    term.type("\x04")
    assert term.exit_code() == 0
    file = next(home.rglob("chat-history"))
    assert file.stat().st_mode & 0o077 == 0
    assert file.read_text().count("\n+") == 4

    term = terminal("chat", MODEL, "-n", "1")
    for shown in "\N{CYRILLIC SMALL LETTER ZHE}", "/stats", "one\n  two":
        term.type("\x1b[A")
        term.until(rf"^> {shown}\Z")
    term.type("\x03")
    term.until(r"two(.|\n)*^>\Z")
    term.enter("/exi")
    (term := terminal("chat", MODEL, "--no-history")).type("\x1b[A")
    term.enter("new")
    assert "new" not in file.read_text()


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGBUS])
def test_a_conversation_outlives_the_program(terminal, home, way):
    """However it ends: SIGBUS is what reading a mapped file that has been cut off ends in."""
    term = terminal("chat", MODEL, "-n", "4", "--temp", "0")
    assert not any("/load" in line for line in term.lines())
    answer = term.enter("hello")[-2]
    term.kill(way)
    (file,) = [file for file in home.rglob("last-chat.json") if file.is_file()]
    assert file.stat().st_mode & 0o077 == 0
    term = terminal("chat", MODEL, "-n", "4", "--temp", "0")
    assert any("/load takes up the last conversation." in line for line in term.lines())
    assert term.enter("/load")[-2] == "The last conversation: 2 messages loaded."
    assert term.enter("/regen")[-2] == answer
    assert json.loads(file.read_text())["messages"][0] == {"role": "user", "content": "hello"}
    assert piped(lines="/load\n/stats\n").stderr.splitlines()[1] == "The last conversation: 2 messages loaded."


def test_no_history_keeps_no_conversation(terminal, home):
    terminal("chat", MODEL, "-n", "1", "--no-history").enter("hello")
    assert not list(home.rglob("*.json"))
    assert "Error: there is no earlier conversation: usage: /load FILE" in piped(lines="/load\n").stderr


def test_a_history_that_cannot_be_written_is_a_warning(terminal, home):
    (home / "state").write_text("no folder")
    (home / "Library").write_text("no folder")
    term = terminal("chat", MODEL, "-n", "1")
    assert any(
        line.startswith("Warning: what is typed is not kept for the next chat: [Errno ") for line in term.lines()
    )
    term.enter("hello")
    term.type("\x1b[A")
    term.until(r"^> hello\Z")


def test_tab_completes_commands_and_paths(terminal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some book.txt").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "c.json").touch()
    term = terminal("chat", MODEL, "-n", "1")
    term.type("/fi\tsom\t")
    term.until(r"^> /file some book\.txt\Z")
    term.type("\r")
    term.until(r"^some book\.txt: 4 tokens(.|\n)*^>\Z")
    for typed, shown in [
        ("/file --pages 3 so\t", "/file --pages 3 some book.txt"),
        ("/load fol\t/\t", "/load folder/c.json"),
        ("/system so\t", "/system so"),
        ("/set top-n\t", "/set top-nsigma"),
        ("so\t", "so"),
        ("//fi\t", "//fi"),
    ]:
        term.type(typed)
        term.until(rf"^> {re.escape(shown)}\Z")
        term.type("\x03")
        term.until(r"^>\Z")
    term.type("/s\t")  # several
    term.until(r"^/system +/set +/save +/stats")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems always have a clipboard")
def test_copy(terminal, tmp_path, monkeypatch):
    programs, copied = tmp_path / "bin", tmp_path / "copied"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    (programs / "xclip").write_text(f"#!/bin/sh\ncat > {copied}\n")
    (programs / "xclip").chmod(0o755)
    answer = ["chat", MODEL, "-n", "5", "--temp", "0"]
    term = terminal(*answer)
    term.enter(FACT + " " + QUESTION)
    assert term.enter("/copy")[-2] == "5 characters copied to the clipboard."
    assert copied.read_text() == "57901"

    monkeypatch.delenv("DISPLAY")
    term = terminal(*answer)
    term.enter(FACT + " " + QUESTION)
    assert term.enter("/copy")[-2].startswith("5 characters copied to the terminal's clipboard")
    assert "\x1b]52;c;NTc5MDE=\a" in term.received
    result = piped("-n", "1", lines="hello\n/copy\n")
    assert result.stderr.endswith("Error: there is no clipboard: this is no terminal, and no xclip or wl-copy\n")


def test_ctrl_c_stops_an_answer_and_a_reading(terminal, tmp_path, heldout_text):
    saved, book = tmp_path / "c.json", tmp_path / "book.txt"
    book.write_text(heldout_text[:1500])
    for moment in ("reading", "answer"):
        (tmp_path / moment).touch()
    term = terminal("chat", MODEL, "-c", "2048", "-n", "1000", "--temp", "0.9", "--seed", "1", held=tmp_path)
    term.type("In the beginning\r")
    term.until(r"beginning\n(.+\n)+.+")
    term.type("\x03")
    term.until(r"^>\Z")
    term.enter(f"/save {saved}")
    message, answer = json.loads(saved.read_text())["messages"]
    assert message["content"] == "In the beginning"
    assert 0 < len(answer["content"]) <= ANSWERED

    assert term.enter(f"/file {book}")[-2].endswith(
        "1500 tokens, 73% of the context of 2048, to be read before the next message."
    )
    term.type("And so\r")
    term.until(r"^Reading +\|.*\| +[3-9]\d\d of 15\d\d tokens, [\d.]+ tokens/s, \S+ left")
    term.type("\x03")
    line = term.until(r"^Interrupted after .*\n>\Z")[-2]
    read, total = map(
        int, re.fullmatch(r"Interrupted .* (\d+) of (\d+) tokens; the message is taken back.", line).groups()
    )
    assert READ <= read < total
    term.enter(f"/save {saved}")
    assert len(json.loads(saved.read_text())["messages"]) == 2

    term.type("\x0c")  # an empty screen
    term.until(r"\A>\Z")
    term.type("And so\r")  # the file is still attached; its beginning is still in the cache
    term.until(rf"^Reading .*[3-9]\d\d of {total - read} tokens")
    (tmp_path / "reading").unlink()
    term.until(r"And so\n(?!Reading).+\n.+")
    term.type("\x03")
    lines = term.until(r"^>\Z")
    assert not [line for line in lines if line.startswith("Reading")]  # the bar is gone when the answer begins
    term.enter(f"/save {saved}")
    messages = json.loads(saved.read_text())["messages"]
    assert messages[2]["content"] == heldout_text[:1500].rstrip() + "\n\nAnd so"
    assert len(messages) == 4
    term.type("\x04")
    assert term.exit_code() == 0


def test_the_bar_fits_a_narrow_terminal(terminal, tmp_path, heldout_text):
    book = tmp_path / "book.txt"
    book.write_text(heldout_text[:1500])
    (tmp_path / "reading").touch()
    term = terminal("chat", MODEL, "-c", "2048", "-n", "5", "--temp", "0", held=tmp_path, columns=70)
    term.type(f"/file {book}\r")
    term.until(r"next\s+message(.|\n)*^>\Z")  # however long the path is
    term.type("\x0cAnd so\r")
    lines = term.until(r"^Reading .*[3-9]\d\d of 15\d\d tokens, .* left$")
    assert [line for line in lines if line.startswith("Reading")] == lines[1:]  # one line, drawn over itself
    (tmp_path / "reading").unlink()
    term.until(r"^> And so\n(?!Reading).+\n>\Z")


THINKING = "{% for m in messages %}{{ m.content }}|{% endfor %}{% if enable_thinking == false %}no{% endif %}<think>"
THOUGHT = 'root ::= "hm" "</think>" "Yes."'


def dimmed(text: str) -> str:
    """What of a terminal's input is dimmed."""
    return "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", text))


@pytest.mark.parametrize(
    ("flags", "colours", "answer", "dim"),
    [
        ([], True, "hm</think>Yes.", "hm</think>"),
        ([], False, "hm</think>Yes.", ""),
        (["--reasoning", "hide"], True, "Yes.", ""),
        (["--reasoning", "off"], True, "Yes.", ""),
    ],
)
def test_thoughts_on_a_terminal(terminal, tmp_path, monkeypatch, flags, colours, answer, dim):
    monkeypatch.setenv("NO_COLOR", "" if colours else "1")
    (tmp_path / "t").write_text(THINKING)
    options = ["-t", "1", "-c", "256", "--chat-template", str(tmp_path / "t"), "--grammar", THOUGHT, *flags]
    term = terminal("chat", MODEL, *options)
    n_before = len(term.received)
    assert term.enter("What?")[-3:] == ["> What?", answer, ">"]
    assert re.sub(r"Thinking \.\.\. \d+ tokens", "", dimmed(term.received[n_before:])) == dim
    assert ("Thinking ... 2 tokens" in term.received) == (answer == "Yes.")  # and is gone when the answer begins
    n_read = len("What?|<think>") + 2 * ("off" in flags)
    assert any(f"read {n_read} tokens" in line for line in term.enter("/stats"))
    term.type("\x04")
    assert term.exit_code() == 0


@pytest.mark.parametrize(("no_color", "error"), [("", "\x1b[31mError:\x1b[0m"), ("1", "Error:")])
def test_notes_on_a_terminal_are_coloured_unless_the_user_wants_none(terminal, monkeypatch, no_color, error):
    monkeypatch.setenv("NO_COLOR", no_color)
    term = terminal("chat", MODEL, "-n", "1")
    assert term.enter("/undo")[-2] == "Error: there is nothing to take back"
    assert (NO_TEMPLATE in dimmed(term.received)) == (not no_color)
    assert f"{error} there is nothing" in term.received


def test_thoughts_of_run_on_a_terminal(tmp_path):
    (tmp_path / "t").write_text(THINKING)
    options = ["-t", "1", "--chat-template", str(tmp_path / "t"), "--grammar", THOUGHT]
    for variables, answer in ({"NO_COLOR": ""}, "hm</think>"), ({"NO_COLOR": "1"}, ""), ({"TERM": "dumb"}, ""):
        environment = {**os.environ, "TERM": "xterm", **variables}
        program = pexpect.spawn(
            COMMAND, ["run", MODEL, "What?", *options], env=environment, encoding="utf-8", timeout=GIVE_UP
        )
        program.expect(pexpect.EOF)
        program.close()
        assert dimmed(program.before) == answer
        assert re.sub(r"\x1b\[[0-9]m", "", program.before).endswith("hm</think>Yes.\r\n")


def test_run_without_a_prompt_asks_for_one_where_no_chat_is_possible():
    program = pexpect.spawn(COMMAND, ["run", MODEL, "--json"], encoding="utf-8", timeout=GIVE_UP)
    program.expect(pexpect.EOF)
    program.close()
    assert program.exitstatus == 2
    assert "Error: no prompt: give it as an argument" in program.before


# ---- in a pipe -----------------------------------------------------------------------------------------------


def test_each_line_is_a_message():
    result = piped("-n", "5", "--temp", "0", lines=f"{FACT}\n{QUESTION}\n/undo\n{QUESTION}\n/regen\n")
    first = piped("-n", "5", "--temp", "0", lines=f"{FACT}\n").stdout
    assert result.exit_code == 0
    assert len(first) == 6
    assert result.stdout == first + "57901\n57901\n57901\n"
    assert result.stderr.splitlines() == [NO_TEMPLATE, "Taken back: What is the stone key? The stone key is"]


def test_in_a_process_of_its_own():
    """llama.cpp writes to file descriptors; no terminal's escape sequences may come through."""
    done = subprocess.run(
        [COMMAND, "chat", MODEL, "-n", "5", "--temp", "0", "--raw"],
        input=f"{FACT}\\\n{QUESTION}",  # goes on in the next line, and no line break at the end
        capture_output=True,
        text=True,
        timeout=GIVE_UP,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "57901\n", "")


def test_ctrl_c_in_a_pipe_ends_the_chat_and_keeps_the_text_so_far():
    process = subprocess.Popen(
        [COMMAND, "chat", MODEL, "--raw", "-c", "20000", "-n", "19000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pipesize=4096,  # when the pipe is full the answer waits for its reader
    )
    process.stdin.write(b"In the beginning\nnever answered\n")
    process.stdin.flush()
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=GIVE_UP)
    assert process.returncode == 130
    assert len(first) == 20
    assert rest.endswith(b"\n")
    assert error == b"Interrupted.\n"


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_an_answer_given_anew_is_as_good_as_the_first(heldout_text, kind):
    """Rolling back keys of such a type rounds them; twenty times, and q4_0 answers are gibberish."""
    message = heldout_text[3000:3700].replace("\n", " ")  # almost three trained contexts
    options = ("-ctk", kind, "-c", "1024", "-n", "24", "--temp", "0", "-t", "1")
    first, *rest = piped(*options, lines=f"{message}\n" + "/regen\n" * 20).stdout.splitlines()
    assert rest == [first] * 20
    undone = piped(*options, lines=f"{message}\n" + "And so\n/undo\n" * 8 + "/regen\n").stdout.splitlines()
    assert undone[-1] == first


@pytest.mark.parametrize("lines", ["", "\n", "   \n\n"])
def test_nothing_to_say(lines):
    result = piped(lines=lines)
    assert (result.exit_code, result.stdout) == (0, "")


def test_the_end_of_input_is_not_needed():
    assert piped("-n", "5", "--temp", "0", lines=f"/exit\n{FACT}\n").stdout == ""


def test_a_file_before_a_message(tmp_path, heldout_text):
    file = tmp_path / "text.txt"
    file.write_text(heldout_text[:300] + f"\n{FACT}\n{heldout_text[300:500]}\n\n\n")
    lines = f"/file {file}\n{QUESTION}\n/undo\n/stats\n"
    result = piped("-n", "5", "--temp", "0", lines=lines)
    assert result.stdout == "57901\n"
    assert re.search(
        rf"{file}: {file.stat().st_size} tokens, \d+% of the context of \d+, to be read before the next message.",
        result.stderr,
    )
    assert f"read {len(file.read_text().rstrip() + QUESTION) + 2} tokens" in result.stderr
    assert piped("-n", "5", "--temp", "0", "-f", str(file), lines=QUESTION).stdout == "57901\n"


def test_commands_report_mistakes_in_a_line(tmp_path):
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(range(256)))
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    mistakes = {
        "/nonsense": "no command /nonsense: see /help, or begin a message with // for a slash",
        "/": "no command /: see /help, or begin a message with // for a slash",
        "/undo": "there is nothing to take back",
        "/regen": "there is no message to answer",
        "/undo 3": "usage: /undo",
        "/copy": "there is no answer to copy",
        "/file": "usage: /file PATH",
        "/file no-such-file": "[Errno 2] No such file or directory: 'no-such-file'",
        "/file ~nobody-of-that-name/x": "[Errno 2] No such file or directory: '~nobody-of-that-name/x'",
        f"/file {noise}": f"{noise} is binary, no text",
        f"/load {bad}": f"{bad} is no saved conversation: there is no list of messages",
        "/save": "usage: /save FILE",
        f"/save {tmp_path}/none/c.json": f"[Errno 2] No such file or directory: '{tmp_path}/none/c.json'",
        "/set tempp 1": "no option tempp: /set lists them",
        "/set temp hot": "Invalid value for '--temp': 'hot' is not a valid float range.",
        "/set temp nan": "temperature must be a finite number, not nan",
        "/set n 0": "Invalid value: 0 is neither a number of tokens nor -1",
        "/set repeat-last-n 99999999999": "last_n_tokens_size must be between 0 and 1073741824, not 99999999999",
        "/set j {": "'{' is no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "/set reasoning of": "Invalid value for '--reasoning': 'of' is not one of 'show', 'hide', 'off'.",
        "x" * 1100: "Requested tokens (1100) exceed context window of 1024: /undo, /clear or a larger --ctx make room",
    }
    result = piped("-n", "5", "--temp", "0", lines="\n".join([*mistakes, FACT, QUESTION]))
    assert result.exit_code == 0
    assert result.stdout.endswith("\n57901\n")
    assert result.stdout.count("\n") == 2
    assert result.stderr.splitlines() == [NO_TEMPLATE, *(f"Error: {m}" for m in mistakes.values())]


def test_a_line_that_is_not_utf8_is_left_out():
    result = piped("-n", "5", "--temp", "0", lines=FACT.encode() + b"\n\xff\xfe\n" + QUESTION.encode())
    assert result.exit_code == 0
    assert result.stdout.endswith("\n57901\n")
    assert "Error: line 2 is not UTF-8 text: invalid byte at offset 0" in result.stderr


def test_save_and_load(tmp_path):
    file = tmp_path / "c.json"
    piped("-n", "5", "--temp", "0", lines=f"{FACT}\n/save {file}\n")
    lines = f"/load {file}\n{QUESTION}\n/stats\n"
    result = piped("-n", "5", "--temp", "0", lines=lines)
    assert result.stdout == "57901\n"
    assert f"read {len('x' + QUESTION)} tokens" in result.stderr

    cache = tmp_path / "c.json.kv"
    for damage in (lambda: cache.write_bytes(cache.read_bytes()[:1000]), cache.unlink):
        damage()
        result = piped("-n", "5", "--temp", "0", lines=lines)
        assert result.stdout == "57901\n"
        warnings = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
        assert len(warnings) == 1
        assert warnings[0].endswith(": the text is read again at the next message.")
        assert f"read {len(FACT + QUESTION) + 5} tokens" in result.stderr


def test_clear_and_system(tmp_path):
    file = tmp_path / "c.json"
    result = piped("-n", "5", lines=f"{FACT}\n/system A tale.\n/clear\nhello\n/save {file}\n/system\n/save {file}.2\n")
    assert result.exit_code == 0, result.stderr
    saved = json.loads(file.read_text())
    assert saved["system"] == "A tale."
    assert [m["content"] for m in saved["messages"][::2]] == ["hello"]
    assert json.loads(Path(f"{file}.2").read_text())["system"] is None


def test_help_names_every_command():
    from selfextend_gguf.cli.chat import COMMANDS

    lines = piped(lines="/help").stderr.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("/")] == [f"/{name}" for name in COMMANDS]


def test_set_changes_how_answers_are_sampled(tmp_path):
    (tmp_path / "config.toml").write_text("grammar = 'root ::= \"c\"'")
    lines = [
        *(
            "hello",
            '/set json-schema {"const": 12}',
            "hello",
            "/set json-schema",
            "hello",
        ),  # before what is in the file
        *('/set grammar root ::= "abc"', "hello"),
        *("/set -n 2", "hello", "/set n 5", '/set json-schema {"const": 12}', "/set grammar", "hello"),
        *('/set json-schema {"const": 12}', "hello", "/set json-schema", "/set temp 0", FACT + " " + QUESTION),
        *("/set logit-bias 65+1000", "hello", "/set logit-bias 65+1000 65-inf 66+900", "hello"),
    ]
    environment = {"SX_GGUF_CONFIG": str(tmp_path / "config.toml")}
    result = CliRunner(env=environment).invoke(main, ["chat", MODEL, "-n", "4"], input="\n".join(lines))
    assert result.exit_code == 0
    answers = result.stdout.splitlines()
    assert answers[:5] == ["c", "12", "c", "abc", "ab"]
    assert answers[-4:] == ["12", "57901", "AAAAA", "BBBBB"]
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert errors == ["Error: give --grammar or --json-schema, not both"]


def test_set_lists_the_options():
    result = piped("--temp", "0.5", "--ignore-eos", lines="/set\n/set temp 0\n/set ignore-eos\n/set\n")
    before, after = " ".join(result.stderr.splitlines()).split("ignore-eos: the default")
    assert "temp 0.5," in before and "ignore-eos True," in before
    assert "temp 0.0," in after and "ignore-eos," in after


def test_setting_a_seed_begins_a_sequence_of_answers():
    lines = "/set seed 5\nIn the beginning\n/regen\n/set seed 5\n/set temp 1.5\n/regen\n/regen\n"
    flags = ["-n", "30", "--temp", "1.5", "--raw", "--logit-bias", "10-inf"]  # an answer is a line
    first, second, *again = piped(*flags, lines=lines).stdout.splitlines()
    assert again == [first, second]
    assert first != second


def test_a_seed_makes_a_conversation_and_not_each_answer():
    lines = "In the beginning\n/regen\n"
    answers = [piped("-n", "40", "--temp", "1.5", "--seed", seed, lines=lines).stdout for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]
    model, again = answers[0].rstrip("\n")[:30], answers[0].rstrip("\n")[-30:]
    assert model != again


def test_an_answer_that_is_cut_says_so(model):
    path = str(model("bundled-chat"))
    result = piped("-n", "4", "--temp", "0", lines="hello", model=path)
    assert result.stderr == "The answer was cut after 4 tokens (-n).\n"
    result = piped("-n", "400", "--temp", "0", "-c", "256", lines="x" * 200, model=path)
    assert result.stderr == "The context is full: /undo, /clear or a larger --ctx make room.\n"


# ---- the context ---------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_extended_talks_within_its_trained_context(model):
    path = str(model("hunyuan-dense"))
    result = piped("-n", "2", "--temp", "0", "--raw", lines="hello\n/stats\n", model=path)
    assert result.exit_code == 0
    assert "The context is the trained one, 64 tokens: layer 0 passes its rotated keys through MUL" in result.stderr
    assert "Self-Extend  not needed" in result.stderr
    assert len(result.stdout) > 1
    refused = piped("-c", "512", lines="hello\n", model=path)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: layer 0 passes its rotated keys through MUL")


def test_numbers_are_checked_at_the_start():
    result = piped("-c", "1000000", lines="hello")
    assert result.exit_code == 1
    assert "beyond the reach of Self-Extend" in result.stderr
    assert piped("-gaw", "1000", lines="hello").exit_code == 1
