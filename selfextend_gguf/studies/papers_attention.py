"""How far the engine's map of positions is from the paper's attention, in the float64 reference: docs/how-it-works.md.

python -m selfextend_gguf.studies.papers_attention --text tests/data/heldout.txt
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfextend_gguf._native import schedule_step
from selfextend_gguf.evaluation.perplexity import second_half
from selfextend_gguf.evaluation.readers import token_losses
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.planning import plan
from selfextend_gguf.reference import Array, Reference


@dataclass(frozen=True)
class Comparison:
    """Perplexities of the second half of a text, and how far apart the logits are there (norm of the difference in
    relation to the norm)."""

    ours: float
    paper: float
    difference: float


def compare(model: str, text: str, n_tokens: int) -> Comparison:
    """Our schedule, with all trained distances as in the paper, and the paper's attention."""
    reference = Reference(model)
    config = plan(reference.n_ctx_train, n_tokens, max_distance=reference.n_ctx_train)
    tokens = list(text[:n_tokens].encode())
    steps: list[int] = []
    while sum(steps) < n_tokens:
        steps.append(schedule_step(config, sum(steps), n_tokens - sum(steps)))
    ours = reference.logits(tokens, steps, config)
    paper = reference.paper_logits(tokens, config.group_size, config.neighbor_window)

    def perplexity(logits: Array) -> float:
        return float(np.exp(second_half(token_losses(logits[:-1], tokens[1:])).mean()))

    late = slice(n_tokens // 2, None)
    difference = np.linalg.norm(ours[late] - paper[late]) / np.linalg.norm(paper[late])
    return Comparison(perplexity(ours), perplexity(paper), float(difference))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(TINY_MODEL))
    parser.add_argument("--text", required=True, type=Path, help="ASCII text the model was not trained on")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    args = parser.parse_args(argv)
    text = args.text.read_text(encoding="ascii")
    print("| tokens | perplexity, ours | perplexity, paper's attention | difference of logits |")
    print("|---:|---:|---:|---:|")
    for n_tokens in args.lengths:
        c = compare(args.model, text, n_tokens)
        print(f"| {n_tokens} | {c.ours:.3f} | {c.paper:.3f} | {c.difference:.1%} |", flush=True)


if __name__ == "__main__":
    main()
