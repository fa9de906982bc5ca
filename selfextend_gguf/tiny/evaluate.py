"""Key retrieval and perplexity of a tiny model beyond its trained context: the table of the README.

    python -m selfextend_gguf.tiny.evaluate --text tests/data/heldout.txt

Methods: Self-Extend with automatic parameters, plain llama.cpp, and llama.cpp's own Self-Extend loop
(`--grp-attn-n`, `--grp-attn-w` of its completion tool, over `llama_memory_seq_add` and `llama_memory_seq_div`).
Their perplexities are compared with the text's own difficulty: the same tokens read in fresh windows.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np

from selfextend_gguf._native import schedule_step
from selfextend_gguf.config import plan
from selfextend_gguf.evaluation.readers import open_reader, token_losses
from selfextend_gguf.llama import Llama
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.reference import Reference
from selfextend_gguf.tiny.data import KeyTask, key_task


def retrieval_tasks(text: str, n_tokens: int, n_trials: int, seed: int = 0) -> list[KeyTask]:
    """Keys hidden at depths 5 % to 95 % of texts of `n_tokens` bytes."""
    rng = np.random.default_rng(seed)
    return [key_task(rng, text, n_tokens, depth) for depth in np.linspace(0.05, 0.95, n_trials)]


def retrieval(llm: llama_cpp.Llama, tasks: list[KeyTask]) -> float:
    """Fraction of tasks that greedy decoding answers exactly."""
    right = 0
    for task in tasks:
        llm.reset()
        answer = llm.create_completion(task.prompt, max_tokens=len(task.answer), temperature=0.0)
        right += answer["choices"][0]["text"] == task.answer
    return right / len(tasks)


@dataclass(frozen=True)
class Row:
    """Results at one length; perplexities of the text's second half."""

    n_tokens: int
    retrieval: float | None
    plain_retrieval: float | None
    perplexity: float
    fresh_windows: float
    plain: float
    group_attention_loop: float


def evaluate(model: str, text: str, n_tokens: int, n_trials: int, n_texts: int) -> Row:
    """Evaluate at one length. Each text is measured on its second half, over `n_texts` stretches of `text`."""
    extended = Llama(model, n_ctx=n_tokens + 64, verbose=False)
    tasks = retrieval_tasks(text, n_tokens, n_trials)
    found = retrieval(extended, tasks)
    extended.close()
    plain = llama_cpp.Llama(model, n_ctx=n_tokens + 256, verbose=False, flash_attn=True)
    plain_found = retrieval(plain, tasks)
    plain.close()

    starts = np.linspace(0, len(text) - n_tokens - 1, n_texts).astype(int)
    texts = [list(text[start : start + n_tokens].encode()) for start in starts]

    def perplexity(method: str) -> float:
        reader = open_reader(method, model, n_tokens)
        late = [reader.losses(tokens)[n_tokens // 2 :] for tokens in texts]
        reader.close()
        return float(np.exp(np.concatenate(late).mean()))

    return Row(n_tokens, found, plain_found, *map(perplexity, ("selfextend", "window", "plain", "loop")))


def compare_with_paper(model: str, text: str, n_tokens: int) -> tuple[float, float, float]:
    """Perplexity of the second half of a text by our schedule and by the paper's attention, and how far apart their
    logits are there (norm of the difference in relation to the norm). Both from the float64 reference."""
    reference = Reference(model)
    config = plan(reference.n_ctx_train, n_tokens, max_distance=reference.n_ctx_train)  # all of them, as in the paper
    tokens = list(text[:n_tokens].encode())
    steps: list[int] = []
    while sum(steps) < n_tokens:
        steps.append(schedule_step(config, sum(steps), n_tokens - sum(steps)))
    ours = reference.logits(tokens, steps, config)
    paper = reference.paper_logits(tokens, config.group_size, config.neighbor_window)
    late = slice(n_tokens // 2, None)
    perplexities = [float(np.exp(token_losses(logits[:-1], tokens[1:])[late].mean())) for logits in (ours, paper)]
    return *perplexities, float(np.linalg.norm(ours[late] - paper[late]) / np.linalg.norm(paper[late]))  # type: ignore[return-value]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_MODEL))
    parser.add_argument("--text", required=True, type=Path, help="ASCII text the model was not trained on")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--trials", type=int, default=40, help="keys a length")
    parser.add_argument("--texts", type=int, default=4, help="stretches of text a length")
    parser.add_argument("--paper", action="store_true", help="compare with the paper's attention instead")
    args = parser.parse_args(argv)
    text = args.text.read_text(encoding="ascii")
    if args.paper:
        print("| tokens | perplexity, ours | perplexity, paper's attention | difference of logits |")
        print("|---:|---:|---:|---:|")
        for n_tokens in args.lengths:
            ours, paper, distance = compare_with_paper(args.model, text, n_tokens)
            print(f"| {n_tokens} | {ours:.3f} | {paper:.3f} | {distance:.1%} |", flush=True)
        return
    header = ["tokens", "key found", "key found, llama.cpp", "perplexity", "fresh windows", "ratio"]
    print(" | ".join(["", *header, "llama.cpp", "`--grp-attn` loop", ""]).strip())
    print("|---:" * (len(header) + 2) + "|")
    for n_tokens in args.lengths:
        r = evaluate(args.model, text, n_tokens, args.trials, args.texts)
        ratio = r.perplexity / r.fresh_windows
        cells = [str(r.n_tokens), f"{r.retrieval:.2f}", f"{r.plain_retrieval:.2f}", f"{r.perplexity:.2f}"]
        cells += [f"{r.fresh_windows:.2f}", f"{ratio:.3f}", f"{r.plain:.1f}", f"{r.group_attention_loop:.1f}"]
        print(" | ".join(["", *cells, ""]).strip(), flush=True)


if __name__ == "__main__":
    main()
