"""Whether the engine can extend a model, as the engine itself says, and how far that makes sense."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp._internals as internals

from selfextend_gguf._native import EVAL_CALLBACK, Engine, last_error, note_log_errors
from selfextend_gguf.errors import ConfigError, EngineError, UnsupportedModelError
from selfextend_gguf.kv_cache import KV_TYPES, flash_attention_type
from selfextend_gguf.memory import Demand, demand_of, largest_fitting
from selfextend_gguf.model_info import ModelInfo, load_model
from selfextend_gguf.planning import CELL_MULTIPLE, TIMES_MEASURED, context_within, plan
from selfextend_gguf.schedule import SelfExtendConfig

_N_CTX = 256  # tokens: enough for what `attach` tries, which is the same at any context
_N_BATCH = 512  # tokens `Llama` reads at once if not told otherwise


@dataclass(frozen=True)
class Examination:
    """What the engine found."""

    reason: str | None  #: why it cannot extend the model, None if it can
    n_layers: int = 0  #: whose keys it rewrites
    has_frame: bool = True  #: whether it rewrites a key a few times only
    has_context: bool = True  #: False: llama.cpp cannot even read within the trained context, for that reason


def examine(
    path: str | Path,
    config: SelfExtendConfig | None = None,
    *,
    type_k: int = KV_TYPES["f16"],
    type_v: int = KV_TYPES["f16"],
    verbose: bool = False,
) -> Examination:
    """Load a model as `Llama` would on the CPU, for parameters `config` and caches of these ggml types, and attach an
    engine to it, which decodes two tokens. Raises ModelFileError."""
    model = load_model(path, verbose=verbose)
    engine = Engine(_N_CTX)
    note_log_errors(True)
    has_context = False
    try:
        context = _new_context(model, engine, config, type_k, type_v)
        has_context = True
        engine.attach(context.ctx)
        return Examination(None, engine.n_layers, engine.has_frame)
    except (UnsupportedModelError, ConfigError, EngineError) as error:
        return Examination(str(error), has_context=has_context)
    finally:
        note_log_errors(False)
        model.close()  # frees the context first
        engine.close()


def _new_context(
    model: internals.LlamaModel, engine: Engine, config: SelfExtendConfig | None, type_k: int, type_v: int
) -> internals.LlamaContext:
    """Raises what `Llama` would."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = _N_CTX
    params.type_k, params.type_v = type_k, type_v
    longest_step = _N_BATCH if config is None else config.block_size
    params.flash_attn_type = flash_attention_type(
        model.metadata(), type_k, type_v, longest_step, wanted=None, on_cpu=True
    )
    params.cb_eval = EVAL_CALLBACK
    params.cb_eval_user_data = engine.user_data
    try:
        return internals.LlamaContext(model=model, params=params, verbose=False)
    except ValueError as error:
        raise EngineError(f"llama.cpp could not create a context: {last_error()}") from error


@dataclass(frozen=True)
class SensibleContext:
    """The longest context that is worth asking for."""

    n_ctx: int  #: tokens
    group_size: int  #: 1 within the trained context
    n_bytes: int | None  #: of weights, cache and computing; None where the sizes are not known
    is_all_memory: bool  #: whether a longer one would not fit the available memory


def sensible_context(
    info: ModelInfo,
    parameters: dict[str, Any] | None,
    *,
    type_k: int = KV_TYPES["f16"],
    type_v: int = KV_TYPES["f16"],
) -> SensibleContext:
    """As many trained contexts as were measured, as far as parameters of `plan` reach and the memory holds.

    `parameters` None: the model cannot be extended. Raises ConfigError as `plan` does.
    """
    n_train = info.n_ctx_train
    n_ctx = n_train if parameters is None else context_within(n_train, TIMES_MEASURED * n_train, **parameters)

    def demand(n: int) -> Demand:
        return demand_of(info, n, _N_BATCH, flash_attn=None, type_k=type_k, type_v=type_v)

    try:
        fitting = largest_fitting(demand(n_ctx))
        is_all_memory = 0 < fitting < n_ctx // CELL_MULTIPLE * CELL_MULTIPLE
        n_ctx = fitting if is_all_memory else n_ctx
        n_bytes = demand(n_ctx).total
    except (KeyError, IndexError, ValueError):
        is_all_memory, n_bytes = False, None
    size = 1 if parameters is None or n_ctx <= n_train else plan(n_train, n_ctx, **parameters).group_size
    return SensibleContext(n_ctx, size, n_bytes, is_all_memory)
