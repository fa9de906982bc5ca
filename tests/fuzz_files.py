"""Files that are wrong in ways that know their structure, each given to a process of its own.

    python tests/fuzz_files.py --kind gguf --files 10000 --seed 1 --keep FOLDER

Such a process ends by itself: not by a signal, not by the clock, with an exit status of 0, 1 or 2, without a traceback,
and without more memory than the model takes that the file was made of. What does otherwise is kept in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from selfextend_gguf import Llama
from selfextend_gguf.cli import main as sx_gguf
from selfextend_gguf.models import TINY_MODEL

SECONDS = 60  # of a process; they take well under one
MOST_MEMORY = 600 << 20  # bytes beyond those of this process
ADDRESSES = 16 << 30  # bytes; a mapping larger than that fails

# ---- GGUF ------------------------------------------------------------------------------------------------------------

SCALARS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
EXTREMES = [0, 1, 2, 3, 7, 31, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@dataclass(frozen=True)
class Slot:
    """A number in a file."""

    at: int
    kind: str  # of struct
    about: str


def slots_of(data: bytes) -> list[Slot]:
    """The numbers of a GGUF file that are no weights, and of long arrays the first few."""
    slots: list[Slot] = []
    at = 4

    def number(kind: str, about: str) -> int:
        nonlocal at
        slots.append(Slot(at, kind, about))
        (value,) = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(kind)
        return value

    def text(about: str) -> str:
        nonlocal at
        length = number("Q", f"length of {about}")
        begin, at = at, at + length
        if length:
            slots.append(Slot(begin, "B", f"a letter of {about}"))
        return data[begin:at].decode("utf-8", "replace")

    def value(kind: int, about: str) -> None:
        nonlocal at
        if kind == STRING:
            text(about)
        elif kind == ARRAY:
            inner, n = number("I", f"type in {about}"), number("Q", f"length of {about}")
            for i in range(n):
                before = len(slots)
                value(inner, about)
                if i >= 3:
                    del slots[before:]
        else:
            number(SCALARS[kind], about)

    number("I", "version")
    n_tensors, n_values = number("Q", "number of tensors"), number("Q", "number of values")
    for _ in range(n_values):
        key = text("a key")
        value(number("I", f"type of {key}"), key)
    for _ in range(n_tensors):
        name = text("a tensor's name")
        for _ in range(number("I", f"dimensions of {name}")):
            number("Q", f"a dimension of {name}")
        number("I", f"type of {name}")
        number("Q", f"offset of {name}")
    return slots


def changed(data: bytearray, slot: Slot, rng: random.Random) -> str:
    """Put another number in a slot; what was done."""
    size = struct.calcsize(slot.kind)
    if slot.kind in "fd":
        new = struct.pack(f"<{slot.kind}", rng.choice([0.0, -1.0, 1e30, float("nan"), float("inf"), 1e-30]))
    else:
        (old,) = struct.unpack_from(f"<{slot.kind}", data, slot.at)
        near = [old + 1, old - 1, 2 * old, old // 2, old ^ 1 << rng.randrange(8 * size), rng.choice(EXTREMES)]
        new = (int(rng.choice(near)) % 2 ** (8 * size)).to_bytes(size, "little")
    data[slot.at : slot.at + size] = new
    return f"{slot.about} (at {slot.at}) = {new.hex()}"


def wrong_gguf(source: bytes, slots: list[Slot], rng: random.Random) -> tuple[bytes, str]:
    """A file that is wrong in some places, and what was done to it."""
    data = bytearray(source)
    by_subject: dict[str, list[Slot]] = {}
    for slot in slots:
        by_subject.setdefault(slot.about.partition(".")[0], []).append(slot)
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        how = rng.random()
        if how < 0.85:
            subject = by_subject[rng.choice(sorted(by_subject))] if rng.random() < 0.5 else slots
            done.append(changed(data, rng.choice(subject), rng))
        elif how < 0.93:
            length = rng.choice([rng.randrange(len(data)), rng.randrange(1 + slots[-1].at)])
            del data[length:]
            done.append(f"cut to {length}")
            return bytes(data), "; ".join(done)
        else:
            begin = rng.randrange(len(data) - 64)
            data[begin : begin + 64] = rng.randbytes(64)
            done.append(f"64 bytes at {begin}")
    return bytes(data), "; ".join(done)


# ---- others ----------------------------------------------------------------------------------------------------------


def wrong_bytes(source: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A file with bytes changed, left out, put in or cut off, at its ends more often than in its middle."""
    data = bytearray(source)
    done = []
    for _ in range(rng.choice([1, 1, 2, 4])):
        n = len(data)
        at = rng.choice([rng.randrange(n), rng.randrange(min(n, 64)), n - 1 - rng.randrange(min(n, 256))]) if n else 0
        size = rng.choice([1, 4, 8])
        how = rng.choice(["bytes", "extreme", "leave out", "put in", "cut"])
        if how == "bytes":
            data[at : at + size] = rng.randbytes(size)
        elif how == "extreme":
            data[at : at + 8] = rng.choice(EXTREMES).to_bytes(8, "little")
        elif how == "leave out":
            del data[at : at + size]
        elif how == "put in":
            data[at:at] = rng.choice([rng.randbytes(size), b"[" * 5000, b'"', b"\0", b"\xff\xfe", b"1e999"])
        else:
            del data[at:]
        done.append(f"{how} at {at}")
    return bytes(data), "; ".join(done)


