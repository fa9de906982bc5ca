"""Key retrieval and perplexity of a tiny model beyond its trained context: the table of the README.

    python -m selfextend_gguf.tiny.evaluate --text tests/data/heldout.txt

Methods: Self-Extend with automatic parameters, plain llama.cpp, and llama.cpp's own Self-Extend loop
(`--grp-attn-n`, `--grp-attn-w` of its completion tool, over `llama_memory_seq_add` and `llama_memory_seq_div`).
Their perplexities are compared with the text's own difficulty: the same tokens read in fresh windows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import llama_cpp.llama_cpp as c_api
import numpy as np
import numpy.typing as npt

from selfextend_gguf._native import schedule_step
from selfextend_gguf.config import plan
from selfextend_gguf.llama import Llama
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.reference import Reference
from selfextend_gguf.tiny.data import KeyTask, key_task

Array = npt.NDArray[np.float64]


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


def losses(logits: npt.ArrayLike, tokens: list[int]) -> Array:
    """Negative log-likelihood (nats) of tokens[1:] from logits (n, n_vocab); shape (n - 1,)."""
    rows = np.asarray(logits, np.float64)[: len(tokens) - 1]
    rows = rows - rows.max(-1, keepdims=True)
    return np.log(np.exp(rows).sum(-1)) - rows[np.arange(len(rows)), tokens[1:]]


def losses_read_at_once(llm: llama_cpp.Llama, tokens: list[int]) -> Array:
    """Losses of a text read from its beginning; `llm` needs `logits_all`."""
    llm.reset()
    llm.eval(tokens)
    return losses(llm.scores[: len(tokens)], tokens)


def losses_in_fresh_windows(llm: llama_cpp.Llama, tokens: list[int], n_ctx_train: int) -> Array:
    """Losses with half to one trained context before each token, all positions trained; shape (n - 1,).

    Windows of one trained context start every half; each contributes its second half (the first, all of it).
    """
    half = n_ctx_train // 2
    result = np.empty(len(tokens) - 1)
    for begin in range(0, max(1, len(tokens) - half), half):
        window = tokens[begin : begin + n_ctx_train + 1]
        part = losses_read_at_once(llm, window)
        keep = 0 if begin == 0 else half - 1
        result[begin + keep : begin + len(part)] = part[keep:]
    return result


def losses_of_group_attention_loop(
    path: str, tokens: list[int], group_size: int, window: int, n_batch: int = 32
) -> Array:
    """Losses with llama.cpp's own Self-Extend: the position loop of its completion tool, before each batch."""
    llm = llama_cpp.Llama(path, n_ctx=-(-len(tokens) // 256) * 256, n_batch=n_batch, verbose=False)
    memory = c_api.llama_get_memory(llm.ctx)
    rows, n_past, grouped = [], 0, 0
    for begin in range(0, len(tokens), n_batch):
        while group_size > 1 and n_past >= grouped + window:
            shift = group_size * grouped // window
            squeeze = window // group_size * (group_size - 1)
            rest = window // group_size - shift * squeeze - window
            c_api.llama_memory_seq_add(memory, 0, grouped, n_past, shift * squeeze)
            c_api.llama_memory_seq_div(
                memory, 0, grouped + shift * squeeze, grouped + shift * squeeze + window, group_size
            )
            c_api.llama_memory_seq_add(memory, 0, grouped + shift * squeeze + window, n_past + shift * squeeze, rest)
            n_past -= squeeze
            grouped += window // group_size
        batch = tokens[begin : begin + n_batch]
        llm._batch.set_batch(batch=batch, n_past=n_past, logits_all=True)
        llm._ctx.decode(llm._batch)
        rows.append(np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(len(batch), llm.n_vocab())).copy())
        n_past += len(batch)
    llm.close()
    return losses(np.concatenate(rows), tokens)


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
    config = extended.self_extend
    tasks = retrieval_tasks(text, n_tokens, n_trials)
    found = retrieval(extended, tasks)
    extended.close()
    plain = llama_cpp.Llama(model, n_ctx=n_tokens + 256, verbose=False, flash_attn=True)
    plain_found = retrieval(plain, tasks)
    plain.close()

    extended = Llama(model, n_ctx=n_tokens, logits_all=True, verbose=False)
    plain = llama_cpp.Llama(model, n_ctx=-(-n_tokens // 256) * 256, logits_all=True, verbose=False, flash_attn=True)
    n_ctx_train = plain._model.n_ctx_train()
    window = llama_cpp.Llama(model, n_ctx=512, logits_all=True, verbose=False, flash_attn=True)
    starts = np.linspace(0, len(text) - n_tokens - 1, n_texts).astype(int)
    group_size = config.group_size if config else 1

    def mean(losses_of: Callable[[list[int]], Array]) -> float:
        parts = [losses_of(list(text[s : s + n_tokens].encode()))[n_tokens // 2 :] for s in starts]
        return float(np.exp(np.concatenate(parts).mean()))

    loop_window = n_ctx_train // 2 // group_size * group_size or group_size
    row = Row(
        n_tokens,
        found,
        plain_found,
        mean(lambda tokens: losses_read_at_once(extended, tokens)),
        mean(lambda tokens: losses_in_fresh_windows(window, tokens, n_ctx_train)),
        mean(lambda tokens: losses_read_at_once(plain, tokens)),
        mean(lambda tokens: losses_of_group_attention_loop(model, tokens, group_size, loop_window)),
    )
    for llm in (extended, plain, window):
        llm.close()
    return row


def compare_with_paper(model: str, text: str, n_tokens: int) -> tuple[float, float, float]:
    """Perplexity of the second half of a text by our schedule and by the paper's attention, and how far apart their
    logits are there (norm of the difference in relation to the norm). Both from the float64 reference."""
    reference = Reference(model)
    config = plan(reference.n_ctx_train, n_tokens)
    tokens = list(text[:n_tokens].encode())
    steps: list[int] = []
    while sum(steps) < n_tokens:
        steps.append(schedule_step(config, sum(steps), n_tokens - sum(steps)))
    ours = reference.logits(tokens, steps, config)
    paper = reference.paper_logits(tokens, config.group_size, config.neighbor_window)
    late = slice(n_tokens // 2, None)
    perplexities = [float(np.exp(losses(logits, tokens)[late].mean())) for logits in (ours, paper)]
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
