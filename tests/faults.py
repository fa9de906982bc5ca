"""What a user sees when something around the program breaks, and what is kept.

    python tests/faults.py

Makes each fault happen to the bundled model, and writes the table in docs/robustness.md; tests/test_faults.py compares.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from terminal import COMMAND, Terminal

from selfextend_gguf.models import TINY_MODEL

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "robustness.md"
BEGIN, END = "<!-- written by tests/faults.py -->\n", "<!-- until here -->\n"
TEXT = (Path(__file__).parent / "data" / "heldout.txt").read_text(encoding="ascii")
WAIT = 60  # seconds, for anything


class NotPossibleError(RuntimeError):
    """The fault cannot be made to happen here, for want of rights."""


@dataclass(frozen=True)
class Outcome:
    """Columns of the table; `seen` with the names of files and folders left out."""

    seen: str
    kept: str


@dataclass(frozen=True)
class Fault:
    name: str
    happens: Callable[[Path], Outcome]  #: in an empty folder


def run(
    folder: Path, *options: str, prepare: Callable[[], None] | None = None, text: str = TEXT[:3000], **how: object
) -> subprocess.CompletedProcess[str]:
    """`sx-gguf run` of some tokens."""
    (folder / "text.txt").write_text(text)
    arguments = [COMMAND, "run", str(TINY_MODEL), "-f", str(folder / "text.txt"), "-n", "20", "--temp", "0", *options]
    how = {"stdout": subprocess.PIPE} | how
    return subprocess.run(arguments, stderr=subprocess.PIPE, text=True, preexec_fn=prepare, timeout=WAIT, **how)


def last_line(text: str, folder: Path) -> str:
    """Of standard error: `code` without folders, "nothing" if there is none."""
    lines = text.replace(f"{folder}/", "").strip().splitlines()
    return f"`{lines[-1]}`" if lines else "nothing"


def check(condition: object, what: object = "") -> None:
    if not condition:
        raise AssertionError(what)


ANSWER = "the answer"


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A file system of 200 KiB."""
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size=200k,{options}", "tmpfs", disk], capture_output=True
    ).returncode:
        raise NotPossibleError("mounting a file system needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def disk_without_room(options: str, folder: Path) -> Outcome:
    wanted = run(folder).stdout
    with small_disk(folder, options) as disk:
        done = run(folder, "--prompt-cache", str(disk / "text.kv"))
        check((done.returncode, done.stdout) == (0, wanted), done)
        check(not list(disk.iterdir()), "something is left")
        return Outcome(last_line(done.stderr, disk), ANSWER)


def older_file_on_a_full_disk(folder: Path) -> Outcome:
    """The cache of a short text is there; that of a longer one has no room."""
    with small_disk(folder, "rw") as disk:
        cache = disk / "text.kv"
        check(run(folder, "--prompt-cache", str(cache), text=TEXT[:40]).returncode == 0)
        before = cache.read_bytes()
        done = run(folder, "--prompt-cache", str(cache))
        check(done.returncode == 0 and cache.read_bytes() == before, done)
        check(len(list(disk.iterdir())) == 1, "something is left")
        return Outcome(last_line(done.stderr, disk), f"{ANSWER}, and the older file as it was")


def full_output(folder: Path) -> Outcome:
    with Path("/dev/full").open("w") as full:
        done = run(folder, stdout=full)
    check(done.returncode == 1)
    return Outcome(last_line(done.stderr, folder), "what was written before")


def closed_output(folder: Path) -> Outcome:
    read, write = os.pipe()
    os.close(read)
    done = run(folder, stdout=write)
    os.close(write)
    check(done.returncode == 1)
    return Outcome(last_line(done.stderr, folder), "what was read before")


def stalled_output(folder: Path) -> Outcome:
    """Nobody reads for a while, and the pipe is full."""
    wanted = run(folder, "-n", "300").stdout
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"." * 512)
    os.set_blocking(write, True)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(run, folder, "-n", "300", stdout=write)
        time.sleep(2)
        check(not done.done(), "it did not wait")
        received = b""
        while not done.done() or select.select([read], [], [], 0)[0]:
            if select.select([read], [], [], 0.1)[0]:
                received += os.read(read, 65536)
    os.close(write)
    os.close(read)
    check(received.lstrip(b".").decode() == wanted.lstrip("."), received)
    check(done.result().returncode == 0)
    return Outcome("a pause", "everything: it goes on when somebody reads")


