"""Whether the engine can extend a model, as the engine itself says, and how far that makes sense."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp._internals as internals

from selfextend_gguf._native import EVAL_CALLBACK, Engine
from selfextend_gguf.errors import UnsupportedModelError
from selfextend_gguf.memory import Demand, demand_of, largest_fitting
from selfextend_gguf.model_info import ModelInfo, load_model
from selfextend_gguf.planning import CELL_MULTIPLE, TIMES_MEASURED, context_within, plan

_N_CTX = 256  # tokens: enough for what `attach` tries


@dataclass(frozen=True)
class Examination:
    """What the engine found."""

    reason: str | None  #: why it cannot extend the model, None if it can
    n_layers: int  #: whose keys it rewrites


def examine(path: str | Path, *, verbose: bool = False) -> Examination:
    """Load a model and attach an engine to it, which decodes two tokens. Raises ModelFileError."""
    model = load_model(path, vocab_only=False, verbose=verbose)
    engine = Engine(_N_CTX)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = _N_CTX
    params.cb_eval = EVAL_CALLBACK
    params.cb_eval_user_data = engine.user_data
    try:
        context = internals.LlamaContext(model=model, params=params, verbose=verbose)
        engine.attach(context.ctx)
        return Examination(None, engine.n_layers)
    except UnsupportedModelError as error:
        return Examination(str(error), 0)
    except ValueError:
        return Examination("llama.cpp cannot create a context for it", 0)
    finally:
        model.close()  # frees the context first
        engine.close()


@dataclass(frozen=True)
class SensibleContext:
    """The longest context that is worth asking for."""

    n_ctx: int  #: tokens
    group_size: int  #: 1 within the trained context
    n_bytes: int | None  #: of weights, f16 cache and computing; None where the sizes are not known
    is_all_memory: bool  #: whether a longer one would not fit the available memory


def sensible_context(info: ModelInfo, parameters: dict[str, Any] | None) -> SensibleContext:
    """As many trained contexts as were measured, as far as parameters of `plan` reach and the memory holds.

    `parameters` None: the model cannot be extended. Raises ConfigError as `plan` does.
    """
    n_train = info.n_ctx_train
    n_ctx = n_train if parameters is None else context_within(n_train, TIMES_MEASURED * n_train, **parameters)

    def demand(n: int) -> Demand:
        return demand_of(info, n, 512, flash_attn=None)

    try:
        fitting = largest_fitting(demand(n_ctx))
        is_all_memory = 0 < fitting < n_ctx // CELL_MULTIPLE * CELL_MULTIPLE
        n_ctx = fitting if is_all_memory else n_ctx
        n_bytes = demand(n_ctx).total
    except (KeyError, IndexError, ValueError):
        is_all_memory, n_bytes = False, None
    size = 1 if parameters is None or n_ctx <= n_train else plan(n_train, n_ctx, **parameters).group_size
    return SensibleContext(n_ctx, size, n_bytes, is_all_memory)
