"""What Self-Extend costs, and how long programs take beside llama.cpp's own. Writes docs/performance.md.

    python -m selfextend_gguf.studies.speed MODEL.gguf --llama-bench PATH --llama-completion PATH --kept kept.jsonl

The bundled model is measured as well. Measure on a machine that does nothing else. Results are kept as they come: a
second call goes on.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selfextend_gguf.cores import fast_cores
from selfextend_gguf.evaluation import bench
from selfextend_gguf.evaluation.bench import BenchResult, Ratio, seconds_to_eval
from selfextend_gguf.evaluation.kept import Kept, made_by
from selfextend_gguf.evaluation.own_programs import OwnPrograms, seconds_of
from selfextend_gguf.evaluation.readers import pretended
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.llama import Llama
from selfextend_gguf.model_info import ModelHeader
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.programs import SX_GGUF

GENERATE = 32  # tokens
REPEATS = 5
LONG = 16384  # tokens that take a model of MODEL's size minutes: measured once
CHOSEN_LENGTH = 1024  # tokens that are read with all choices
TIMES, LONGEST = 4, 16384  # trained contexts that are read, at most so many tokens
GOAL = 1.01  # of reading and generating beyond the trained context, to plain llama_cpp.Llama
STARTS = 20
BATCHES = (256, 512, 1024)


@dataclass(frozen=True)
class Cell:
    """A setting in which Self-Extend and plain reading take turns."""

    trained: int  # context that the model is read as if trained on
    flash_attn: bool
    keys: str  # their type, and the values' with flash attention; without it those are f16
    threads: int

    @property
    def length(self) -> int:
        return min(TIMES * self.trained, LONGEST)

    def arguments(self) -> dict[str, Any]:
        """Of both `Llama` classes."""
        values = "f16" if not self.flash_attn else self.keys
        return {
            "flash_attn": self.flash_attn,
            "type_k": KV_TYPES[self.keys],
            "type_v": KV_TYPES[values],
            "n_threads": self.threads,
            "n_threads_batch": self.threads,
        }


def cells(trained: Sequence[int], threads: Sequence[int]) -> Iterator[Cell]:
    """All settings of a model."""
    for n, flash_attn, keys, n_threads in itertools.product(trained, (True, False), ("f16", "q8_0"), threads):
        yield Cell(n, flash_attn, keys, n_threads)


def pretence(model: Path, trained: int) -> int | None:
    """What to pretend so that a model counts as trained on so many tokens: nothing if it was."""
    with ModelHeader(model) as info:
        return None if trained == info.n_ctx_train else trained


def measured(
    kept: Kept,
    model: Path,
    length: int,
    arguments: Mapping[str, Any],
    pretend: int | None = None,
    programs: OwnPrograms | None = None,
) -> BenchResult:
    """A result of `bench.run`, kept."""
    repeats = 1 if length >= LONG and model != TINY_MODEL else REPEATS
    what = {
        **made_by(model),
        "length": length,
        "generate": GENERATE,
        "repeats": repeats,
        "trained": pretend,
        "own programs": programs is not None,
        **arguments,
    }

    def measure() -> dict[str, Any]:
        print(f"{time.strftime('%H:%M:%S')} {model.name} {length} {pretend or ''} {dict(arguments)}", flush=True)
        given = {**arguments, **pretended(model, pretend)}
        return asdict(bench.run(model, length, GENERATE, repeats, given, programs or OwnPrograms()))

    found = dict(kept.measured(what, measure))
    ratios = {name: Ratio(**found[name]) for name in ("read", "generate")}
    others = {name: Ratio(**ratio) for name, ratio in found["own_programs"].items()}
    return BenchResult(**{**found, **ratios, "own_programs": others})


# ---- beside llama.cpp's programs -------------------------------------------------------------------------------------


def show(ratio: Ratio) -> str:
    """Seconds of both sides and their ratio, as cells of a table."""
    numbers = f"{ratio.extended_seconds:.2f} | {ratio.plain_seconds:.2f} | {ratio.ratio:.3f}"
    return f"{numbers} | {ratio.lowest:.3f} to {ratio.highest:.3f}"


BESIDE = """\
| model | tokens | what | ours, s | theirs, s | ratio | from, to |
|---|---:|---|---:|---:|---:|---:|"""


def beside_programs(results: Mapping[tuple[str, int], BenchResult]) -> str:
    lines = [BESIDE]
    for (model, length), result in results.items():
        for name, ratio in result.own_programs.items():
            lines.append(f"| {model} | {length} | {name} | {show(ratio)} |")
    return "\n".join(lines)


CACHE = """\
| model | tokens | reading, s | from a prompt cache, s | its file alone, s | ratio |
|---|---:|---:|---:|---:|---:|"""


def prompt_caches(results: Mapping[tuple[str, int], BenchResult]) -> str:
    lines = [CACHE]
    for (model, length), result in results.items():
        ratio = result.resume_seconds / result.file_seconds
        numbers = f"{result.read.extended_seconds:.2f} | {result.resume_seconds:.3f} | {result.file_seconds:.3f}"
        lines.append(f"| {model} | {length} | {numbers} | {ratio:.2f} |")
    return "\n".join(lines)


# ---- beyond the trained context --------------------------------------------------------------------------------------

BEYOND = """\
| model | trained | tokens | flash attention | keys | threads | read, s | ratio | generate, s | ratio | rewriting, % |
|---|---:|---:|---|---|---:|---:|---:|---:|---:|---:|"""


def beyond(results: Mapping[tuple[str, Cell], BenchResult]) -> str:
    lines = [BEYOND]
    for (model, cell), result in results.items():
        flash_attn = "on" if cell.flash_attn else "off"
        numbers = " | ".join(f"{r.extended_seconds:.2f} | {r.ratio:.3f}" for r in (result.read, result.generate))
        numbers += f" | {100 * result.rewrite_share:.2f}"
        lines.append(
            f"| {model} | {cell.trained} | {cell.length} | {flash_attn} | {cell.keys} | {cell.threads} | {numbers} |"
        )
    return "\n".join(lines)


def goals_met(results: Mapping[tuple[str, Cell], BenchResult]) -> str:
    """How many cells meet the goal, in words."""
    counts = [sum(getattr(r, part).ratio <= GOAL for r in results.values()) for part in ("read", "generate")]
    shares = [100 * r.rewrite_share for r in results.values()]
    return (
        f"Reading is within {GOAL} in {counts[0]} of {len(results)} settings, generating in {counts[1]}.\n"
        f"Moving keys takes {min(shares):.2f} to {max(shares):.2f} % of the time."
    )


# ---- what is chosen by itself ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """How a text can be read."""

    flash_attn: bool
    threads: int
    batch: int

    def arguments(self) -> dict[str, Any]:
        threads = {"n_threads": self.threads, "n_threads_batch": self.threads}
        return {"flash_attn": self.flash_attn, "n_batch": self.batch, **threads}


CHOICES = """\
| model | flash attention | threads | batch | read, s | generate, s |
|---|---|---:|---:|---:|---:|"""


def choices(kept: Kept, model: Path, length: int, threads: Sequence[int]) -> Iterator[str]:
    """The lines of a table of all choices: medians of a text that is read with each of them in turn."""
    every = [Choice(*it) for it in itertools.product((True, False), threads, BATCHES)]
    what = {**made_by(model), "choices": [asdict(choice) for choice in every], "length": length, "generate": GENERATE}
    seconds = kept.measured(what, lambda: _take_turns(model, every, length))
    for choice, (read, generate) in zip(every, seconds, strict=True):
        flash_attn = "on" if choice.flash_attn else "off"
        yield f"| {model.name} | {flash_attn} | {choice.threads} | {choice.batch} | {read:.2f} | {generate:.2f} |"


def _take_turns(model: Path, every: Sequence[Choice], length: int) -> list[tuple[float, float]]:
    print(f"{time.strftime('%H:%M:%S')} {model.name} {len(every)} choices", flush=True)
    tokens = bench.tokens_of(length + GENERATE)
    seconds: list[list[tuple[float, float]]] = [[] for _ in every]
    for _ in range(REPEATS):
        for its, choice in zip(seconds, every, strict=True):
            llm = Llama(str(model), n_ctx=length + GENERATE + 1, verbose=False, **choice.arguments())
            one_by_one = [[token] for token in tokens[length:]]
            its.append((seconds_to_eval(llm, [tokens[:length]]), seconds_to_eval(llm, one_by_one)))
            llm.close()
    return [(statistics.median(r for r, _ in its), statistics.median(g for _, g in its)) for its in seconds]


# ---- starts ----------------------------------------------------------------------------------------------------------

START = """\
| command | median, ms |
|---|---:|"""

COMMANDS: dict[str, list[str]] = {
    "`sx-gguf` with `--help`": [SX_GGUF, "--help"],
    '`python -c "import click"`': [sys.executable, "-c", "import click"],
    "`python -c pass`": [sys.executable, "-c", "pass"],
}


def starts(kept: Kept) -> str:
    what = {**made_by(TINY_MODEL), "starts": [*COMMANDS], "repeats": STARTS}
    found: dict[str, float] = kept.measured(what, _start)
    return "\n".join([START, *(f"| {name} | {1000 * seconds:.0f} |" for name, seconds in found.items())])


def _start() -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(STARTS):
        for name, command in COMMANDS.items():
            seconds[name].append(seconds_of(command))
    return {name: statistics.median(its) for name, its in seconds.items()}


# ---- the document ----------------------------------------------------------------------------------------------------

DOCUMENT = """\
# Performance