def limited(kind: int, limit: int, reason: str, folder: Path) -> Outcome:
    """Which of all requests is refused first depends on the machine."""
    done = run(folder, "-c", "16384", prepare=lambda: resource.setrlimit(kind, (limit, limit)))
    check(done.returncode == 1 and not done.stdout, done)
    check(re.fullmatch(f"Error: .*{reason}.*\n", done.stderr), done.stderr)
    return Outcome(f"one line: `Error: … {reason} …`", "nothing was begun")


def ended(way: signal.Signals, folder: Path) -> Outcome:
    """While a long text is read, of which a cache is kept."""
    cache = folder / "text.kv"
    check(run(folder, "--prompt-cache", str(cache), text=TEXT[:2000]).returncode == 0)
    before = cache.read_bytes()
    (folder / "text.txt").write_text(TEXT[:24000])
    command = [
        COMMAND,
        "run",
        str(TINY_MODEL),
        "-f",
        str(folder / "text.txt"),
        "-b",
        "64",
        "--prompt-cache",
        str(cache),
    ]
    program = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(way, signal.SIG_DFL) if way != signal.SIGKILL else None,
    )
    time.sleep(2)  # it loads, and begins to read
    check(program.poll() is None, "it was faster")
    program.send_signal(way)
    said = program.communicate(timeout=WAIT)[1]
    check(program.returncode == -way, program.returncode)
    check(cache.read_bytes() == before and {f.name for f in folder.iterdir()} >= {"text.kv"})
    done = run(folder, "--prompt-cache", str(cache), text=TEXT[:2000])
    check(done.returncode == 0 and not done.stderr, done)
    check(not [f for f in folder.iterdir() if f.name not in ("text.kv", "text.txt")], "something is left")
    return Outcome(last_line(said, folder), "the cache as it was, which the next call uses")


