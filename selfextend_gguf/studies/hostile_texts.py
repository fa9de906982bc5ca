"""Texts that kill llama.cpp's tokenizer, given to every pre-tokenizer it knows: docs/tokens.md.

    python -m selfextend_gguf.studies.hostile_texts model.gguf

The model needs a vocabulary of kind BPE ("gpt2"). Copies of its vocabulary get each pre-tokenizer in turn. A process
reads one text after the other with our tokenizer, another one with plain llama.cpp; where one dies, a new one goes on.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from selfextend_gguf.model_info import ModelInfo

# Those of llama.cpp's src/llama-vocab.cpp, as of llama-cpp-python 0.3.36.
PRE_TOKENIZERS = """
a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx deepseek-coder
deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3 gemma4
gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-311m granite-embed-multi-97m grok-2
hunyuan hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano
joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0
minerva-7b minicpm5 minimax-m2 modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe
seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken tiny_aya trillion ufakzeka
viking whitespace youtu
""".split()  # noqa: SIM905  (a list literal would take a line a word)

_random = random.Random(0)
_NOISE = base64.b64encode(_random.randbytes(750_000))
_TABLE = json.dumps([{"k": i, "v": _random.random(), "s": "x" * (i % 9)} for i in range(40_000)], separators=(",", ":"))


def _repeat(unit: str | bytes) -> Callable[[int], bytes]:
    """A text of `n` bytes or a little less, all whole characters."""
    once = unit.encode() if isinstance(unit, str) else unit
    return lambda n: once * (n // len(once))


TEXTS: dict[str, Callable[[int], bytes]] = {
    "Latin letter": _repeat("A"),
    "Cyrillic letter": _repeat("\u0436"),
    "Han character": _repeat("\u6c49"),
    "digit": _repeat("7"),
    "blank lines": _repeat("\n"),
    "spaces, a letter": lambda n: b" " * (n - 1) + b"x",
    "dashes": _repeat("-"),
    "alternating scripts": _repeat("a\u0436\u042fA\u6c491\ud55c\u0639-"),
    "base64": lambda n: _NOISE[:n],
    "minified JSON": lambda n: _TABLE[:n].encode(),
    "combining marks": _repeat("e\u0301\u0308"),
    "zero-width joiners": _repeat("\u200d"),
    "surrogates' bytes": _repeat(b"\xed\xa0\x80"),
    "nul": _repeat("\0"),
}


@dataclass(frozen=True)
class Outcome:
    """What one tokenizer made of one text: a checksum of its tokens, or how it failed."""

    text: str
    n_bytes: int
    checksum: int | None = None
    failure: str = ""  # "signal 11", "slow", or the message of an exception


@dataclass(frozen=True)
class Case:
    """Our outcome beside plain llama.cpp's."""

    pre: str
    ours: Outcome
    plain: Outcome

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.ours.failure:
            is_death = self.ours.failure.startswith("signal")
            return "died" if is_death else "slow" if self.ours.failure == "slow" else "refused"
        if self.plain.failure:
            return "only ours"
        return "equal" if self.ours.checksum == self.plain.checksum else "DIFFERENT"


def write_vocabularies(
    model: Path, folder: Path, values: Iterable[str], key: str = "tokenizer.ggml.pre"
) -> Iterator[tuple[str, Path]]:
    """Copies of a model's metadata without its tensors, one for each value of a text among them."""
    reader = gguf.GGUFReader(model)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = fields.pop(gguf.Keys.General.ARCHITECTURE).contents()
    fields.pop(key, None)
    contents = {name: field.contents() for name, field in fields.items()}
    for number, value in enumerate(values):
        path = folder / f"{number}.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_string(key, value)
        for name, field in fields.items():
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, contents[name], field.types[0], sub_type=element)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        yield value, path


