"""Ways to read a text that is longer than the trained context: Self-Extend, and what llama.cpp itself offers.

All read with the same llama.cpp, cache and threads, so that their losses can be paired token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import llama_cpp
import llama_cpp.llama_cpp as c_api
import numpy as np
import numpy.typing as npt

from selfextend_gguf._native import schedule_step
from selfextend_gguf.errors import ConfigError
from selfextend_gguf.kv_cache import KV_TYPES, flash_attention_type
from selfextend_gguf.llama import Llama
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.planning import plan, plan_if_beyond, whole_cells
from selfextend_gguf.safe_llama import SafeLlama
from selfextend_gguf.schedule import SCHEDULES

Losses = npt.NDArray[np.float64]

_LOOP_ROOM = 4096  # tokens for questions, which the loop cannot take back
_LONG_STEP = 512  # tokens of a step for which flash attention is as fast as attention without it
_LOOP_BATCH = 32  # tokens between two looks of llama.cpp's own loop; it needs them to be fewer than its window


class Reader(Protocol):
    """Reads one text at a time."""

    def losses(self, tokens: Sequence[int]) -> Losses:
        """Negative log-likelihood (nats) of tokens[1:], each given all that the method shows it; shape (n - 1,)."""
        ...

    def answers(self, prompt: Sequence[int], questions: Sequence[Sequence[int]], n_tokens: int) -> list[list[int]]:
        """Read the prompt once, unless it was read last; for each question go back to its end, read the question,
        continue it greedily until the model ends its answer, or by `n_tokens`."""
        ...

    def close(self) -> None: ...


def token_losses(logits: npt.NDArray[np.float32] | npt.NDArray[np.float64], targets: Sequence[int]) -> Losses:
    """Negative log-likelihood (nats) of `targets` (n,) from logits (n, n_vocab)."""
    result = np.empty(len(targets))
    for begin in range(0, len(targets), 64):  # a vocabulary of 128,000 in float64 is a megabyte a row
        rows = logits[begin : begin + 64].astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        chosen = np.asarray(targets[begin : begin + 64])
        result[begin : begin + 64] = np.log(np.exp(rows).sum(-1)) - rows[np.arange(len(rows)), chosen]
    return result


def _ends(llm: llama_cpp.Llama, token: int) -> bool:
    """Whether a token ends an answer."""
    return bool(llama_cpp.llama_vocab_is_eog(llm._model.vocab, token))


class LlamaReader:
    """A `Llama`, ours or llama_cpp's."""

    def __init__(self, llm: llama_cpp.Llama) -> None:
        self._llm = llm
        self._config = getattr(llm, "self_extend", None)
        self._cached: list[int] = []

    def close(self) -> None:
        self._llm.close()

    def _read(self, tokens: Sequence[int], begin: int, *, all_logits: bool) -> Iterator[npt.NDArray[np.float32]]:
        """Read tokens[begin:] behind the first `begin`; logits of each decode: (its tokens or 1, n_vocab)."""
        llm = self._llm
        llm._ctx.kv_cache_seq_rm(-1, begin, -1)
        self._cached = self._cached[:begin]
        while begin < len(tokens):
            step = min(llm.n_batch, len(tokens) - begin)
            if self._config is not None:
                step = schedule_step(self._config, begin, step)
            llm._batch.set_batch(batch=tokens[begin : begin + step], n_past=begin, logits_all=all_logits)
            llm._ctx.decode(llm._batch)
            self._cached += tokens[begin : begin + step]
            begin += step
            shape = (step if all_logits else 1, llm.n_vocab())
            yield np.ctypeslib.as_array(llm._ctx.get_logits(), shape=shape)

    def losses(self, tokens: Sequence[int]) -> Losses:
        parts, at = [], 1
        for logits in self._read(tokens, 0, all_logits=True):
            targets = tokens[at : at + len(logits)]
            parts.append(token_losses(logits[: len(targets)], targets))
            at += len(logits)
        return np.concatenate(parts)

    def answers(self, prompt: Sequence[int], questions: Sequence[Sequence[int]], n_tokens: int) -> list[list[int]]:
        if self._cached[: len(prompt)] != list(prompt):
            for _ in self._read(prompt, 0, all_logits=False):
                pass
        result = []
        for question in questions:
            tokens, answer, begin = [*prompt, *question], [], len(prompt)
            for _ in range(n_tokens):
                for logits in self._read(tokens, begin, all_logits=False):
                    chosen = int(logits[-1].argmax())
                if _ends(self._llm, chosen):
                    break
                begin = len(tokens)
                answer.append(chosen)
                tokens.append(chosen)
            result.append(answer)
        return result