class Chat(Terminal):
    """A chat that keeps its conversation under `home`."""

    def __init__(self, home: Path, model: Path = TINY_MODEL) -> None:
        # Tests keep nothing unless they say so.
        environment = {"HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "SX_GGUF_NO_HISTORY": "false"}
        super().__init__(COMMAND, "chat", str(model), "-n", "4", "--temp", "0", environment=environment)
        self.until(r"^>\Z")

    def ended_by(self, way: signal.Signals) -> bool:
        self.exit_code()
        return self.program.signalstatus == way


def check_kept(home: Path) -> None:
    """The next chat finds the conversation, of one message and its answer."""
    said = Chat(home).enter("/load")[-2]
    check(said == "The last conversation: 2 messages loaded.", said)


def chat_ended(way: signal.Signals, folder: Path) -> Outcome:
    chat = Chat(folder)
    chat.enter("hello")
    chat.program.kill(way)
    check(chat.ended_by(way))
    check_kept(folder)
    return Outcome("nothing", "the conversation, but for a running answer: `/load` in the next chat")


def model_cut_off(folder: Path) -> Outcome:
    """As by a network share that disappears: what was mapped is no longer there."""
    model = folder / "model.gguf"
    shutil.copy(TINY_MODEL, model)
    chat = Chat(folder, model)
    chat.enter("hello")
    os.truncate(model, 4096)
    chat.type("more\r")
    check(chat.ended_by(signal.SIGBUS))
    check_kept(folder)
    return Outcome("nothing: the system ends the program", "the conversation: `/load` in the next chat")


def model_replaced(folder: Path) -> Outcome:
    """A new file in the place of one that is in use, as `mv` or a download puts it there."""
    model = folder / "model.gguf"
    shutil.copy(TINY_MODEL, model)
    (folder / "new.gguf").write_bytes(b"no model")
    chat = Chat(folder, model)
    answer = chat.enter("hello")[-2]
    (folder / "new.gguf").replace(model)
    again = chat.enter("/regen")[-2]
    check(answer == again, (answer, again))
    return Outcome("nothing", "the running chat goes on with the old file")


def terminal_closed(folder: Path) -> Outcome:
    chat = Chat(folder)
    chat.enter("hello")
    os.close(chat.program.child_fd)
    end = time.monotonic() + WAIT
    while chat.program.isalive() and time.monotonic() < end:
        time.sleep(0.05)
    check(not chat.program.isalive(), "it is still there")
    check_kept(folder)
    return Outcome("nothing", "the conversation: `/load` in the next chat")


def clock_backwards(folder: Path) -> Outcome:
    """What was written is dated a year ahead."""
    wanted = run(folder, "--prompt-cache", str(folder / "text.kv"), "--json")
    chat = Chat(folder)
    chat.enter("hello")
    chat.program.close(force=True)
    for file in folder.rglob("*"):
        os.utime(file, (time.time() + 3.2e7,) * 2)
    done = run(folder, "--prompt-cache", str(folder / "text.kv"), "--json")
    record = json.loads(done.stdout)
    check(not done.stderr and record["text"] == json.loads(wanted.stdout)["text"])
    check(record["cached_tokens"] >= record["prompt_tokens"] - 1, record)
    check_kept(folder)
    return Outcome("nothing", "everything: prompt caches and conversations are not judged by their date")


def sharing(n: int, folder: Path) -> Outcome:
    """Programs that read, write and drop in one folder at once; room is there for a few of their prompts."""
    code = f"""
import sys
from pathlib import Path
from selfextend_gguf.server.kept_prompts import KeptPrompts, RememberingLlama
number = int(sys.argv[1])
llm = RememberingLlama({str(TINY_MODEL)!r}, n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False)
llm.kept_prompts = KeptPrompts(3 * 2**20, Path({str(folder / "kept")!r}))
for begin in (number % 7, number % 3, 7):
    prompt = {TEXT[:9000]!r}[500 * begin :][:600]
    print(begin, llm.create_completion(prompt, max_tokens=8, temperature=0)["choices"][0]["text"].encode().hex())
"""
    (folder / "kept").mkdir()
    (folder / "program.py").write_text(code)
    with ThreadPoolExecutor(min(n, 16)) as pool:
        jobs = pool.map(
            lambda number: subprocess.run(
                [sys.executable, str(folder / "program.py"), str(number)], capture_output=True, text=True, timeout=600
            ),
            range(n),
        )
        done = list(jobs)
    failed = [job.stderr for job in done if job.returncode]
    check(not failed, failed[:1])
    answers = {line for job in done for line in job.stdout.splitlines()}
    check(len(answers) == len({line.split()[0] for line in answers}), answers)
    size = sum(file.stat().st_size for file in (folder / "kept").iterdir())
    check(size <= 6 * 2**20, size)
    return Outcome("nothing", "all answers are right, and the files within their size")


def faults(n_sharing: int = 100) -> list[Fault]:
    """All of them; `n_sharing` programs share a folder."""
    kill, term, hup = signal.SIGKILL, signal.SIGTERM, signal.SIGHUP
    return [
        Fault("`kill -9` while a text is read", partial(ended, kill)),
        Fault("SIGTERM while a text is read", partial(ended, term)),
        Fault("SIGHUP while a text is read", partial(ended, hup)),
        Fault("`kill -9` in a chat", partial(chat_ended, kill)),
        Fault("SIGTERM in a chat", partial(chat_ended, term)),
        Fault("the terminal of a chat is closed", terminal_closed),
        Fault("the model's file is cut off while it is in use", model_cut_off),
        Fault("the model's file is replaced while it is in use", model_replaced),
        Fault("no room on the disk for a prompt cache", partial(disk_without_room, "rw")),
        Fault("no room for a longer one in the place of an older one", older_file_on_a_full_disk),
        Fault("a folder that cannot be written to", partial(disk_without_room, "ro")),
        Fault("standard output is a full disk", full_output),
        Fault("standard output is closed", closed_output),
        Fault("standard output is a pipe that nobody reads", stalled_output),
        Fault("`ulimit -v`: too little memory", partial(limited, resource.RLIMIT_AS, 350 * 2**20, "memory")),
        Fault("`ulimit -n`: too few open files", partial(limited, resource.RLIMIT_NOFILE, 5, "Too many open files")),
        Fault("the clock goes back by a year", clock_backwards),
        Fault("100 programs share a folder of prompts", partial(sharing, n_sharing)),
    ]


def outcome(fault: Fault) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return fault.happens(Path(folder).resolve())


def row(fault: Fault, what: Outcome) -> str:
    return f"| {fault.name} | {what.seen} | {what.kept} |\n"


if __name__ == "__main__":
    table = "| fault | what the user sees | what is kept |\n|---|---|---|\n"
    for one in faults():
        table += row(one, outcome(one))
        print(table.splitlines()[-1], flush=True)
    head, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    DOCUMENT.write_text(head + BEGIN + "\n" + table + "\n" + END + rest.split(END)[1], encoding="utf-8")