def tokenize_all(vocabulary: Path, who: str, cases: Sequence[tuple[str, int]]) -> None:
    """Print a line of JSON for each case: a checksum of its tokens, or the message of an exception."""
    with ModelInfo(vocabulary) as info:
        for name, n_bytes in cases:
            text, result = TEXTS[name](n_bytes), dict[str, Any]()
            try:
                tokens = (
                    info.tokenizer.tokenize(text, add_bos=False, special=False)
                    if who == "ours"
                    else info.model.tokenize(text, False, False)
                )
                result["checksum"] = zlib.crc32(json.dumps(tokens).encode())
            except Exception as error:
                result["failure"] = str(error)
            print(json.dumps(result), flush=True)


def outcomes(vocabulary: Path, who: str, cases: Sequence[tuple[str, int]], limit: float) -> list[Outcome]:
    """What "ours" or "plain" makes of each case, at most `limit` seconds a case; a process lives until a case kills
    it."""
    done: list[Outcome] = []
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}  # which a debugger would print among our lines
    while len(done) < len(cases):
        left = json.dumps(cases[len(done) :])
        command = [sys.executable, "-m", __spec__.name, str(vocabulary), "--as", who, "--cases", left]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        ) as process:
            failure = ""
            while len(done) < len(cases) and not failure:
                line, is_late = _next_line(process, limit)
                failure = "" if line else "slow" if is_late else _signal(process)
                done.append(Outcome(*cases[len(done)], **json.loads(line or "{}") or {"failure": failure}))
    return done


def _signal(process: subprocess.Popen[str]) -> str:
    """The signal that ended a process."""
    code = process.wait()
    if code >= 0:
        raise RuntimeError(f"a process ended with code {code} before its work was done")
    return f"signal {-code}"


def _next_line(process: subprocess.Popen[str], limit: float) -> tuple[str, bool]:
    """The next line that a process prints, "" at its end; and whether it was ended because that took too long."""
    assert process.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit, end)
    timer.start()
    try:
        return process.stdout.readline(), late.is_set()
    finally:
        timer.cancel()


def sweep(
    model: Path, names: Sequence[str], texts: Sequence[str], sizes: Sequence[int], limit: float = 60
) -> Iterator[list[Case]]:
    """All cases of one pre-tokenizer after the other; `sizes` in bytes."""
    cases = [(text, size) for size in sizes for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        for name, path in write_vocabularies(model, Path(folder), names):
            ours, plain = (outcomes(path, who, cases, limit) for who in ("ours", "plain"))
            path.unlink()
            yield [Case(name, a, b) for a, b in zip(ours, plain, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="model with a vocabulary of kind BPE")
    parser.add_argument("--pre", nargs="+", default=PRE_TOKENIZERS, metavar="NAME", help="pre-tokenizers [all]")
    parser.add_argument("--kilobytes", type=int, nargs="+", default=[10, 100, 1000], help="sizes of the texts")
    parser.add_argument("--limit", type=float, default=60, help="seconds a text")
    parser.add_argument("--as", dest="who", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.who:
        tokenize_all(args.model, args.who, args.cases)
        return
    verdicts = ["equal", "only ours", "refused", "slow", "DIFFERENT", "died"]
    total: Counter[str] = Counter()
    print(f"{len(TEXTS)} texts of {', '.join(map(str, args.kilobytes))} KB each; only ours = plain llama.cpp dies")
    print(f"{'pre-tokenizer':<26}" + "".join(f"{v:>11}" for v in verdicts))
    for cases in sweep(args.model, args.pre, list(TEXTS), [1000 * n for n in args.kilobytes], args.limit):
        found = Counter(case.verdict for case in cases)
        total += found
        print(f"{cases[0].pre:<26}" + "".join(f"{found[v] or '':>11}" for v in verdicts), flush=True)
        for case in cases:
            if case.verdict not in ("equal", "only ours"):
                print(f"    {case.ours.text}, {case.ours.n_bytes} bytes: {case.ours.failure} (plain: {case.plain})")
    print(f"{'all':<26}" + "".join(f"{total[v] or '':>11}" for v in verdicts))
    if total["died"] or total["DIFFERENT"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