class WindowReader:
    """Sliding truncation: no token sees more than one trained context.

    Windows of one trained context start every half of one; each gives the losses of its second half (the first window
    of all its tokens). So each token has half to one trained context before it: the text's own difficulty.
    """

    def __init__(self, llm: llama_cpp.Llama, n_ctx_train: int, bos: int | None = None) -> None:
        """`bos`, if the vocabulary wants one, takes the place of the first token of each window."""
        self._reader = LlamaReader(llm)
        self._window = n_ctx_train
        self._bos = bos

    def _fresh(self, tokens: Sequence[int]) -> Sequence[int]:
        return tokens if self._bos is None else [self._bos, *tokens[1:]]

    def close(self) -> None:
        self._reader.close()

    def losses(self, tokens: Sequence[int]) -> Losses:
        half = self._window // 2
        result = np.empty(len(tokens) - 1)
        for begin in range(0, max(1, len(tokens) - half), half):
            part = self._reader.losses(self._fresh(tokens[begin : begin + self._window + 1]))
            keep = 0 if begin == 0 else half - 1
            result[begin + keep : begin + len(part)] = part[keep:]
        return result

    def answers(self, prompt: Sequence[int], questions: Sequence[Sequence[int]], n_tokens: int) -> list[list[int]]:
        kept = self._window - max(map(len, questions), default=0) - n_tokens
        if kept < 1:
            raise ConfigError(f"a window of {self._window} tokens has no room for the question and its answer")
        return self._reader.answers(self._fresh(prompt[-kept:]), questions, n_tokens)