CONVERSATION = {
    "system": "Be short.",
    "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello to you."}],
}
SETTINGS = 'temp = 0.5\nctx = 512\nflash-attn = "off"\nlora = []\n[run]\npredict = 4\n[chat]\nseed = 7\n'
TUNED = {"group_size": 8, "neighbor_window": 64, "max_distance": 192, "block_size": 32, "schedule": "selfextend"}


def prompt_cache() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cache.kv")
        llm = Llama(str(TINY_MODEL), n_ctx=1024, verbose=False)
        llm.eval(list(range(65, 65 + 100)) * 4)
        llm.save_prompt(path)
        llm.close()
        return path.read_bytes()


@dataclass(frozen=True)
class Kind:
    """A kind of file: how wrong ones are made, and the command that gets one."""

    name: str  # of the file
    make: Callable[[random.Random], tuple[bytes, str]]
    command: Callable[[str], list[str]]
    environment: Callable[[str], dict[str, str]] = lambda path: {}
    typed: Callable[[str], str] = lambda path: ""


def gguf_kind(model: Path = TINY_MODEL) -> Kind:
    source = model.read_bytes()
    slots = slots_of(source)
    options = ["-n", "2", "--temp", "0", "-c", "600", "-t", "1", "Once upon a time"]
    return Kind("model.gguf", lambda rng: wrong_gguf(source, slots, rng), lambda path: ["run", path, *options])


def cache_kind() -> Kind:
    source = prompt_cache()
    options = ["-n", "2", "--temp", "0", "-c", "1024", "-t", "1", "--prompt-cache-ro"]
    return Kind(
        "cache.kv", lambda rng: wrong_bytes(source, rng), lambda path: ["run", str(TINY_MODEL), "Once", *options, path]
    )


def conversation_kind() -> Kind:
    source = json.dumps(CONVERSATION).encode()
    return Kind(
        "talk.json",
        lambda rng: wrong_bytes(source, rng),
        lambda path: ["chat", str(TINY_MODEL), "-n", "2", "--temp", "0", "-t", "1"],
        typed=lambda path: f"/load {path}\nHello\n",
    )


def settings_kind() -> Kind:
    return Kind(
        "config.toml",
        lambda rng: wrong_bytes(SETTINGS.encode(), rng),
        lambda path: ["run", str(TINY_MODEL), "-n", "2", "-t", "1", "Once"],
        lambda path: {"SX_GGUF_CONFIG": path},
    )


def tuned_kind() -> Kind:
    return Kind(
        "tuned.json",
        lambda rng: wrong_bytes(json.dumps(TUNED).encode(), rng),
        lambda path: ["run", str(TINY_MODEL), "-n", "2", "-t", "1", "-c", "1024", "--config", path, "Once"],
    )


KINDS = {
    "gguf": gguf_kind,
    "cache": cache_kind,
    "conversation": conversation_kind,
    "settings": settings_kind,
    "tuned": tuned_kind,
}


# ---- processes -------------------------------------------------------------------------------------------------------


def _child(kind: Kind, path: str, output: str) -> None:
    """Give the file to the command. Does not return."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    typed = os.memfd_create("typed")
    os.write(typed, kind.typed(path).encode())
    os.lseek(typed, 0, os.SEEK_SET)
    for number, file in ((0, typed), (1, written), (2, written)):
        os.dup2(file, number)
    os.environ.update(kind.environment(path))
    status = 99
    try:
        sx_gguf(kind.command(path))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def fault_of(kind: Kind, path: str, output: str) -> str | None:
    """What a file does that it should not, None if all is well."""
    child = os.fork()
    if child == 0:
        _child(kind, path, output)
    ends = time.monotonic() + SECONDS
    while True:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > ends:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"not done in {SECONDS} s"
        time.sleep(0.002)
    said = Path(output).read_text("utf-8", "replace")
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}: {said[-300:]}"
    if os.WEXITSTATUS(status) not in (0, 1, 2):
        return f"status {os.WEXITSTATUS(status)}: {said[-300:]}"
    if "Traceback" in said:
        return f"a traceback: {said[-300:]}"
    if os.WEXITSTATUS(status) and "Error" not in said:
        return f"status {os.WEXITSTATUS(status)} without an error: {said[-300:]}"
    # not this process's ru_maxrss, which begins with that of the process that started it
    if (beyond := used.ru_maxrss * 1024 - psutil.Process().memory_info().rss) > MOST_MEMORY:
        return f"{beyond >> 20} MiB of memory"
    return None


def faults(kind: Kind, numbers: range, seed: int, keep: Path | None = None) -> Iterator[str]:
    """Try wrong files; what each does that it should not."""
    with tempfile.TemporaryDirectory() as folder:
        path, output = str(Path(folder, kind.name)), str(Path(folder, "output"))
        for number in numbers:
            content, done = kind.make(random.Random(seed * 1_000_003 + number))
            Path(path).write_bytes(content)
            fault = fault_of(kind, path, output)
            if fault is not None:
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{seed}-{number}-{kind.name}").write_bytes(content)
                yield f"{number}: {done}: {fault}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--files", type=int, default=10000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file, to go on from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path, default=TINY_MODEL, help="GGUF file to make wrong ones of")
    parser.add_argument("--keep", type=Path, help="folder for files with which something was wrong")
    args = parser.parse_args()
    kind = gguf_kind(args.model) if args.kind == "gguf" else KINDS[args.kind]()
    began, n = time.monotonic(), 0
    for fault in faults(kind, range(args.first, args.first + args.files), args.seed, args.keep):
        n += 1
        print(fault, flush=True)
    print(f"{args.files} files, {n} faults, {time.monotonic() - began:.0f} s")
    sys.exit(n > 0)


if __name__ == "__main__":
    main()
