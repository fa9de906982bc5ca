"""Options that several commands share, named like llama.cpp's."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import click
import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar

from selfextend_gguf._native import restore_log
from selfextend_gguf.arguments import check_arguments
from selfextend_gguf.chat_schemas import SchemaGrammar
from selfextend_gguf.cores import fast_cores
from selfextend_gguf.devices import ALL_LAYERS, add_rpc_server, usual_layers
from selfextend_gguf.drafting import PromptLookup
from selfextend_gguf.errors import ConfigError, TemplateError
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.more_samplers import SAMPLERS, MoreSamplers
from selfextend_gguf.planning import PARAMETERS, TIMES_TRAINED, check_parameters
from selfextend_gguf.sampling import end_tokens
from selfextend_gguf.schedule import SCHEDULES, TRUSTED_DISTANCES
from selfextend_gguf.stores import model_path
from selfextend_gguf.templates import ChatTemplate, check_variables

from .errors import VERBOSE
from .settings import precedence
from .texts import read_text

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _combine(*options: Decorator) -> Decorator:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class ModelName(click.Path):
    """A path, or a name in another program's store (see stores/)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        offline = ctx is not None and ctx.meta.get(OFFLINE, False)
        return model_path(os.fsdecode(super().convert(value, param, ctx)), offline=offline)


