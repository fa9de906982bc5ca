"""llama.cpp's own programs beside ours: `llama-bench` for reading and generating, `llama-completion` from its start to
its end."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.ggml import type_name
from selfextend_gguf.llama import Llama
from selfextend_gguf.models import DEMO_TEXT
from selfextend_gguf.programs import SX_GGUF

_LAST_WORDS = 300  # characters of what a program said before it failed


@dataclass(frozen=True)
class OwnPrograms:
    """Paths of programs of a build of llama.cpp; None: not compared with."""

    llama_bench: Path | None = None
    llama_completion: Path | None = None


class Turns:
    """Measurements of llama.cpp's own programs and of `sx-gguf run`, all on the CPU."""

    def __init__(
        self,
        programs: OwnPrograms,
        llm: Llama,
        model: Path,
        length: int,
        generate: int,
        arguments: Mapping[str, Any],
        folder: Path,
    ) -> None:
        """To read `length` tokens of the model that `llm` has open, and to generate `generate` more. llama-bench is
        told to do as `llm` does; whole runs are told what `arguments` say, and choose the rest themselves. Texts are
        written to `folder`."""
        params = llm.context_params
        self._programs = programs
        self._model = str(model)
        self._length, self._generate = length, generate
        self._threads = (params.n_threads_batch, params.n_threads)  # to read, to generate
        common = ["-dev", "none", "-ctk", type_name(params.type_k), "-ctv", type_name(params.type_v)]
        flash_attn = params.flash_attn_type != llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._bench_options = [*common, "-fa", str(int(flash_attn))]
        self._run_options = [*common, "-c", str(llm.n_ctx()), "--temp", "0", "--ignore-eos"]
        if arguments.get("n_threads") is not None:
            self._run_options += ["-t", str(arguments["n_threads"])]
        if arguments.get("flash_attn") is not None:
            self._run_options += ["-fa", "on" if arguments["flash_attn"] else "off"]
        if programs.llama_completion:
            text = DEMO_TEXT.read_text(encoding="ascii")
            self._prompts = {
                "run": _prompt(llm, text, length, folder / "prompt.txt"),
                "load": _prompt(llm, text, 8, folder / "short.txt"),
            }

    def take(self, read: float, generate: float, turn: int) -> Iterator[tuple[str, tuple[float, float]]]:
        """Measure once: names, and seconds of ours and of theirs. `read` and `generate` are those of the `Llama`.

        Raises ConfigError for a program that fails."""
        if self._programs.llama_bench:
            yield "read, llama-bench", (read, self._bench(self._threads[0], "-p", str(self._length), "-n", "0"))
            at_depth = ("-p", "0", "-n", str(self._generate), "-d", str(self._length))
            yield "generate, llama-bench", (generate, self._bench(self._threads[1], *at_depth))
        if self._programs.llama_completion:
            for name, n_tokens in (("run", self._generate), ("load", 1)):
                seconds = [0.0, 0.0]
                for side in (turn % 2, (turn + 1) % 2):
                    seconds[side] = seconds_of(self._completion(side == 1, name, n_tokens))
                yield f"{name}, llama-completion", (seconds[0], seconds[1])

    def _bench(self, threads: int, *arguments: str) -> float:
        """Seconds by its own clock, which leaves out loading."""
        command = [str(self._programs.llama_bench), "-m", self._model, *self._bench_options, "-t", str(threads)]
        output = _output([*command, *arguments, "-r", "1", "--no-warmup", "-o", "json"])
        try:
            return float(json.loads(output)[0]["avg_ns"]) / 1e9
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{command[0]} printed no measurement of llama-bench") from error

    def _completion(self, theirs: bool, prompt: str, n_tokens: int) -> list[str]:
        options = [*self._run_options, "-f", str(self._prompts[prompt]), "-n", str(n_tokens)]
        if theirs:
            return [str(self._programs.llama_completion), "-m", self._model, *options, "-no-cnv"]
        return [SX_GGUF, "run", self._model, *options, "--raw"]


def _prompt(llm: Llama, text: str, n_tokens: int, path: Path) -> Path:
    """Write a text of about `n_tokens`: joined tokens may be spelled by fewer."""
    tokens = llm.tokenize(text.encode(), add_bos=False)
    tokens = (tokens * (n_tokens // len(tokens) + 1))[:n_tokens]
    path.write_bytes(llm.detokenize(tokens))
    return path


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        last_words = " ".join(done.stderr[-_LAST_WORDS:].split())
        raise ConfigError(f"{command[0]} failed ({done.returncode}): {last_words}")
    return done.stdout


def seconds_of(command: Sequence[str]) -> float:
    """Seconds of a process from its start to its end. Raises ConfigError for one that fails."""
    began = time.perf_counter()
    _output(command)
    return time.perf_counter() - began
