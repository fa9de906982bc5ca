"""Published retrieval tasks beyond the trained context, by all methods. Writes docs/retrieval.md.

    python -m selfextend_gguf.studies.retrieval MODEL.gguf --pretend 0 2048 --longlm passkey_examples_10k.jsonl \
        --pairs kv-retrieval-75_keys.jsonl.gz --kept kept.jsonl

RULER's synthetic tasks have prompts of 1, 2, 4 trained contexts. LongLM's passkey prompts and the key-value pairs of
"Lost in the middle" come from files, and are as long as they are. With --pretend a model is read as if it were trained
on so many tokens only: plain reading of the same file, which was trained on more, is then what the others could reach.
Results are kept as they come: a second call goes on.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.kept import Kept
from selfextend_gguf.evaluation.readers import METHODS, open_reader, pretended
from selfextend_gguf.evaluation.retrieval import PLAIN, methods_at, task_exams, wilson_interval
from selfextend_gguf.evaluation.tasks import recall
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.tokenizer import Tokenizer

RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "fwe")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
PAIR_TOKENS = 64  # a UUID has 36 characters
COMPARED = (PLAIN, "selfextend", "restart", "dca", "yarn", "window", "loop")
ANSWERABLE = 0.1  # share of right answers under which a task within the trained context says nothing beyond it


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue, and what the continuation should hold."""

    tokens: list[int]
    wanted: tuple[str, ...]
    answer_tokens: int


@dataclass(frozen=True)
class Task:
    """Prompts of about the same length."""

    name: str
    prompts: list[Prompt]

    @property
    def n_tokens(self) -> int:
        """With the answer, of the longest."""
        return max(len(prompt.tokens) + prompt.answer_tokens for prompt in self.prompts)


