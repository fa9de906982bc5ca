"""Options that several commands share, named like llama.cpp's."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from selfextend_gguf._native import restore_log
from selfextend_gguf.arguments import check_arguments
from selfextend_gguf.errors import ConfigError
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.planning import PARAMETERS, TIMES_TRAINED, check_parameters
from selfextend_gguf.schedule import SCHEDULES, TRUSTED_DISTANCES

T = TypeVar("T")
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _combine(*options: Decorator) -> Decorator:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


model_argument = click.argument("model", type=click.Path(path_type=Path))


def _be_verbose(context: click.Context, _: click.Parameter, value: bool) -> bool:
    """Note it where the group sees it, which reports errors when this context is gone."""
    if value:
        context.meta[VERBOSE] = True
        restore_log()
    return value


VERBOSE = "selfextend_gguf.verbose"  #: in the metadata that click's contexts share
verbose_option = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    is_eager=True,
    callback=_be_verbose,
    help="Show llama.cpp's log, and tracebacks of errors.",
)

context_option = click.option(
    "-c",
    "--ctx",
    type=click.IntRange(1),
    help=f"Context in tokens [{TIMES_TRAINED} times the trained one, or less if that is out of reach].",
)


def at_most_one(values: Mapping[str, T | None]) -> T | None:
    """The one value that is given, None if none is; `values` by how users know them. UsageError for more."""
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    if len(given) > 1:
        *others, last = given
        raise click.UsageError(f"give {', '.join(others)} or {last}, not both")
    return next(iter(given.values()), None)


def _load_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Let a file written by `tune` give the defaults of Self-Extend's options."""
    if path is None:
        return
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{path} is no file that `sx-gguf tune` wrote: {error}") from error
    if not isinstance(values, dict):
        raise click.BadParameter(f"{path} is no file that `sx-gguf tune` wrote: it holds no JSON object")
    unknown = set(values) - set(PARAMETERS)
    if unknown:
        raise click.BadParameter(f"{path} has unknown parameters: {', '.join(sorted(unknown))}")
    try:
        values = check_parameters(values)  # click would make 1 of true and of 1.5
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    context.default_map = {**(context.default_map or {}), **values}


self_extend_options = _combine(
    click.option(
        "--config",
        type=click.Path(path_type=Path),
        callback=_load_config,
        is_eager=True,
        expose_value=False,
        help="File written by `sx-gguf tune`; the options below override it.",
    ),
    click.option(
        "-gan", "--group-size", type=int, help="Tokens that share a key position outside the window [automatic]."
    ),
    click.option("-gaw", "--neighbor-window", type=int, help="Latest tokens that keep exact distances [automatic]."),
    click.option(
        "--max-distance",
        type=int,
        help=f"No query sees a distance of so many tokens [{TRUSTED_DISTANCES} of the trained context, or all of it "
        "where only that reaches; adagrope: half of it, the other schedules: all].",
    ),
    click.option("--block-size", type=int, help="Steps in which the grouped part grows, in tokens [automatic]."),
    click.option(
        "--schedule", type=click.Choice(SCHEDULES), help=f"How keys are grouped as the text grows [{SCHEDULES[0]}]."
    ),
)

text_options = _combine(
    click.option(
        "-n",
        "--predict",
        type=click.IntRange(1),
        default=256,
        show_default=True,
        help="Most tokens to generate for an answer.",
    ),
    click.option(
        "-b", "--batch-size", type=click.IntRange(1), default=512, show_default=True, help="Most tokens read at once."
    ),
    click.option("--raw", is_flag=True, help="Leave out the model's chat template."),
    click.option("--special", is_flag=True, help="Recognise special tokens in texts too, such as <|im_end|>."),
    click.option("--system", help="System message for the chat template."),
)

cache_type_options = _combine(
    click.option(
        "-ctk",
        "--cache-type-k",
        type=click.Choice(list(KV_TYPES)),
        default="f16",
        show_default=True,
        help="Type of the cached keys.",
    ),
    click.option(
        "-ctv",
        "--cache-type-v",
        type=click.Choice(list(KV_TYPES)),
        default="f16",
        show_default=True,
        help="Type of the cached values.",
    ),
)

device_options = _combine(
    click.option(
        "-t", "--threads", type=click.IntRange(1), help="CPU threads [half of the cores to generate, all to read]."
    ),
    click.option(
        "-ngl", "--gpu-layers", type=int, default=0, show_default=True, help="Layers to put on the GPU; -1 = all."
    ),
    cache_type_options,
)

prompt_cache_options = _combine(
    click.option(
        "--prompt-cache",
        type=click.Path(path_type=Path),
        help="File that keeps what was read: a later prompt that begins alike is not read again.",
    ),
    click.option("--prompt-cache-ro", type=click.Path(path_type=Path), help="The same, but the file is not written."),
)

sampling_options = _combine(
    click.option("--temp", type=click.FloatRange(0), default=0.8, show_default=True, help="Temperature; 0 = greedy."),
    click.option(
        "--top-k", type=int, default=40, show_default=True, help="Sample from the k likeliest tokens; 0 = all."
    ),
    click.option("--top-p", type=click.FloatRange(0, 1), default=0.95, show_default=True, help="Nucleus sampling."),
    click.option(
        "--min-p", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Least relative probability."
    ),
    click.option("--repeat-penalty", type=float, default=1.0, show_default=True, help="Penalty on repeated tokens."),
    # llama_cpp.Llama would take the same seed every time.
    click.option("--seed", type=int, default=lambda: secrets.randbits(31), help="Seed of the sampler [random]."),
)


def take_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Move the values of `sampling_options`, except the seed, into arguments of `create_completion`."""
    names = {"temperature": "temp"} | {name: name for name in ("top_k", "top_p", "min_p", "repeat_penalty")}
    return {argument: options.pop(name) for argument, name in names.items()}


def model_arguments(
    *, threads: int | None, gpu_layers: int, cache_type_k: str, cache_type_v: str, verbose: bool
) -> dict[str, Any]:
    """Arguments of both `Llama` classes from `device_options` and `verbose_option`. Raises ConfigError."""
    arguments = {
        "n_threads": threads,
        "n_threads_batch": threads,
        "n_gpu_layers": gpu_layers,
        "type_k": KV_TYPES[cache_type_k],
        "type_v": KV_TYPES[cache_type_v],
        "verbose": verbose,
    }
    return check_arguments(arguments)  # llama_cpp's own does not


def llama_arguments(**options: Any) -> dict[str, Any]:
    """Arguments of our `Llama` from those and `self_extend_options`."""
    parameters = {name: options.pop(name) for name in PARAMETERS}
    return model_arguments(**options) | parameters
