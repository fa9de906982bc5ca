"""Cost of Self-Extend against plain `llama_cpp.Llama`, measured side by side in one run.

Both contexts are alive at once and take turns block by block, so that whatever else the machine does hits both.
Peak memory is read from two more processes that do nothing but read the text.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np

from selfextend_gguf.llama import Llama
from selfextend_gguf.tiny.model_file import LlamaShape, random_tensors, write_llama

#: Shape of SmolLM-135M with a byte vocabulary padded to 49,152 entries.
SMOLLM_135M = LlamaShape(
    n_ctx_train=2048, n_layer=30, n_embd=576, n_head=9, n_head_kv=3, head_dim=64, n_ff=1536, n_vocab=49152
)
_BLOCK = 512  # tokens per turn


@dataclass(frozen=True)
class Ratio:
    """Median seconds of Self-Extend and of plain llama.cpp, and the median of the paired ratios."""

    extended_seconds: float
    plain_seconds: float
    ratio: float


@dataclass(frozen=True)
class BenchResult:
    """`read`: `length` tokens; `generate`: one at a time after them; memory in bytes."""

    read: Ratio
    generate: Ratio
    extended_peak: int
    plain_peak: int


def write_random_model(path: Path, shape: LlamaShape, weight_type: str = "Q8_0") -> None:
    """A model of `shape` with random weights: it costs what a trained one costs."""
    write_llama(path, shape, random_tensors(shape, seed=0), weight_type=weight_type, name="random")


def _tokens(n: int) -> list[int]:
    return np.random.default_rng(0).integers(1, 256, n).tolist()


def _timed(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _ratio(pairs: list[tuple[float, float]]) -> Ratio:
    return Ratio(
        statistics.median(e for e, _ in pairs),
        statistics.median(p for _, p in pairs),
        statistics.median(e / p for e, p in pairs),
    )


def _turns(extended: llama_cpp.Llama, plain: llama_cpp.Llama, tokens: list[int], size: int) -> tuple[float, float]:
    """Seconds each model spends on `tokens`, taking turns after every `size` of them."""
    seconds = [0.0, 0.0]
    for turn, begin in enumerate(range(0, len(tokens), size)):
        block = tokens[begin : begin + size]
        # Whoever goes second finds the weights in the CPU's cache: swap places every turn.
        for side in (0, 1) if turn % 2 else (1, 0):
            llm = plain if side else extended
            seconds[side] += _timed(lambda llm=llm, block=block: llm.eval(block))  # type: ignore[misc]
    return seconds[0], seconds[1]


def run(model: Path, length: int, generate: int, repeats: int, threads: int | None) -> BenchResult:
    """Measure `model`, `repeats` times: read `length` tokens, then evaluate `generate` more one by one."""
    n_ctx = length + generate + 1
    shared = {"n_ctx": n_ctx, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    extended = Llama(str(model), **shared)  # type: ignore[arg-type]
    plain = llama_cpp.Llama(str(model), **_plain_arguments(extended, shared))  # type: ignore[arg-type]
    tokens = _tokens(length + generate)
    read, generated = [], []
    for _ in range(repeats):
        extended.reset()
        plain.reset()
        read.append(_turns(extended, plain, tokens[:length], _BLOCK))
        generated.append(_turns(extended, plain, tokens[length:], 1))
    extended.close()
    plain.close()
    peaks = [_peak(side, model, length, n_ctx, threads) for side in ("extended", "plain")]
    return BenchResult(_ratio(read), _ratio(generated), *peaks)


def _plain_arguments(extended: Llama, shared: dict) -> dict:
    # The same cache and flash attention: ours is llama.cpp's automatic choice, which takes it wherever it can.
    return shared | {"n_ctx": extended.n_ctx(), "flash_attn": True}


def _peak(side: str, model: Path, length: int, n_ctx: int, threads: int | None) -> int:
    command = [
        sys.executable,
        "-m",
        "selfextend_gguf.bench",
        side,
        str(model),
        str(length),
        str(n_ctx),
        str(threads or 0),
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])["peak_bytes"]


def _read_and_report(side: str, model: str, length: int, n_ctx: int, threads: int | None) -> None:
    shared = {"n_ctx": n_ctx, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    if side == "extended":
        llm: llama_cpp.Llama = Llama(model, **shared)  # type: ignore[arg-type]
    else:
        llm = llama_cpp.Llama(model, **shared | {"n_ctx": -(-n_ctx // 256) * 256, "flash_attn": True})  # type: ignore[arg-type]
    llm.eval(_tokens(length))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_bytes": peak * (1 if sys.platform == "darwin" else 1024)}))


if __name__ == "__main__":
    _read_and_report(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]) or None)
