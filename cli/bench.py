"""`sx-gguf bench`: what Self-Extend costs."""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from selfextend_gguf.evaluation import bench as measure
from selfextend_gguf.evaluation.bench import BenchResult, Ratio
from selfextend_gguf.evaluation.own_programs import OwnPrograms
from selfextend_gguf.evaluation.readers import pretended
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.stores import name_of

from .options import (
    FLASH_ATTN,
    ModelName,
    at_most_one,
    cache_type_options,
    flash_attn_option,
    offline_option,
    pretend_option,
)

PROGRAM = click.Path(exists=True, dir_okay=False, executable=True, path_type=Path)


@click.command()
@click.argument("model", type=ModelName(path_type=Path), required=False)
@offline_option
@click.option("--smollm-135m", is_flag=True, help="Measure a random-weight model of SmolLM-135M's shape.")
@click.option("--length", type=click.IntRange(512), default=8192, show_default=True, help="Tokens to read.")
@click.option(
    "-n", "--predict", type=click.IntRange(1), default=128, show_default=True, help="Tokens to evaluate one by one."
)
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Measurements; medians are shown.")
@click.option("-t", "--threads", type=click.IntRange(1), help="CPU threads.")
@flash_attn_option
@cache_type_options
@pretend_option
@click.option(
    "--llama-bench",
    type=PROGRAM,
    help="llama.cpp's program of that name: compare reading and generating with it too.",
)
@click.option(
    "--llama-completion",
    type=PROGRAM,
    help="llama.cpp's program of that name: compare whole runs of `sx-gguf run` with it.",
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["text", "md", "csv", "json"]),
    default="text",
    show_default=True,
    help="How the numbers are printed: a text, a Markdown or CSV table, a JSON record.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as -o json.")
def bench(
    model: Path | None,
    smollm_135m: bool,
    length: int,
    predict: int,
    repeat: int,
    threads: int | None,
    flash_attn: str,
    cache_type_k: str,
    cache_type_v: str,
    pretend_trained: int | None,
    llama_bench: Path | None,
    llama_completion: Path | None,
    output: str,
    as_json: bool,
) -> None:
    """Compare time and memory with plain llama.cpp.

    Both sides are llama_cpp.Llama and ours, interleaved in one run, on the CPU. Without MODEL it is the bundled model.

    \b
    Examples:
        sx-gguf bench
        sx-gguf bench --smollm-135m --repeat 1
    """
    model, smollm_135m = at_most_one({"a model": model, "--smollm-135m": smollm_135m}).values()
    # `sx-gguf run` pretends nothing.
    at_most_one({"--pretend-trained": pretend_trained, "--llama-completion": llama_completion})
    with tempfile.TemporaryDirectory() as folder:
        path = model or TINY_MODEL
        if smollm_135m:
            path = Path(folder) / "smollm-135m-random.gguf"
            measure.write_random_model(path, measure.SMOLLM_135M)
        arguments = {
            "n_threads": threads,
            "n_threads_batch": threads,
            "flash_attn": FLASH_ATTN[flash_attn],
            "type_k": KV_TYPES[cache_type_k],
            "type_v": KV_TYPES[cache_type_v],
            **pretended(path, pretend_trained),
        }
        programs = OwnPrograms(llama_bench, llama_completion)
        result = measure.run(path, length, predict, repeat, arguments, programs)
    name = name_of(path)
    if as_json or output == "json":
        click.echo(json.dumps({"model": name, "length": length, "predict": predict} | asdict(result)))
    elif output == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([COLUMNS, *rows(result, name, length, predict)])
    elif output == "md":
        click.echo("| " + " | ".join(COLUMNS) + " |")
        click.echo("|---|---|---:|---:|---:|---|")
        for row in rows(result, name, length, predict):
            click.echo("| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else cell for cell in row) + " |")
    else:
        show(result, name, length, predict, repeat)


COLUMNS = ("model", "measured", "Self-Extend", "llama.cpp", "ratio", "unit")


def rows(result: BenchResult, model: str, length: int, predict: int) -> Iterator[tuple[str | float, ...]]:
    """The lines of a table of `COLUMNS`; "" where there is nothing to compare with."""
    for name, ratio in ratios(result, length, predict):
        yield model, name, ratio.extended_seconds, ratio.plain_seconds, ratio.ratio, "s"
    yield model, "rewriting keys", 100 * result.rewrite_share, "", "", "% of those seconds"
    yield model, "or from a prompt cache", result.resume_seconds, "", "", "s"
    yield model, "its file alone", result.file_seconds, "", "", "s"
    peaks = result.extended_peak / 2**20, result.plain_peak / 2**20
    yield model, "peak memory", *peaks, peaks[0] / peaks[1], "MiB"


def ratios(result: BenchResult, length: int, predict: int) -> Iterator[tuple[str, Ratio]]:
    """What was compared, with its name."""
    yield f"read {length} tokens", result.read
    yield f"then {predict} one by one", result.generate
    yield from result.own_programs.items()


def show(result: BenchResult, model: str, length: int, predict: int, repeat: int) -> None:
    """The numbers as a text."""
    click.echo(
        f"{model}, {length} tokens, medians of {repeat}, interleaved, "
        f"flash attention {'on' if result.flash_attn else 'off'}"
    )
    click.echo(f"{'':<28}{'Self-Extend':>14}{'llama.cpp':>14}{'ratio':>8}")
    for name, ratio in ratios(result, length, predict):
        click.echo(f"{name:<28}{ratio.extended_seconds:>12.2f} s{ratio.plain_seconds:>12.2f} s{ratio.ratio:>8.3f}")
    click.echo(f"{'rewriting keys':<28}{100 * result.rewrite_share:>12.2f} % of those seconds")
    times = result.read.extended_seconds / result.resume_seconds
    click.echo(
        f"{'or from a prompt cache':<28}{result.resume_seconds:>12.3f} s  ({times:.0f} times sooner than reading; its "
        f"file alone takes {result.file_seconds:.3f} s)"
    )
    peaks = result.extended_peak, result.plain_peak
    click.echo(
        f"{'peak memory':<28}{peaks[0] / 2**20:>10.0f} MiB{peaks[1] / 2**20:>10.0f} MiB{peaks[0] / peaks[1]:>8.3f}"
    )
