"""`sx-gguf eval`: perplexity and retrieval beyond the trained context."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from selfextend_gguf.atomic_file import new_file
from selfextend_gguf.documents import Pages
from selfextend_gguf.evaluation.kept import Kept
from selfextend_gguf.evaluation.perplexity import LengthResult, compare
from selfextend_gguf.evaluation.plots import plot_perplexity, plot_retrieval
from selfextend_gguf.evaluation.readers import METHODS, pretended
from selfextend_gguf.evaluation.readings import Readings
from selfextend_gguf.evaluation.retrieval import Exam, Retrieved, key_exams, methods_at, retrieve, task_exams
from selfextend_gguf.evaluation.tasks import TASKS, WITH_DEPTH
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import DEMO_TEXT
from selfextend_gguf.planning import PARAMETERS, context_within, longest_context
from selfextend_gguf.schedule import LONGEST, SCHEDULES
from selfextend_gguf.stores import name_of

from .errors import collect, reason
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
KEYS = "keys"  # in place of a task


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


against_option = click.option(
    "--against",
    type=click.Choice(["all", *AGAINST]),
    multiple=True,
    help="Other methods to read the same text by; may be given several times.",
)


def compared(schedule: str, against: Sequence[str]) -> list[str]:
    """Self-Extend by a schedule, plain llama.cpp, and the others."""
    return list(dict.fromkeys([schedule, "plain", *(AGAINST if "all" in against else against)]))


def reading(readings: Readings, method: str, n_tokens: int) -> str:
    """What is being done, and the time that is left."""
    most, left = readings.estimate(method, n_tokens), readings.seconds_left
    takes = f", at most {most:.0f} s" if most else ""
    return f"reading {n_tokens} tokens: {method}{takes}" + ("" if left is None else f"; {max(0, left):.0f} s left")


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
@against_option
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
    methods = compared(schedule, against)
    readings = Readings(str(model), kept=Kept(resume), seconds=budget, **arguments)
    with status_line() as show:
        measuring = compare(
            readings,
            tokens,
            methods,
            lengths,
            n_texts=texts,
            bos=bos,
            on_progress=lambda method, n: show(reading(readings, method, n)),
            parameters=parameters,
        )
        so_far, stop = collect(measuring)
    why = reason(stop)
    measured = {(r.n_tokens, r.method): r for r in so_far}
    results = list(measured.values())
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
    if stop is not None:
        raise stop
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
    "--task",
    type=click.Choice([KEYS, *TASKS]),
    default=KEYS,
    show_default=True,
    help="Many keys in one text, or a prompt for each: LongLM's, llama.cpp's, or a RULER task.",
)
@lengths_option("half, 1 and 2 trained contexts")
@click.option(
    "--depths", type=click.IntRange(1), default=5, show_default=True, help="Depths that are told apart, evenly spread."
)
@click.option(
    "--trials", type=click.IntRange(1), help="Texts a length [1]; of other tasks: prompts a length and depth [5]."
)
@click.option("--digits", type=click.IntRange(5, 64), default=5, show_default=True, help="Digits of a key.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the keys and prompts.")
@against_option
@resume_option
@budget_option(1200)
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
    trials: int | None,
    digits: int,
    seed: int,
    against: Sequence[str],
    resume: Path | None,
    budget: float,
    plot: Path | None,
    as_json: bool,
    pretend_trained: int | None,
    **options: Any,
) -> None:
    """Measure retrieval by text length and depth.

    Does the model find what stands there? Each text holds up to 34 keys. It is read once by Self-Extend, by plain
    llama.cpp, and by others with --against; then the keys are asked for one by one at its end. Within the trained
    context all methods read alike: plain stands for them. Scores are the fraction of the answers found, with 95 %
    confidence intervals.

    With another --task there is a prompt for each answer. The bundled models understand `keys` and `native`.

    \b
    Examples:
        sx-gguf eval passkey model.gguf
        sx-gguf eval passkey model.gguf --lengths 16384,32768 --trials 3 --budget 3600 --resume kept.jsonl
        sx-gguf eval passkey model.gguf --task niah_multikey_2 --lengths 4096,16384 --plot heat.png
    """
    overrides = pretended(model, pretend_trained)
    arguments = llama_arguments(**options) | overrides
    parameters = {name: arguments.pop(name) for name in PARAMETERS}
    with ModelInfo(model, verbose=options["verbose"], **overrides) as info:
        n_ctx_train = info.n_ctx_train
        room = context_within(n_ctx_train, LONGEST, **parameters)
        methods = compared(parameters.pop("schedule") or SCHEDULES[0], against)
        if lengths is None:
            # The first one tells how fast the model is. A text of fewer than 256 bytes has no room for keys.
            usual = (n_ctx_train // 2, n_ctx_train, 2 * n_ctx_train)
            lengths = [n for n in usual if (256 <= n <= room) or n == n_ctx_train]
        spread = [float(d) for d in np.linspace(0.05, 0.95, depths)] if depths > 1 else [0.5]
        how: dict[str, Any] = {"digits": digits, "seed": seed, "text": read_text(DEMO_TEXT)}
        exams: Callable[[int], Iterator[Exam]]
        if task == KEYS:
            n_exams = trials or 1
            exams = partial(key_exams, info.tokenizer, n_texts=n_exams, n_depths=depths, **how)
        else:
            n_exams = (trials or 5) * (depths if task in WITH_DEPTH else 1)
            exams = partial(task_exams, info.tokenizer, task, n_trials=trials or 5, depths=spread, **how)
        readings = Readings(str(model), kept=Kept(resume), seconds=budget, **arguments)
        with status_line() as show:
            measuring = retrieve(
                readings,
                exams,
                methods,
                lengths,
                tokenizer=info.tokenizer,
                on_progress=lambda method, n: show(reading(readings, method, n)),
                parameters=parameters,
            )
            so_far, stop = collect(measuring)
    why = reason(stop)
    measured = {(r.n_tokens, r.method): r for r in so_far}
    results = list(measured.values())
    wanted = [(n, method) for n in lengths for method in methods_at(n, n_ctx_train, methods)]
    n_read = {key: measured[key].n_texts if key in measured else 0 for key in wanted}
    missing = {key: n for key, n in n_read.items() if n < n_exams}
    if as_json:
        record = {"model": str(model), "task": task, "n_ctx_train": n_ctx_train}
        record["results"] = [passkey_record(r) for r in results]
        if missing:
            left_out = [{"method": m, "n_tokens": n, "n_read": done} for (n, m), done in missing.items()]
            record["not_measured"] = {"why": why, "n_texts": n_exams, "readings": left_out}
        click.echo(json.dumps(record))
    else:
        click.echo(passkey_table(results, n_ctx_train))
        if missing:
            parts = [
                f"{n} tokens {method}" + (f" ({n_exams - done} of {n_exams} texts)" if done else "")
                for (n, method), done in missing.items()
            ]
            click.echo(f"not measured ({why}): {', '.join(parts)}")
    if stop is not None:
        raise stop
    if plot is not None and results:  # last: a file that cannot be written loses nothing
        shown = [r for r in results if r.method in methods_at(r.n_tokens, n_ctx_train, methods[:1])]
        heat_map(shown, plot, f"{task}: {name_of(model)}, {methods[0]}")


def heat_map(results: Sequence[Retrieved], plot: Path, title: str) -> None:
    """Scores of one method, a column a length; a single row for a task without depths."""
    depths = sorted({depth for r in results for depth in r.by_depth})
    scores = [[r.by_depth[d].score if d in r.by_depth else np.nan for r in results] for d in depths]
    if not depths:
        depths, scores = [0.5], [[r.score.score for r in results]]
    with new_file(plot) as (picture, _):
        plot_retrieval(np.array(scores), [r.n_tokens for r in results], depths, picture, title)


def passkey_record(result: Retrieved) -> dict[str, Any]:
    return {
        "method": result.method,
        "n_tokens": result.n_tokens,
        "n_texts": result.n_texts,
        **asdict(result.score),
        "depths": [{"depth": depth, **asdict(score)} for depth, score in result.by_depth.items()],
    }


def passkey_table(results: Sequence[Retrieved], n_ctx_train: int) -> str:
    depths = sorted({depth for r in results for depth in r.by_depth})
    by_depth = "".join(f"{f'at {depth:.0%}':>8}" for depth in depths)
    rows = [f"{'tokens':>8} {'x trained':>10}  {'method':<12} {'score':>7}  95 % interval{by_depth}"]
    for r in results:
        times = f"{r.n_tokens / n_ctx_train:.3g}x"
        parts = "".join(f"{f'{r.by_depth[d].score:.2f}' if d in r.by_depth else '':>8}" for d in depths)
        interval = f"{r.score.low:.2f} to {r.score.high:.2f}"
        rows.append(
            f"{r.n_tokens:>8} {times:>10}  {r.method:<12} {r.score.score:>7.2f}  {interval:<13}{parts}".rstrip()
        )
    return "\n".join(rows)
