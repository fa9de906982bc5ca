"""Cost of Self-Extend against plain `llama_cpp.Llama`, measured side by side in one run.

Both contexts are alive at once and take turns, so that whatever else the machine does hits both; llama.cpp's own
programs, where they are at hand, take their turns between them.
Peak memory is read from two more processes that do nothing but read the text.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from selfextend_gguf.evaluation.own_programs import OwnPrograms, Turns
from selfextend_gguf.llama import Llama
from selfextend_gguf.tiny.model_file import LlamaShape, random_tensors, write_llama

#: Shape of SmolLM-135M with a byte vocabulary padded to 49,152 entries.
SMOLLM_135M = LlamaShape(
    n_ctx_train=2048, n_layer=30, n_embd=576, n_head=9, n_head_kv=3, head_dim=64, n_ff=1536, n_vocab=49152
)


@dataclass(frozen=True)
class Ratio:
    """Median seconds of Self-Extend and of what it is compared with; of the paired ratios the median, and the ends."""

    extended_seconds: float
    plain_seconds: float
    ratio: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class BenchResult:
    """`read`: `length` tokens; `generate`: one at a time after them; `rewrite_share`: of those seconds, the share in
    which keys were moved; `resume_seconds`: to restore those tokens from a prompt cache and decode the last one again;
    `file_seconds`: to read the file of that cache; memory in bytes; `flash_attn`: whether both used it;
    `own_programs`: against llama.cpp's own, by what was measured."""

    read: Ratio
    generate: Ratio
    rewrite_share: float
    resume_seconds: float
    file_seconds: float
    extended_peak: int
    plain_peak: int
    flash_attn: bool
    own_programs: dict[str, Ratio]


def write_random_model(path: Path, shape: LlamaShape, weight_type: str = "Q8_0") -> None:
    """A model of `shape` with random weights: it costs what a trained one costs."""
    write_llama(path, shape, random_tensors(shape, seed=0), weight_type=weight_type, name="random")


def tokens_of(n: int) -> list[int]:
    """As many tokens, at random: the same for all models."""
    tokens: list[int] = np.random.default_rng(0).integers(1, 256, n).tolist()
    return tokens


Pair = tuple[float, float]  # seconds of Self-Extend, and of what it is compared with


def _ratio(pairs: list[Pair]) -> Ratio:
    ratios = [e / p for e, p in pairs]
    return Ratio(
        statistics.median(e for e, _ in pairs),
        statistics.median(p for _, p in pairs),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
    )


def _turns(extended: llama_cpp.Llama, plain: llama_cpp.Llama, parts: list[list[int]], first: int) -> Pair:
    """Seconds each model spends on `parts`, taking turns after every part; `first` = who starts (0, 1)."""
    seconds = [0.0, 0.0]
    for turn, part in enumerate(parts):
        for side in ((turn + first) % 2, (turn + first + 1) % 2):
            seconds[side] += seconds_to_eval(plain if side else extended, [part])
    return seconds[0], seconds[1]


def seconds_to_eval(llm: llama_cpp.Llama, parts: Sequence[Sequence[int]]) -> float:
    """Seconds to evaluate tokens, part after part."""
    began = time.perf_counter()
    for part in parts:
        llm.eval(part)
    return time.perf_counter() - began


def run(
    model: Path,
    length: int,
    generate: int,
    repeats: int,
    arguments: Mapping[str, Any],
    programs: OwnPrograms,
) -> BenchResult:
    """Measure `model` on the CPU, `repeats` times: read `length` tokens at once, then evaluate `generate` more one by
    one.

    `arguments` are those of both `Llama` classes. Raises what `Llama` and `OwnPrograms` raise.
    """
    shared = {"verbose": False, "op_offload": False, **arguments}  # without it a device would help the CPU
    extended = Llama(str(model), n_ctx=length + generate + 1, **shared)
    # The same flash attention on both sides: llama.cpp's automatic choice takes it wherever it can.
    flash_attn = extended.context_params.flash_attn_type != llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    shared |= {"n_ctx": extended.n_ctx(), "flash_attn": flash_attn}
    plain = llama_cpp.Llama(str(model), **shared)
    tokens = tokens_of(length + generate)
    read: list[Pair] = []
    generated: list[Pair] = []
    resumed: list[Pair] = []
    others: dict[str, list[Pair]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "prompt.kv"
        turns = Turns(programs, extended, model, length, generate, arguments, Path(folder))
        for repeat in range(repeats):
            extended.reset()
            plain.reset()
            read.append(_turns(extended, plain, [tokens[:length]], repeat))
            extended.save_prompt(cache)
            generated.append(_turns(extended, plain, [[token] for token in tokens[length:]], repeat))
            resumed.append((_resume(extended, cache), _read_file(cache)))
            for name, pair in turns.take(read[-1][0], generated[-1][0], repeat):
                others.setdefault(name, []).append(pair)
    rewriting, reading = extended.rewrite_stats.seconds, sum(e for e, _ in read + generated)
    extended.close()
    plain.close()
    extended_peak, plain_peak = (_peak(side, model, length, shared) for side in ("extended", "plain"))
    return BenchResult(
        read=_ratio(read),
        generate=_ratio(generated),
        rewrite_share=rewriting / reading,
        resume_seconds=statistics.median(resume for resume, _ in resumed),
        file_seconds=statistics.median(file for _, file in resumed),
        extended_peak=extended_peak,
        plain_peak=plain_peak,
        flash_attn=flash_attn,
        own_programs={name: _ratio(pairs) for name, pairs in others.items()},
    )


def _resume(llm: Llama, cache: Path) -> float:
    """Seconds until logits are there, of a prompt that a file holds."""
    llm.reset()
    began = time.perf_counter()
    llm.load_prompt(cache)
    last = int(llm.input_ids[llm.n_tokens - 1])
    llm.n_tokens -= 1
    llm.eval([last])
    return time.perf_counter() - began


def _read_file(path: Path) -> float:
    """Seconds to have a file in memory."""
    began = time.perf_counter()
    path.read_bytes()
    return time.perf_counter() - began


def _peak(side: str, model: Path, length: int, arguments: dict[str, Any]) -> int:
    command = [
        sys.executable,
        "-m",
        "selfextend_gguf.evaluation.bench",
        side,
        str(model),
        str(length),
        json.dumps(arguments),
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(output.splitlines()[-1])["peak_bytes"])


def _read_and_report(side: str, model: str, length: int, arguments: dict[str, Any]) -> None:
    llm = (Llama if side == "extended" else llama_cpp.Llama)(model, **arguments)
    llm.eval(tokens_of(length))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_bytes": peak * (1 if sys.platform == "darwin" else 1024)}))


if __name__ == "__main__":
    _read_and_report(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