class LoopReader:
    """llama.cpp's own Self-Extend: the loop of its completion tool (`--grp-attn-n`, `--grp-attn-w`), which moves
    positions with `llama_memory_seq_add` and `llama_memory_seq_div` before each batch."""

    def __init__(self, llm: llama_cpp.Llama, group_size: int, window: int) -> None:
        self._llm = llm
        self._group_size, self._window = group_size, window
        self._n_past = self._grouped = 0
        self._cached: list[int] = []

    def close(self) -> None:
        self._llm.close()

    def _read(self, tokens: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        memory, size, window = c_api.llama_get_memory(self._llm.ctx), self._group_size, self._window
        for begin in range(0, len(tokens), _LOOP_BATCH):
            while size > 1 and self._n_past >= self._grouped + window:
                shift = size * self._grouped // window
                squeeze = window // size * (size - 1)
                rest = window // size - shift * squeeze - window
                first = self._grouped + shift * squeeze
                c_api.llama_memory_seq_add(memory, 0, self._grouped, self._n_past, shift * squeeze)
                c_api.llama_memory_seq_div(memory, 0, first, first + window, size)
                c_api.llama_memory_seq_add(memory, 0, first + window, self._n_past + shift * squeeze, rest)
                self._n_past -= squeeze
                self._grouped += window // size
            batch = tokens[begin : begin + _LOOP_BATCH]
            self._llm._batch.set_batch(batch=batch, n_past=self._n_past, logits_all=True)
            self._llm._ctx.decode(self._llm._batch)
            self._n_past += len(batch)
            self._cached += batch
            yield np.ctypeslib.as_array(self._llm._ctx.get_logits(), shape=(len(batch), self._llm.n_vocab()))

    def _start(self) -> None:
        self._llm._ctx.kv_cache_clear()
        self._n_past = self._grouped = 0
        self._cached = []

    def losses(self, tokens: Sequence[int]) -> Losses:
        self._start()
        logits = np.concatenate([part.copy() for part in self._read(tokens)])
        return token_losses(logits[:-1], tokens[1:])

    def answers(self, prompt: Sequence[int], questions: Sequence[Sequence[int]], n_tokens: int) -> list[list[int]]:
        """Questions one after the other: the loop cannot go back, divided positions are lost."""
        if self._cached != list(prompt):
            self._start()
            for _ in self._read(prompt):
                pass
        result = []
        for question in questions:
            logits = [part[-1].copy() for part in self._read(question)]
            answer = [int(logits[-1].argmax())]
            while len(answer) < n_tokens and not _ends(self._llm, answer[-1]):
                logits = [part[-1].copy() for part in self._read(answer[-1:])]
                answer.append(int(logits[-1].argmax()))
            result.append(answer[:-1] if _ends(self._llm, answer[-1]) else answer)
        return result


# ---- opening ---------------------------------------------------------------------------------------------------

# Each stretched to the length asked for: positions divided (linear), the RoPE base raised (NTK), or both by frequency
# (YaRN with its published ramp, llama.cpp's default).
_STRETCHED = ("linear", "ntk", "yarn")
METHODS = (*SCHEDULES, "plain", *_STRETCHED, "window", "loop")


def _flash_attention(info: ModelInfo, arguments: Mapping[str, Any]) -> bool:
    """Whether readers of these caches have it, for all methods alike: it rounds otherwise than attention without it,
    by 0.2 % of the perplexity of a small model."""
    type_k, type_v = (arguments.get(name) for name in ("type_k", "type_v"))
    f16 = KV_TYPES["f16"]
    chosen = flash_attention_type(
        info.metadata,
        f16 if type_k is None else type_k,
        f16 if type_v is None else type_v,
        _LONG_STEP,
        wanted=None,
        on_cpu=True,
    )
    return chosen != llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED


def _stretched(method: str, factor: float, base: float, n_rot: int, n_ctx_train: int) -> dict[str, Any]:
    """Arguments of llama_cpp.Llama for a context `factor` times the trained one."""
    if method == "linear":
        return {"rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_LINEAR, "rope_freq_scale": 1 / factor}
    if method == "ntk":
        # The lowest frequency turns as far over the whole text as it did over the trained context.
        return {"rope_freq_base": base * factor ** (n_rot / (n_rot - 2))}
    return {
        "rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_YARN,
        "rope_freq_scale": 1 / factor,
        "yarn_orig_ctx": n_ctx_train,
        "yarn_ext_factor": 1.0,
    }


def pretended(model_path: str | Path, n_ctx_train: int | None) -> dict[str, Any]:
    """Arguments of both `Llama` classes and of `ModelInfo` by which a model counts as trained on `n_ctx_train` tokens.

    Plain reading is then the measure of all other methods, up to the true trained context. None: as the file says.
    Raises ModelFileError, and ConfigError for a number that is not below the file's own.
    """
    if n_ctx_train is None:
        return {}
    with ModelInfo(model_path) as info:
        if not 0 < n_ctx_train < info.n_ctx_train:
            raise ConfigError(
                f"{Path(model_path).name} was trained on {info.n_ctx_train} tokens: "
                f"pretend fewer than that, not {n_ctx_train}"
            )
        return {"kv_overrides": {f"{info.architecture}.context_length": n_ctx_train}}


def resolved(
    method: str, n_ctx_train: int, n_tokens: int, parameters: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """The parameters of Self-Extend that `open_reader` reads with, automatic ones included; None where it has none, as
    within the trained context. Raises ConfigError."""
    given = parameters or {}
    if method in SCHEDULES:
        config = plan_if_beyond(n_ctx_train, n_tokens, schedule=method, **given)
        return None if config is None else asdict(config)
    return {"group_size": plan(n_ctx_train, n_tokens, **given).group_size} if method == "loop" else None


def open_reader(
    method: str, model_path: str, n_tokens: int, *, parameters: dict[str, Any] | None = None, **arguments: Any
) -> Reader:
    """A reader of texts of up to `n_tokens` by one of METHODS.

    Args:
        method: A schedule of Self-Extend, or "plain", "linear", "ntk", "yarn" (each stretched to `n_tokens`), "window"
            (sliding truncation), "loop" (llama.cpp's own Self-Extend).
        parameters: Of Self-Extend: group_size, neighbor_window, ...; None = automatic. The loop takes its group size.
        arguments: Of both `Llama` classes: n_threads, type_k, ...

    Raises the errors of `Llama`, and ConfigError for an unknown method.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    with ModelInfo(model_path, kv_overrides=arguments.get("kv_overrides")) as info:
        n_ctx_train, base, n_rot, bos = info.n_ctx_train, info.rope_base, info.n_rot, info.tokenizer.bos
        arguments = {"verbose": False, "flash_attn": _flash_attention(info, arguments), **arguments}
    if method in SCHEDULES:
        return LlamaReader(Llama(model_path, n_ctx=n_tokens, schedule=method, **(parameters or {}), **arguments))
    n_ctx = {"window": n_ctx_train, "loop": n_tokens + _LOOP_ROOM}.get(method, n_tokens)
    if method in _STRETCHED:
        arguments |= _stretched(method, max(1.0, n_tokens / n_ctx_train), base, n_rot, n_ctx_train)
    plain = SafeLlama if "devices" in arguments else llama_cpp.Llama  # which has no such argument
    llm = plain(model_path=model_path, n_ctx=whole_cells(n_ctx + 1), **arguments)
    if method == "window":
        return WindowReader(llm, n_ctx_train, bos)
    if method == "loop":
        size = plan(n_ctx_train, n_tokens, **(parameters or {})).group_size
        return LoopReader(llm, size, max(size, n_ctx_train // 2 // size * size))
    return LlamaReader(llm)
