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
from selfextend_gguf.evaluation.bench import BenchResult
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.stores import name_of

from .options import FLASH_ATTN, ModelName, at_most_one, flash_attn_option, offline_option


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
    output: str,
    as_json: bool,
) -> None:
    """Compare time and memory with plain llama.cpp.

    Both sides are llama_cpp.Llama and ours, interleaved in one run. Without MODEL it is the bundled model.

    \b
    Examples:
        sx-gguf bench
        sx-gguf bench --smollm-135m --repeat 1
    """
    model, smollm_135m = at_most_one({"a model": model, "--smollm-135m": smollm_135m}).values()
    with tempfile.TemporaryDirectory() as folder:
        path = model or TINY_MODEL
        if smollm_135m:
            path = Path(folder) / "smollm-135m-random.gguf"
            measure.write_random_model(path, measure.SMOLLM_135M)
        result = measure.run(path, length, predict, repeat, threads, FLASH_ATTN[flash_attn])
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
    for name, ratio in ((f"read {length} tokens", result.read), (f"then {predict} one by one", result.generate)):
        yield model, name, ratio.extended_seconds, ratio.plain_seconds, ratio.ratio, "s"
    yield model, "or from a prompt cache", result.resume_seconds, "", "", "s"
    peaks = result.extended_peak / 2**20, result.plain_peak / 2**20
    yield model, "peak memory", *peaks, peaks[0] / peaks[1], "MiB"


def show(result: BenchResult, model: str, length: int, predict: int, repeat: int) -> None:
    """The numbers as a text."""
    click.echo(
        f"{model}, {length} tokens, medians of {repeat}, interleaved, "
        f"flash attention {'on' if result.flash_attn else 'off'}"
    )
    click.echo(f"{'':<28}{'Self-Extend':>14}{'llama.cpp':>14}{'ratio':>8}")
    for name, ratio in ((f"read {length} tokens", result.read), (f"then {predict} one by one", result.generate)):
        click.echo(f"{name:<28}{ratio.extended_seconds:>12.2f} s{ratio.plain_seconds:>12.2f} s{ratio.ratio:>8.3f}")
    times = result.read.extended_seconds / result.resume_seconds
    click.echo(
        f"{'or from a prompt cache':<28}{result.resume_seconds:>12.3f} s  ({times:.0f} times sooner than reading)"
    )
    peaks = result.extended_peak, result.plain_peak
    click.echo(
        f"{'peak memory':<28}{peaks[0] / 2**20:>10.0f} MiB{peaks[1] / 2**20:>10.0f} MiB{peaks[0] / peaks[1]:>8.3f}"
    )