Written on {machine} by

```sh
python -m selfextend_gguf.studies.speed {model} --llama-bench PATH --llama-completion PATH --kept kept.jsonl
```

Both sides take turns in one run. Times are medians of {repeats}, and a ratio is the median of the paired ratios, ours
divided by theirs: below 1 ours is faster. {long} tokens were measured once, but for the bundled model. Whole runs
read a text, all others random tokens, with an f16 cache unless said otherwise.

## Beside llama.cpp's own programs

`llama-bench` reads, and generates {generate} tokens behind that; ours is a `Llama` that does the same with as many
threads. `llama-completion` and `sx-gguf run` are processes from their start to their end: they load the model, read a
text and generate {generate} tokens (*run*), or read 8 tokens and generate one (*load*). Both choose flash attention and
threads by themselves.

{beside}

## Beyond the trained context

Self-Extend beside a `llama_cpp.Llama` with the same settings, which reads and generates beyond the trained context as
well, only wrongly. Models are read as if they were trained on so many tokens; {times} times as many are read, up to
{longest}. The last column is the share of the time in which keys are moved. The goal is {goal}.

{beyond}

{met} Steps end where keys
move, and small ones are slow with flash attention on the CPU ([evaluation.md](evaluation.md#what-it-costs)). A token
that is generated costs a little more time in Python, which tells where a model is tiny.

## From a prompt cache

Restoring the cache of a text and computing its last token again, beside reading the file of the cache into memory and
doing nothing with it; the goal is 1.2. The file is read twice, for its checksum and by llama.cpp.

{caches}

## What is chosen by itself

Flash attention is on unless steps are small (`-fa auto`), commands generate with a thread for each physical core, and
batches hold 512 tokens. Our `Llama` with every other choice, which reads {chosen_length} tokens, and {tiny_length} with
the bundled model:

{choices}

## Start

Medians of {starts}:

{start}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--llama-completion", type=Path, required=True)
    parser.add_argument("--kept", type=Path, help="file of results: a second call goes on where the first was")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096, LONG], help="beside llama.cpp's programs")
    parser.add_argument("--trained", type=int, nargs="+", default=[256, 512], help="contexts to pretend")
    parser.add_argument("--tiny-trained", type=int, nargs="+", default=[128, 256], help="of the bundled model")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of performance.md")
    parser.add_argument("--machine", default="a machine", help="what it was measured on, for the document")
    args = parser.parse_args(argv)
    kept, cores = Kept(args.kept), fast_cores()
    programs = OwnPrograms(args.llama_bench.resolve(), args.llama_completion.resolve())
    settings = [
        *((TINY_MODEL, cell) for cell in cells(args.tiny_trained, sorted({1, cores}))),
        *((args.model, cell) for cell in cells(args.trained, [cores])),
    ]
    start = starts(kept)
    caches = {
        (model.name, length): measured(kept, model, length, {}, programs=programs)
        for length in sorted(args.lengths)
        for model in (TINY_MODEL, args.model)
    }
    beyond_trained = {
        (model.name, cell): measured(kept, model, cell.length, cell.arguments(), pretence(model, cell.trained))
        for model, cell in settings
    }
    tiny_length = TIMES * CHOSEN_LENGTH
    lines = [
        line
        for model, length in ((args.model, CHOSEN_LENGTH), (TINY_MODEL, tiny_length))
        for line in choices(kept, model, length, sorted({1, cores}))
    ]
    text = DOCUMENT.format(
        machine=args.machine,
        model=args.model.name,
        repeats=REPEATS,
        long=LONG,
        generate=GENERATE,
        times=TIMES,
        longest=LONGEST,
        goal=GOAL,
        chosen_length=CHOSEN_LENGTH,
        tiny_length=tiny_length,
        starts=STARTS,
        beside=beside_programs(caches),
        beyond=beyond(beyond_trained),
        met=goals_met(beyond_trained),
        caches=prompt_caches(caches),
        choices="\n".join([CHOICES, *lines]),
        start=start,
    )
    (args.out / "performance.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