def _be_offline(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.meta[OFFLINE] = value


OFFLINE = "selfextend_gguf.offline"  #: in the metadata that click's contexts share
offline_option = click.option(
    "--offline",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_be_offline,
    help="Download nothing: hf: names mean what Hugging Face's cache holds.",
)
model_argument = _combine(click.argument("model", type=ModelName(path_type=Path)), offline_option)


def _be_verbose(context: click.Context, _: click.Parameter, value: bool) -> bool:
    """Note it where the group sees it, which reports errors when this context is gone."""
    if value:
        context.meta[VERBOSE] = True
        restore_log()
    return value


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


def at_most_one(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` by how users know them, one of them given at most; others are None. UsageError for more.

    What was typed comes before environment variables, and these before the file of settings."""
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    first = min(map(precedence, given), default=0)
    names = [name for name in given if precedence(name) == first]
    if len(names) > 1:
        *others, last = names
        raise click.UsageError(f"give {', '.join(others)} or {last}, not both")
    return {name: value if name in names else None for name, value in values.items()}


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


def _check_count(_: click.Context, __: click.Parameter, value: int | None) -> int | None:
    if value is not None and (value == 0 or value < UNLIMITED):
        raise click.BadParameter(f"{value} is neither a number of tokens nor {UNLIMITED}")
    return value


UNLIMITED = -1  #: as -n: until the model ends or the context is full
LIMIT = 256  #: without -n, tokens for an answer of which nobody knows where it ends


def predict_option(default: int | None, also: str = "") -> Decorator:
    """-n. `also` ends its help."""
    return click.option(
        "-n",
        "--predict",
        type=int,
        callback=_check_count,
        default=default,
        show_default=default is not None,
        help=f"Most tokens to generate for an answer; {UNLIMITED} = until the model ends or the context is full{also}.",
    )


batch_option = click.option(
    "-b", "--batch-size", type=click.IntRange(1), default=512, show_default=True, help="Most tokens read at once."
)

text_options = _combine(
    batch_option,
    click.option("--raw", is_flag=True, help="Leave out the model's chat template."),
    click.option("--special", is_flag=True, help="Recognise special tokens in texts too, such as <|im_end|>."),
    click.option("--system", help="System message for the chat template."),
    click.option(
        "-sysf", "--system-prompt-file", type=click.Path(path_type=Path), help="UTF-8 text file of the system message."
    ),
)

template_options = _combine(
    click.option(
        "--chat-template",
        "--chat-template-file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="File with a chat template (Jinja) to use in place of the model's.",
    ),
    click.option(
        "--chat-template-kwargs", metavar="JSON", help='Variables for the chat template: {"enable_thinking": false}.'
    ),
)


def take_template(options: dict[str, Any]) -> dict[str, Any]:
    """Move the values of `template_options` into arguments of `ModelInfo`. UsageError, ConfigError."""
    file, variables = options.pop("chat_template"), options.pop("chat_template_kwargs")
    template = None if file is None else read_text(file)
    if template is not None:
        try:
            ChatTemplate(template).check()
        except TemplateError as error:
            raise TemplateError(f"{file}: {error}") from error
    return {"chat_template": template, "template_variables": check_variables(_parse_json(variables or "{}"))}


def take_system(options: dict[str, Any], system: str | None) -> str | None:
    """The system message, from --system or the file of -sysf, which is taken out of `options`."""
    values = {"--system": system, "-sysf": options.pop("system_prompt_file")}
    system, file = at_most_one(values).values()
    return system if file is None else read_text(file)


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


class Layers(click.ParamType[int | None]):
    """A number of layers, or a word for one."""

    name = "layers"
    words: ClassVar[dict[str, int | None]] = {"auto": None, "all": ALL_LAYERS}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """None: as many as `usual_layers` says, when all devices are known."""
        return self.words[value] if value in self.words else click.INT.convert(value, param, ctx)


def _split(kind: click.ParamType[Any]) -> Callable[[click.Context, click.Parameter, str | None], list[Any] | None]:
    """A callback for values with commas."""

    def split(context: click.Context, option: click.Parameter, value: str | None) -> list[Any] | None:
        return None if value is None else [kind.convert(part.strip(), option, context) for part in value.split(",")]

    return split


SPLIT_MODES = {
    "none": llama_cpp.LLAMA_SPLIT_MODE_NONE,
    "layer": llama_cpp.LLAMA_SPLIT_MODE_LAYER,
    "row": llama_cpp.LLAMA_SPLIT_MODE_ROW,
}
device_options = _combine(
    click.option(
        "-t",
        "--threads",
        type=click.IntRange(1),
        help="CPU threads [one a core to generate, all of its threads to read].",
    ),
    click.option(
        "-ngl",
        "--gpu-layers",
        type=Layers(),
        default="auto",
        show_default=True,
        metavar="N",
        help="Layers to put on GPUs; all, or auto = all where llama.cpp has a GPU.",
    ),
    click.option(
        "-dev",
        "--device",
        metavar="A,B,...",
        callback=_split(click.STRING),
        help="Devices for them, as `sx-gguf info` names them; none = the CPU only [all].",
    ),
    click.option(
        "-sm",
        "--split-mode",
        type=click.Choice(list(SPLIT_MODES)),
        default="layer",
        show_default=True,
        help="What is divided between several devices.",
    ),
    click.option(
        "-ts",
        "--tensor-split",
        metavar="N,N,...",
        callback=_split(click.FLOAT),
        help="Shares of the devices, such as 3,1 [as their memory is free].",
    ),
    click.option(
        "-mg",
        "--main-gpu",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="The device for everything, by its place, with -sm none.",
    ),
    click.option(
        "--rpc",
        metavar="HOST:PORT,...",
        callback=_split(click.STRING),
        help="Servers of llama.cpp's RPC backend, whose devices are used as well.",
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
    click.option(
        "--repeat-last-n",
        type=click.IntRange(0),
        default=64,
        show_default=True,
        help="Latest tokens that the penalties look at; 0 = none.",
    ),
    click.option(
        "--presence-penalty", type=float, default=0.0, show_default=True, help="Penalty on tokens that occurred."
    ),
    click.option(
        "--frequency-penalty", type=float, default=0.0, show_default=True, help="The same, times how often they did."
    ),
    click.option(
        "--typical",
        type=click.FloatRange(0, 1),
        default=1.0,
        show_default=True,
        help="Locally typical sampling; 1 = off.",
    ),
    click.option(
        "--mirostat",
        type=click.IntRange(0, 2),
        default=0,
        show_default=True,
        help="Mirostat 1 or 2 in place of top-k, top-p, min-p and typical; 0 = off.",
    ),
    click.option(
        "--mirostat-lr", type=click.FloatRange(0), default=0.1, show_default=True, help="Learning rate of Mirostat."
    ),
    click.option(
        "--mirostat-ent", type=click.FloatRange(0), default=5.0, show_default=True, help="Entropy Mirostat aims at."
    ),
    click.option(
        "--top-nsigma",
        "top_n_sigma",
        type=float,
        default=-1.0,
        show_default=True,
        help="Leave out tokens so many standard deviations below the likeliest; negative = none.",
    ),
    click.option(
        "--xtc-probability",
        type=click.FloatRange(0, 1),
        default=0.0,
        show_default=True,
        help="Probability of leaving out the likeliest tokens (XTC).",
    ),
    click.option(
        "--xtc-threshold",
        type=click.FloatRange(0, 1),
        default=0.1,
        show_default=True,
        help="Least probability of those tokens.",
    ),
    click.option(
        "--dynatemp-range",
        type=click.FloatRange(0),
        default=0.0,
        show_default=True,
        help="Temperature that goes so far up and down with the entropy.",
    ),
    click.option(
        "--dynatemp-exp", "dynatemp_exponent", type=float, default=1.0, show_default=True, help="Its exponent."
    ),
    click.option(
        "--dry-multiplier",
        type=click.FloatRange(0),
        default=0.0,
        show_default=True,
        help="Penalty on going on with a repetition (DRY); 0 = off.",
    ),
    click.option("--dry-base", type=float, default=1.75, show_default=True, help="Base of that penalty."),
    click.option(
        "--dry-allowed-length",
        type=click.IntRange(0),
        default=2,
        show_default=True,
        help="Repetitions of so many tokens are free.",
    ),
    click.option(
        "--dry-penalty-last-n",
        type=click.IntRange(-1),
        default=-1,
        show_default=True,
        help="Latest tokens in which repetitions are looked for; -1 = the context.",
    ),
    click.option(
        "--dry-sequence-breaker",
        "dry_sequence_breakers",
        multiple=True,
        help='Text that ends repetitions, several times; none = no such text [a line break, :, ", *].',
    ),
    click.option(
        "--samplers",
        metavar="A;B;...",
        default=";".join(SAMPLERS),
        help=f"Samplers to apply, in this order [{'; '.join(SAMPLERS)}].",
    ),
    click.option(
        "--logit-bias",
        multiple=True,
        metavar="TOKEN+BIAS",
        help="Make a token, given by its number, likelier (15043+1) or less likely (15043-1); several times.",
    ),
    click.option("--ignore-eos", is_flag=True, help="Never choose a token that ends the answer."),
    click.option("--grammar", help="Grammar (GBNF) that answers follow."),
    click.option("--grammar-file", type=click.Path(path_type=Path), help="File with such a grammar."),
    click.option("-j", "--json-schema", help="JSON schema that answers fit; {} = any object."),
    click.option("-jf", "--json-schema-file", type=click.Path(path_type=Path), help="File with such a schema."),
    # llama_cpp.Llama would take the same seed every time.
    click.option("--seed", type=int, default=lambda: secrets.randbits(31), help="Seed of the sampler [random]."),
)

_SAMPLING = {  # arguments of `create_completion`, and the options that give them
    "temperature": "temp",
    "typical_p": "typical",
    "mirostat_mode": "mirostat",
    "mirostat_eta": "mirostat_lr",
    "mirostat_tau": "mirostat_ent",
} | {name: name for name in ("top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty")}
_BIAS = re.compile(r"([0-9]+)([+-](?:[0-9.]+|inf))")


def take_sampling(options: dict[str, Any], info: ModelInfo) -> dict[str, Any]:
    """Move the values of `sampling_options`, but for the seed and --repeat-last-n, into arguments of
    `create_completion`. UsageError, GrammarError."""
    sampling = {argument: options.pop(name) for argument, name in _SAMPLING.items()}
    bias = dict(map(_bias, options.pop("logit_bias")))
    if options.pop("ignore_eos"):
        bias |= dict.fromkeys(end_tokens(info.model), -math.inf)
    return sampling | {"logit_bias": bias or None, "grammar": _take_grammar(options)}


def take_more_samplers(options: dict[str, Any]) -> MoreSamplers:
    """Move the values of the other `sampling_options` into what `Llama.more_samplers` can be. ConfigError."""
    values = {field.name: options.pop(field.name) for field in fields(MoreSamplers)}
    values["samplers"] = [name.strip() for name in values["samplers"].split(";") if name.strip()]
    breakers = values.pop("dry_sequence_breakers")
    if breakers:
        values["dry_sequence_breakers"] = [] if breakers == ("none",) else breakers
    return MoreSamplers(**values)


def _bias(text: str) -> tuple[int, float]:
    parts = _BIAS.fullmatch(text)
    try:
        return int(parts[1]), float(parts[2])  # type: ignore[index]
    except (TypeError, ValueError):
        raise click.BadParameter(f"--logit-bias must be like 15043+1 or 15043-inf, not {text!r}") from None


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{textwrap.shorten(text, 60)!r} is no JSON: {error}") from error


def _take_grammar(options: dict[str, Any]) -> LlamaGrammar | None:
    names = ("grammar", "grammar_file", "json_schema", "json_schema_file")
    values = {f"--{name.replace('_', '-')}": options.pop(name) for name in names}
    grammar, grammar_file, schema, schema_file = at_most_one(values).values()
    if grammar_file is not None:
        grammar = read_text(grammar_file)
    if grammar is not None:
        return LlamaGrammar.from_string(grammar, verbose=False)
    if schema_file is not None:
        schema = read_text(schema_file)
    if schema is None:
        return None
    wanted = _parse_json(schema)
    return SchemaGrammar(json.dumps({"type": "object"} if wanted == {} else wanted))


FLASH_ATTN = {"on": True, "off": False, "auto": None}  #: what `Llama` takes for a value of the option
flash_attn_option = click.option(
    "-fa",
    "--flash-attn",
    type=click.Choice(list(FLASH_ATTN)),
    default="auto",
    show_default=True,
    help="Flash attention.",
)

loading_options = _combine(
    flash_attn_option,
    click.option("--mlock", is_flag=True, help="Keep the model in memory, never in swap."),
    click.option("--no-mmap", is_flag=True, help="Read the model file instead of mapping it into memory."),
    click.option(
        "--lora",
        type=click.Path(path_type=Path),
        multiple=True,
        help="LoRA adapter (GGUF) for the model; may be given several times.",
    ),
    click.option("--lora-scaled", metavar="FILE:SCALE", multiple=True, help="The same, with a factor."),
    click.option(
        "--draft",
        type=click.Choice(["lookup"]),
        help="Guess tokens that follow where the latest ones occurred before: faster where answers repeat the text.",
    ),
)


def take_loading(options: dict[str, Any]) -> dict[str, Any]:
    """Move the values of `loading_options` and --repeat-last-n into arguments of our `Llama`. ConfigError."""
    return check_arguments(
        {
            "flash_attn": FLASH_ATTN[options.pop("flash_attn")],
            "use_mlock": options.pop("mlock"),
            "use_mmap": not options.pop("no_mmap"),
            "adapters": _adapters(options.pop("lora"), options.pop("lora_scaled")),
            "last_n_tokens_size": options.pop("repeat_last_n"),
            "draft_model": PromptLookup() if options.pop("draft") else None,
        }
    )


def _adapters(plain: Sequence[Path], scaled: Sequence[str]) -> dict[str, float]:
    """Scales by paths. UsageError."""
    pairs = [(str(path), 1.0) for path in plain]
    for text in scaled:
        path, _, factor = text.rpartition(":")
        try:
            pairs.append((path, float(factor)))
        except ValueError:
            path = ""
        if not path:
            raise click.UsageError(f"--lora-scaled must be like adapter.gguf:0.5, not {text!r}")
    adapters = dict(pairs)
    if len(adapters) < len(pairs):
        raise click.UsageError("an adapter is given twice")
    return adapters


resume_option = click.option(
    "--resume", type=click.Path(path_type=Path), help="Keep results in this file, and go on from there."
)


def budget_option(default: float | None = None) -> Decorator:
    """--budget: seconds to measure, None for no limit."""
    return click.option(
        "--budget",
        type=click.FloatRange(0),
        default=default,
        show_default=default is not None,
        help="Seconds to spend: what might take longer is not begun.",
    )


pretend_option = click.option(
    "--pretend-trained",
    type=click.IntRange(2),
    metavar="N",
    help="Read as if trained on N tokens, fewer than the model was.",
)


def model_arguments(
    *,
    threads: int | None,
    gpu_layers: int | None,
    device: list[str] | None,
    split_mode: str,
    tensor_split: list[float] | None,
    main_gpu: int,
    rpc: list[str] | None,
    cache_type_k: str,
    cache_type_v: str,
    verbose: bool,
) -> dict[str, Any]:
    """Arguments of both `Llama` classes from `device_options` and `verbose_option`; `devices`, which is ours, only if
    some were named. Raises ConfigError."""
    for server in rpc or []:
        add_rpc_server(server)
    if device == ["none"]:
        gpu_layers, device = 0, None
    arguments = {
        "n_threads": threads or fast_cores(),
        "n_threads_batch": threads,
        "n_gpu_layers": usual_layers() if gpu_layers is None else gpu_layers,
        "split_mode": SPLIT_MODES[split_mode],
        "tensor_split": tensor_split,
        "main_gpu": main_gpu,
        **({} if device is None else {"devices": device}),
        "type_k": KV_TYPES[cache_type_k],
        "type_v": KV_TYPES[cache_type_v],
        "verbose": verbose,
    }
    return check_arguments(arguments)  # llama_cpp's own does not


def llama_arguments(**options: Any) -> dict[str, Any]:
    """Arguments of our `Llama` from those and `self_extend_options`."""
    parameters = {name: options.pop(name) for name in PARAMETERS}
    return model_arguments(**options) | parameters