def ruler(tokenizer: Tokenizer, name: str, n_tokens: int, n_prompts: int) -> Task:
    """One of RULER's tasks, those with one needle at DEPTHS in turn."""
    rounds = -(-n_prompts // len(DEPTHS))
    exams = [
        exam
        for depth in DEPTHS
        for exam in task_exams(
            tokenizer, name, n_tokens, n_trials=rounds, depths=[depth], digits=5, seed=int(100 * depth), text=""
        )
    ]
    prompts = [
        Prompt([*exam.quiz.tokens, *exam.quiz.questions[0]], exam.references[0], exam.quiz.answer_tokens)
        for exam in exams[:n_prompts]
    ]
    return Task(name, prompts)


def longlm(tokenizer: Tokenizer, files: Sequence[Path]) -> Iterator[Task]:
    """The prompts of LongLM's authors (code of arXiv 2401.01325), those of one length together."""
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    unique = {line["input"]: line for line in sorted(lines, key=lambda line: len(line["input"]))}
    for _, same in groupby(unique.values(), key=lambda line: len(line["input"])):
        prompts = []
        for line in same:
            wanted = str(line["target"])
            tokens = tokenizer.tokens(line["input"] + "\nWhat is the pass key? The pass key is ")
            prompts.append(Prompt(tokens, (wanted,), len(tokenizer.tokens(wanted, begins=False)) + 2))
        yield Task("LongLM's passkey", prompts)


def pairs(tokenizer: Tokenizer, file: Path, n_prompts: int) -> Task:
    """Key-value retrieval of "Lost in the middle" (arXiv 2307.03172): UUIDs as JSON. The value that is asked for stands
    at each place in turn."""
    prompts = []
    with gzip.open(file, "rt", encoding="utf-8") as cases:
        for number, line in zip(range(n_prompts), cases, strict=False):
            case = json.loads(line)
            records = [record for record in case["ordered_kv_records"] if record[0] != case["key"]]
            records.insert(number * len(records) // max(1, n_prompts - 1), [case["key"], case["value"]])
            data = ",\n ".join(f'"{key}": "{value}"' for key, value in records)
            text = (
                "Extract the value corresponding to the specified key in the JSON object below.\n\n"
                f'JSON data:\n{{{data}}}\n\nKey: "{case["key"]}"\nCorresponding value: "'
            )
            prompts.append(Prompt(tokenizer.tokens(text), (case["value"],), PAIR_TOKENS))
    return Task(f"{len(records)} pairs", prompts)


def what(model: Path, pretend: int, task: Task, method: str) -> dict[str, object]:
    """What answers depend on."""
    prompts = [[prompt.tokens, prompt.answer_tokens] for prompt in task.prompts]
    return {
        "model": model.name,
        "bytes": model.stat().st_size,
        "pretend": pretend,
        "prompts": zlib.crc32(json.dumps(prompts).encode()),
        "method": method,
    }


def ask(model: Path, pretend: int, task: Task, method: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The answers to the prompts of a task, as JSON can hold them; None if the method does not reach so far."""
    overrides = pretended(model, pretend or None)
    began = time.monotonic()
    with ModelInfo(model, **overrides) as info:
        try:
            reader = open_reader(method, str(model), task.n_tokens, **overrides, **arguments)
        except ConfigError:
            return None
        try:
            answers = [
                reader.answers(prompt.tokens[:-1], [prompt.tokens[-1:]], prompt.answer_tokens)[0]
                for prompt in task.prompts
            ]
        finally:
            reader.close()
        spelled = [info.tokenizer.detokenize(answer).decode("utf-8", "replace") for answer in answers]
    return {"answers": spelled, "seconds": round(time.monotonic() - began, 1)}


# ---- the document ----------------------------------------------------------------------------------------------

HEAD = """# Retrieval tasks on real models

Written{machine} by

```sh
python -m selfextend_gguf.studies.retrieval {command}
```

Prompts are completed greedily, as they are, without a chat template. A cell is the mean recall (the share of what
should be in an answer) of all prompts of the row. Every method gets the same prompts.

* `niah_*`, `vt`, `fwe`: RULER's synthetic tasks (arXiv 2404.06654) as `sx-gguf eval passkey` has them.
* *LongLM's passkey*: the prompts that the authors of Self-Extend published.
* *75 pairs*: key-value retrieval of "Lost in the middle" (arXiv 2307.03172), the pair asked for at each place in turn.
* Within the trained context every method reads as plain llama.cpp does, so only `plain` is asked. **A task that fails
  there proves nothing beyond.** It is left out beyond if fewer than {answerable:.0%} are right.
* For a model that is read as if it were trained on fewer tokens than it was, `plain` is what it can do at best.
* `window` is truncation to the latest trained context, `loop` is llama.cpp's own Self-Extend, `yarn` llama.cpp's RoPE
  scaling. The others are schedules ([schedules.md](schedules.md)), `selfextend` the default.

With {n_prompts} prompts a 95 % interval of a share in the middle is about ± {interval:.0%}.
"""


@dataclass(frozen=True)
class Row:
    """How one task went."""

    task: Task
    times: float  # trained contexts
    scores: dict[str, float]

    def cells(self, methods: Sequence[str]) -> str:
        scores = [f"{self.scores[m]:.2f}" if m in self.scores else "" for m in methods]
        return " | ".join(
            [self.task.name, str(self.task.n_tokens), f"{self.times:.2g}x", str(len(self.task.prompts)), *scores]
        )


def table(rows: Sequence[Row], methods: Sequence[str]) -> str:
    head = (
        f"| task | tokens | x trained | prompts | {' | '.join(methods)} |\n|---|---:|---:|---:|{'---:|' * len(methods)}"
    )
    return "\n".join([head, *(f"| {row.cells(methods)} |" for row in rows)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="GGUF files")
    parser.add_argument("--pretend", nargs="+", type=int, default=[0], help="trained contexts to pretend; 0 = its own")
    parser.add_argument("--times", nargs="+", type=int, default=[1, 2, 4], help="lengths in trained contexts")
    parser.add_argument("--ruler", nargs="*", choices=RULER, default=RULER)
    parser.add_argument("--longlm", nargs="*", type=Path, default=[], help="JSON lines of LongLM's prompts")
    parser.add_argument("--pairs", type=Path, help="JSON lines of key-value pairs, compressed with gzip")
    parser.add_argument("--prompts", type=int, default=25, help="for each task and length")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=COMPARED)
    parser.add_argument(
        "--kept", type=Path, required=True, help="file that keeps results; those in it are not repeated"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of retrieval.md")
    parser.add_argument("--machine", default="", help="what it was measured on, for the document")
    parser.add_argument("--write-only", action="store_true", help="measure nothing, write what is kept")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)  # now, and not after hours
    kept = Kept(args.kept)
    arguments = {"n_threads": args.threads, "n_threads_batch": args.threads, "n_gpu_layers": args.n_gpu_layers}
    parts: list[str] = []
    for model in args.models:
        for pretend in args.pretend:
            with ModelInfo(model, **pretended(model, pretend or None)) as info:
                n_ctx_train = info.n_ctx_train
                tasks = []
                for name, times in itertools.product(args.ruler, sorted(args.times)):
                    with suppress(ConfigError):  # the task does not fit
                        tasks.append(ruler(info.tokenizer, name, times * n_ctx_train, args.prompts))
                tasks += longlm(info.tokenizer, args.longlm)
                tasks += [pairs(info.tokenizer, args.pairs, 4 * args.prompts)] if args.pairs else []
            failed: set[str] = set()
            rows = []
            for task in tasks:
                scores: dict[str, float] = {}
                for method in [] if task.name in failed else methods_at(task.n_tokens, n_ctx_train, args.methods):
                    key = what(model, pretend, task, method)
                    if args.write_only and not kept.has(key):
                        continue
                    is_new = not kept.has(key)
                    result = kept.measured(key, partial(ask, model, pretend, task, method, arguments))
                    if result is None:
                        continue
                    told = zip(result["answers"], task.prompts, strict=True)
                    scores[method] = float(np.mean([recall(answer, prompt.wanted) for answer, prompt in told]))
                    if is_new:
                        print(model.stem, pretend, task.name, task.n_tokens, method, scores[method], result["seconds"])
                        sys.stdout.flush()
                if task.n_tokens <= n_ctx_train and scores.get(PLAIN, 1.0) < ANSWERABLE:
                    failed.add(task.name)
                if scores:
                    rows.append(Row(task, task.n_tokens / n_ctx_train, scores))
            as_if = "as if trained" if pretend else "trained"
            parts += [f"\n## {model.stem}, {as_if} on {n_ctx_train} tokens\n", table(rows, args.methods), ""]
    low, high = wilson_interval(0.5, args.prompts)
    command = " ".join(
        [
            *(model.name for model in args.models),
            f"--pretend {' '.join(map(str, args.pretend))} --times {' '.join(map(str, args.times))}",
            *([f"--longlm {' '.join(file.name for file in args.longlm)}"] if args.longlm else []),
            *([f"--pairs {args.pairs.name}"] if args.pairs else []),
            f"--prompts {args.prompts} --kept {args.kept.name}",
        ]
    )
    head = HEAD.format(
        machine=f" on {args.machine}" if args.machine else "",
        command=command,
        answerable=ANSWERABLE,
        n_prompts=args.prompts,
        interval=(high - low) / 2,
    )
    (args.out / "retrieval.md").write_text(head + "\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
