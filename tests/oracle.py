"""Self-Extend on a second road: key positions reached without the engine, in contexts of plain llama.cpp.

`by_state` takes the keys out of llama.cpp's saved state, turns them in float64 as the family's definition says, and
puts them back. `by_shift` lets llama.cpp move them (`llama_memory_seq_add`), where its K-shift is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import c_uint8
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
from families import N_VOCAB, Family, rotate
from helpers import F32, random_tokens, relative_error
from kv_state import read_keys, write_keys
from llama_cpp._internals import LlamaBatch, LlamaContext, LlamaModel

from selfextend_gguf import Llama
from selfextend_gguf._native import schedule_step
from selfextend_gguf.errors import UnsupportedModelError
from selfextend_gguf.model_info import set_log_level
from selfextend_gguf.schedule import SelfExtendConfig, schedule_positions_numpy

set_log_level(verbose=False)

N_CTX = 256  # four times the trained context of the families' models


def load(path: Path) -> LlamaModel:
    """A model on the CPU."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0  # GPUs round more
    return LlamaModel(path_model=str(path), params=params, verbose=False)


def new_context(model: LlamaModel) -> LlamaContext:
    """A context of N_CTX tokens with exact keys and values."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = N_CTX
    params.n_threads = params.n_threads_batch = 1
    params.type_k, params.type_v = F32["type_k"], F32["type_v"]
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds keys to f16
    return LlamaContext(model=model, params=params, verbose=False)


def decode(context: LlamaContext, tokens: Sequence[int], position: int = 0) -> np.ndarray:
    """Logits (n, N_VOCAB) of `tokens`, the first of which gets `position`."""
    batch = LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1, verbose=False)
    batch.set_batch(tokens, n_past=position, logits_all=True)
    context.decode(batch)
    return np.ctypeslib.as_array(context.get_logits(), shape=(len(tokens), N_VOCAB)).copy()


def get_state(context: LlamaContext) -> bytes:
    size = llama_cpp.llama_state_seq_get_size(context.ctx, 0)
    state = (c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(context.ctx, state, size, 0) == size
    return bytes(state)


def set_state(context: LlamaContext, state: bytes) -> None:
    data = (c_uint8 * len(state)).from_buffer_copy(state)
    assert llama_cpp.llama_state_seq_set_data(context.ctx, data, len(state), 0) == len(state)


def turn(keys: list[np.ndarray], family: Family, delta: np.ndarray) -> list[np.ndarray]:
    """Keys of all global layers as they would be `delta` positions later."""

    def turn_layer(rows, rotary):
        if rotary is None:
            return rows
        heads = rows.reshape(len(rows), family.n_head_kv, family.key_length)
        return rotate(heads, rotary, delta).reshape(rows.shape)

    return [turn_layer(rows, rotary) for rows, rotary in zip(keys, family.global_layers, strict=True)]


# ---- the two roads ---------------------------------------------------------------------------------------------

# Moves the cached keys of a context from the positions they hold to those wanted: int32 (n_cached)
Mover = Callable[[LlamaContext, np.ndarray, np.ndarray], None]


def by_state(family: Family) -> Mover:
    def move(context: LlamaContext, held: np.ndarray, wanted: np.ndarray) -> None:
        state = get_state(context)
        llama_cpp.llama_memory_clear(context.memory, True)
        set_state(context, write_keys(state, turn(read_keys(state), family, wanted - held)))

    return move


def by_shift(context: LlamaContext, held: np.ndarray, wanted: np.ndarray) -> None:
    # From the last key to the first, so that no key moves onto a position that is still to be moved.
    for position in np.unique(held)[::-1].tolist():
        delta = wanted[held == position] - position
        assert (delta == delta[0]).all(), "keys that share a position move together"
        if delta[0] != 0:
            llama_cpp.llama_memory_seq_add(context.memory, 0, position, position + 1, int(delta[0]))


def logits(model: LlamaModel, tokens: Sequence[int], config: SelfExtendConfig, steps: Sequence[int], move: Mover):
    """Logits (n_tokens, N_VOCAB) of `tokens` decoded in `steps`, keys moved before each step as the schedule says."""
    context, rows, held, at = new_context(model), [], np.empty(0, np.int32), 0
    for step in steps:
        wanted = schedule_positions_numpy(config, at, at + step)
        if not np.array_equal(held, wanted):
            move(context, held, wanted)
        rows.append(decode(context, tokens[at : at + step], at))
        held = np.concatenate([wanted, np.arange(at, at + step, dtype=np.int32)])
        at += step
    context.close()
    return np.concatenate(rows)


# ---- verdict on a family ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What happened to a family's model."""

    refused: str | None  # why the engine refused it
    n_rewritten: int = 0  # layers whose keys were rewritten
    errors: dict[str, float] | None = None  # road -> relative error of all logits against it
    grouping: float = 0.0  # relative difference that the moved keys make to the logits
    rollback: float = 0.0  # relative error after a rollback into grouped text, against the first reading


def examine(family: Family, path: Path) -> Verdict:
    """Read N_CTX tokens with the engine, and by the other roads, in a model of `family`."""
    model = load(path)
    tokens = random_tokens(N_CTX, seed=8)
    arguments = {"n_ctx": N_CTX, "logits_all": True, "flash_attn": False, "n_threads": 1, "verbose": False, **F32}
    try:
        llm = Llama(str(path), **arguments)
    except UnsupportedModelError as error:
        model.close()
        return Verdict(refused=str(error))
    steps = []
    while sum(steps) < N_CTX:
        steps.append(schedule_step(llm.self_extend, sum(steps), N_CTX - sum(steps)))
    llm.eval(tokens)
    ours = llm.scores[:N_CTX].copy()

    roads: dict[str, Mover] = {"state": by_state(family)}
    if family.k_shift:
        roads["shift"] = by_shift
    errors = {
        road: relative_error(ours, logits(model, tokens, llm.self_extend, steps, move)) for road, move in roads.items()
    }
    plain = logits(model, tokens, llm.self_extend, steps, lambda context, held, wanted: None)
    llm.n_tokens = N_CTX // 2
    llm.eval(tokens[N_CTX // 2 :])
    verdict = Verdict(
        refused=None,
        n_rewritten=llm._engine.n_layers,
        errors=errors,
        grouping=relative_error(ours, plain),
        rollback=relative_error(llm.scores[:N_CTX], ours),
    )
    llm.close()
    model.close()
    return verdict
