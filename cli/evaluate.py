"""`sx-gguf eval`: perplexity and retrieval beyond the trained context."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import llama_cpp
import numpy as np

from selfextend_gguf.atomic_file import new_file
from selfextend_gguf.documents import Pages
from selfextend_gguf.evaluation.kept import Kept
from selfextend_gguf.evaluation.perplexity import LengthResult, compare
from selfextend_gguf.evaluation.plots import plot_perplexity, plot_retrieval
from selfextend_gguf.evaluation.readers import METHODS, pretended
from selfextend_gguf.evaluation.readings import Readings
from selfextend_gguf.evaluation.retrieval import ANSWER_ROOM, Cell, evaluate_grid
from selfextend_gguf.evaluation.tasks import TASKS
from selfextend_gguf.llama import Llama
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import DEMO_TEXT
from selfextend_gguf.planning import PARAMETERS, context_within, longest_context, whole_cells
from selfextend_gguf.schedule import LONGEST, SCHEDULES
from selfextend_gguf.stores import name_of

from .errors import EXIT_INTERRUPTED
from .options import (
    budget_option,
    device_options,
    llama_arguments,
    model_argument,
    pretend_option,
    resume_option,
    self_extend_options,
    verbose_option,
)
from .progress import status_line
from .texts import pages_option, read_text

AGAINST = tuple(method for method in METHODS if method != "plain")


@click.group("eval")
def evaluate() -> None:
    """Measure a model beyond its trained context.

    \b
    Examples:
        sx-gguf eval ppl model.gguf -f book.txt
        sx-gguf eval passkey model.gguf
    """


def lengths_option(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--lengths: token counts, with commas."""

    def parse(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
        if value is None:
            return None
        try:
            lengths = [int(part) for part in value.split(",")]
        except ValueError:
            raise click.BadParameter("give token counts with commas, as in 2048,4096") from None
        if min(lengths) < 2:
            raise click.BadParameter("a length has at least 2 tokens")
        return lengths

    return click.option("--lengths", callback=parse, help=f"Token counts with commas [{what}].")


def usual_lengths(n_ctx_train: int, limit: int) -> list[int]:
    """1, 2, 4, 8 and 16 trained contexts, as far as the limit goes."""
    return [n for n in (n_ctx_train * 2**i for i in range(5)) if n <= limit] or [limit]


# ---- ppl ---------------------------------------------------------------------------------------------------------


@evaluate.command()
@model_argument
@click.option("-f", "--file", type=click.Path(path_type=Path), required=True, help="Text or document to read.")
@pages_option
@lengths_option("1 to 16 trained contexts, as the text allows")
@click.option("--texts", type=click.IntRange(1), default=1, show_default=True, help="Stretches of the text a length.")
@click.option(
    "--against",
    type=click.Choice(["all", *AGAINST]),
    multiple=True,
    help="Other methods to read the same text by; may be given several times.",
)
@resume_option
@budget_option()
@click.option("--plot", type=click.Path(path_type=Path), help="Write a PNG: perplexity against position.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON record.")
@pretend_option
@self_extend_options
@device_options
@verbose_option
def ppl(
    model: Path,
    file: Path,
    pages: Pages | None,
    lengths: list[int] | None,
    texts: int,
    against: Sequence[str],
    resume: Path | None,
    budget: float | None,
    plot: Path | None,
    as_json: bool,
    pretend_trained: int | None,
    **options: Any,
) -> None:
    """Measure perplexity by text length.

    Of Self-Extend, plain llama.cpp, and others with --against. Each length is read from its beginning; losses are those
    of its second half. "relative" compares with Self-Extend on the same tokens, so its standard error is small.

    With --pretend-trained, plain is the measure of the others up to the true trained context: it reads as the model was
    trained to.

    \b
    Examples:
        sx-gguf eval ppl model.gguf -f book.txt
        sx-gguf eval ppl model.gguf -f book.txt --lengths 4096,16384 --against yarn --against window
        sx-gguf eval ppl model.gguf -f book.txt --against all --plot ppl.png
        sx-gguf eval ppl model.gguf -f book.txt --pretend-trained 2048 --lengths 8192
    """
    text = read_text(file, pages)
    overrides = pretended(model, pretend_trained)
    arguments = llama_arguments(**options) | overrides
    parameters = {name: arguments.pop(name) for name in PARAMETERS}
    schedule = parameters.pop("schedule") or SCHEDULES[0]
    with ModelInfo(model, verbose=options["verbose"], **overrides) as info:
        tokens, n_ctx_train, bos = info.tokenizer.tokens(text), info.n_ctx_train, info.tokenizer.bos
    reach = longest_context(n_ctx_train, schedule=schedule, **parameters)
    lengths = lengths or usual_lengths(n_ctx_train, min(len(tokens), reach))
    others = AGAINST if "all" in against else against
    methods = list(dict.fromkeys([schedule, "plain", *others]))
    readings = Readings(str(model), kept=Kept(resume), seconds=budget, **arguments)
    results: list[LengthResult] = []
    why = "budget"
    with status_line() as show:

        def progress(method: str, n: int) -> None:
            left = readings.seconds_left
            show(f"reading {n} tokens: {method}" + ("" if left is None else f", {max(0, left):.0f} s left"))

        measuring = compare(
            readings, tokens, methods, lengths, n_texts=texts, bos=bos, on_progress=progress, parameters=parameters
        )
        try:
            for result in measuring:
                results.append(result)
        except KeyboardInterrupt:
            why = "interrupted"
    measured = {(r.n_tokens, r.method) for r in results}
    missing = [(n, method) for n in lengths for method in methods if (n, method) not in measured]
    if as_json:
        record: dict[str, Any] = {"model": str(model), "n_ctx_train": n_ctx_train, "results": ppl_records(results)}
        if missing:
            left_out = [{"method": method, "n_tokens": n} for n, method in missing]
            record["not_measured"] = {"why": why, "readings": left_out}
        click.echo(json.dumps(record))
    else:
        click.echo(ppl_table(results, n_ctx_train))
        for r in results:
            if len(r.losses) < (wanted := min(texts, len(tokens) // r.n_tokens)):
                click.echo(f"{r.n_tokens} tokens, {r.method}: {len(r.losses)} of {wanted} texts: {why}")
        for n, method in missing:
            click.echo(f"{n:>8} {f'{n / n_ctx_train:.3g}x':>10}  {method:<12} not measured: {why}")
    if why == "interrupted":
        raise click.exceptions.Exit(EXIT_INTERRUPTED)
    if plot is not None and results:  # last: a file that cannot be written loses nothing
        with new_file(plot) as (picture, _):
            plot_perplexity(results, picture, f"{name_of(model)} on {file.name}", n_ctx_train)


def ppl_records(results: Sequence[LengthResult]) -> list[dict[str, Any]]:
    return [
        {
            "method": r.method,
            "n_tokens": r.n_tokens,
            "n_texts": len(r.losses),
            "perplexity": asdict(r.perplexity),
            "relative": asdict(r.ratio),
        }
        for r in results
    ]


def ppl_table(results: Sequence[LengthResult], n_ctx_train: int) -> str:
    rows = [f"{'tokens':>8} {'x trained':>10}  {'method':<12} {'perplexity':>18} {'relative':>16}"]
    for r in results:
        times = f"{r.n_tokens / n_ctx_train:.3g}x"
        rows.append(f"{r.n_tokens:>8} {times:>10}  {r.method:<12} {r.perplexity!s:>18} {r.ratio!s:>16}")
    return "\n".join(rows)


# ---- passkey -----------------------------------------------------------------------------------------------------


@evaluate.command()
@model_argument
@click.option(
    "--task", type=click.Choice(list(TASKS)), default="longlm", show_default=True, help="Prompt format or RULER task."
)
@lengths_option("1 to 16 trained contexts")
@click.option(
    "--depths", type=click.IntRange(1), default=5, show_default=True, help="Depths of the key, evenly spread."
)
@click.option("--trials", type=click.IntRange(1), default=5, show_default=True, help="Prompts a length and depth.")
@click.option("--digits", type=click.IntRange(5, 64), default=5, show_default=True, help="Digits of a key.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the prompts.")
@click.option("--plain", is_flag=True, help="Measure plain llama.cpp instead of Self-Extend.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a PNG: heat map of length x depth.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON record.")
@pretend_option
@self_extend_options
@device_options
@verbose_option
def passkey(
    model: Path,
    task: str,
    lengths: list[int] | None,
    depths: int,
    trials: int,
    digits: int,
    seed: int,
    plain: bool,
    plot: Path | None,
    as_json: bool,
    pretend_trained: int | None,
    **options: Any,
) -> None:
    """Measure retrieval by text length and depth.

    Does the model find what stands there? Scores are the fraction of the answers found, with 95 % confidence intervals.
    The bundled models understand the format `native`.

    \b
    Examples:
        sx-gguf eval passkey model.gguf
        sx-gguf eval passkey model.gguf --task niah_multikey_2 --lengths 4096,16384 --plot heat.png
    """
    overrides = pretended(model, pretend_trained)
    arguments = llama_arguments(**options) | overrides
    with ModelInfo(model, verbose=options["verbose"], **overrides) as info:
        n_ctx_train = info.n_ctx_train
        if lengths is None:
            parameters = {} if plain else {name: arguments[name] for name in PARAMETERS}
            room = context_within(n_ctx_train, LONGEST, **parameters) - ANSWER_ROOM
            lengths = usual_lengths(n_ctx_train, room)
        spread = [float(d) for d in np.linspace(0.05, 0.95, depths)] if depths > 1 else [0.5]
        with open_llama(model, max(lengths) + ANSWER_ROOM, plain, arguments) as llm, status_line() as show:
            cells = evaluate_grid(
                llm,
                task,
                lengths,
                spread,
                trials,
                count_tokens=lambda part: len(info.tokenizer.tokens(part)),
                seed=seed,
                digits=digits,
                text=read_text(DEMO_TEXT),
                on_progress=lambda n, depth: show(f"{n} tokens" + ("" if depth is None else f", depth {depth:.0%}")),
            )
    if as_json:
        click.echo(json.dumps({"model": str(model), "task": task, "cells": [asdict(cell) for cell in cells]}))
    else:
        click.echo(passkey_table(cells, n_ctx_train))
    if plot is not None:  # last: a file that cannot be written loses nothing
        rows = list(dict.fromkeys(cell.depth for cell in cells))
        scores = np.array([[cell.score for cell in cells if cell.depth == depth] for depth in rows])
        title = f"{task}: {name_of(model)}, {'plain llama.cpp' if plain else 'Self-Extend'}"
        with new_file(plot) as (picture, _):
            plot_retrieval(scores, lengths, [0.5 if depth is None else depth for depth in rows], picture, title)


@contextmanager
def open_llama(model: Path, n_ctx: int, plain: bool, arguments: dict[str, Any]) -> Iterator[llama_cpp.Llama]:
    """Ours, or llama_cpp's with the same arguments."""
    if plain:
        arguments = {name: value for name, value in arguments.items() if name not in PARAMETERS}
        llm = llama_cpp.Llama(str(model), n_ctx=whole_cells(n_ctx), **arguments)
    else:
        llm = Llama(str(model), n_ctx=n_ctx, **arguments)
    try:
        yield llm
    finally:
        llm.close()


def passkey_table(cells: Sequence[Cell], n_ctx_train: int) -> str:
    rows = [f"{'tokens':>8} {'x trained':>10} {'depth':>7} {'score':>7}  95 % interval"]
    for c in cells:
        depth = "" if c.depth is None else f"{c.depth:.0%}"
        times = f"{c.n_tokens / n_ctx_train:.3g}x"
        rows.append(f"{c.n_tokens:>8} {times:>10} {depth:>7} {c.score:>7.2f}  {c.low:.2f} to {c.high:.2f}")
    return "\n".join(rows)
