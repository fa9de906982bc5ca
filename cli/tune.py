"""`sx-gguf tune`: choose Self-Extend's parameters by measurement."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from selfextend_gguf.atomic_file import new_file
from selfextend_gguf.documents import Pages
from selfextend_gguf.evaluation import tune as tuning
from selfextend_gguf.evaluation.kept import Kept
from selfextend_gguf.evaluation.readers import pretended
from selfextend_gguf.evaluation.readings import Readings
from selfextend_gguf.evaluation.tune import Trial
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import DEMO_TEXT

from .errors import collect, reason
from .options import (
    budget_option,
    device_options,
    model_argument,
    model_arguments,
    pretend_option,
    resume_option,
    verbose_option,
)
from .progress import status_line
from .texts import PAGES_OF_WHAT, pages_option, read_text

SHOWN = 5


@click.command()
@model_argument
@click.option("-c", "--ctx", type=click.IntRange(2), required=True, help="Context to tune for, in tokens.")
@click.option("-f", "--file", type=click.Path(path_type=Path), help="Text or document like yours [a bundled one].")
@pages_option
@resume_option
@budget_option(1200)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write the best parameters for --config.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON record.")
@pretend_option
@device_options
@verbose_option
def tune(
    model: Path,
    ctx: int,
    file: Path | None,
    pages: Pages | None,
    resume: Path | None,
    budget: float,
    out: Path | None,
    as_json: bool,
    pretend_trained: int | None,
    **options: Any,
) -> None:
    """Try Self-Extend's parameters on a text, and print the best.

    Schedules, group sizes, windows and distances are ranked by perplexity on the same tokens (those beyond the trained
    context), paired with the automatic parameters. Keys that are hidden in the text are asked for. Ctrl-C ends it with
    the best so far.

    \b
    Examples:
        sx-gguf tune model.gguf --ctx 16384 -f book.txt -o tuned.json
        sx-gguf run model.gguf --ctx 16384 --config tuned.json -f book.txt
    """
    if pages is not None and file is None:
        raise click.UsageError(PAGES_OF_WHAT)
    text = read_text(file or DEMO_TEXT, pages)
    overrides = pretended(model, pretend_trained)
    arguments = model_arguments(**options) | overrides
    with ModelInfo(model, verbose=options["verbose"], **overrides) as info:
        tokens, n_ctx_train = info.tokenizer.tokens(text), info.n_ctx_train
        if ctx <= n_ctx_train:
            raise click.ClickException(f"{ctx} tokens fit the trained context of {n_ctx_train}: nothing to tune")
        if ctx > len(tokens):
            raise click.ClickException(f"the text has {len(tokens)} tokens, {ctx} are needed: give a longer with -f")
        readings = Readings(str(model), kept=Kept(resume), seconds=budget, **arguments)
        with status_line() as show:

            def progress(done: int, left: int) -> None:
                show(f"{done} readings, {left} candidates, {max(0, readings.seconds_left or 0):.0f} s left")

            measuring = tuning.tune(readings, tokens, ctx, tokenizer=info.tokenizer, on_progress=progress)
            rankings, stop = collect(measuring)
    trials, why = rankings[-1] if rankings else [], reason(stop)
    n_unread = sum(1 for _ in tuning.candidates(n_ctx_train, ctx)) - len(trials)
    if not trials:
        raise click.ClickException(f"no time to read anything within {budget:g} s: give a larger --budget")
    best, default = trials[0], next(t for t in trials if t.is_default)
    if pretend_trained is None:
        command = f"sx-gguf run {shlex.quote(str(model))} --ctx {ctx} {flags(best)}"
    else:  # the parameters are for a model that `run` does not see
        read = f"{shlex.quote(str(model))} -f {shlex.quote(str(file or DEMO_TEXT))} --lengths {ctx}"
        command = f"sx-gguf eval ppl {read} --pretend-trained {pretend_trained} {flags(best)}"
    if as_json:
        records = [record(trial, default) for trial in trials]
        click.echo(json.dumps({"command": command, "trials": records, "not_reached": n_unread, "why": why}))
    else:
        click.echo(table(trials, default))
        if n_unread:
            click.echo(f"{n_unread} of {n_unread + len(trials)} candidates not reached: {why}")
        click.echo(f"\n{command}")
    # Last: a file that cannot be written must not cost what took minutes to measure.
    if out is not None:
        with new_file(out) as (written, _):
            written.write(json.dumps(best.parameters).encode() + b"\n")
    if stop is not None:
        raise stop


def table(trials: Sequence[Trial], default: Trial) -> str:
    """The best trials and the default."""
    rows = [f"{'perplexity, relative to automatic':<35}{'keys found':<12}parameters"]
    for trial in [*trials[:SHOWN], *([default] if default not in trials[:SHOWN] else [])]:
        found = "" if trial.retrieval is None else f"{trial.retrieval:.2f}"
        rows.append(f"{trial.ratio_to(default)!s:<35}{found:<12}{flags(trial)}{'  (automatic)' * trial.is_default}")
    return "\n".join(rows)


def record(trial: Trial, default: Trial) -> dict[str, Any]:
    """A trial for --json."""
    ratio = trial.ratio_to(default)
    return {
        "parameters": trial.parameters,
        "is_default": trial.is_default,
        "relative_perplexity": ratio.value,
        "standard_error": ratio.error,
        "retrieval": trial.retrieval,
    }


def flags(trial: Trial) -> str:
    """The parameters as options of the command line."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in trial.parameters.items())
