"""Keys found and perplexity of a bundled model beyond its trained context: the table of the README.

    python -m selfextend_gguf.studies.long_texts --text tests/data/heldout.txt

Methods: Self-Extend with automatic parameters, plain llama.cpp, and llama.cpp's own Self-Extend loop
(`--grp-attn-n`, `--grp-attn-w` of its completion tool, over `llama_memory_seq_add` and `llama_memory_seq_div`).
Their perplexities are compared with the text's own difficulty: the same tokens read in fresh windows.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import llama_cpp

from selfextend_gguf.llama import Llama
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.studies.quality import fraction_found, key_tasks, late_perplexity


@dataclass(frozen=True)
class Row:
    """Results at one length; perplexities of the text's second half."""

    n_tokens: int
    found: float
    plain_found: float
    perplexity: float
    fresh_windows: float
    plain: float
    group_attention_loop: float


def measure(model: str, text: str, n_tokens: int, n_trials: int, n_texts: int) -> Row:
    """Both measures at one length; perplexities are those of `n_texts` stretches of `text`."""
    tasks = key_tasks(text, n_tokens, n_trials)
    extended = Llama(model, n_ctx=n_tokens + 64, verbose=False)
    found = fraction_found(extended, tasks)
    extended.close()
    plain = llama_cpp.Llama(model, n_ctx=n_tokens + 256, verbose=False, flash_attn=True)
    plain_found = fraction_found(plain, tasks)
    plain.close()
    methods = ("selfextend", "window", "plain", "loop")
    perplexities = [late_perplexity(method, model, text, n_tokens, n_texts) for method in methods]
    return Row(n_tokens, found, plain_found, *perplexities)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(TINY_MODEL))
    parser.add_argument("--text", required=True, type=Path, help="ASCII text the model was not trained on")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--trials", type=int, default=40, help="keys a length")
    parser.add_argument("--texts", type=int, default=4, help="stretches of text a length")
    args = parser.parse_args(argv)
    text = args.text.read_text(encoding="ascii")
    header = ["tokens", "key found", "key found, llama.cpp", "perplexity", "fresh windows", "ratio"]
    print(" | ".join(["", *header, "llama.cpp", "`--grp-attn` loop", ""]).strip())
    print("|---:" * (len(header) + 2) + "|")
    for n_tokens in args.lengths:
        r = measure(args.model, text, n_tokens, args.trials, args.texts)
        ratio = r.perplexity / r.fresh_windows
        cells = [str(r.n_tokens), f"{r.found:.2f}", f"{r.plain_found:.2f}", f"{r.perplexity:.2f}"]
        cells += [f"{r.fresh_windows:.2f}", f"{ratio:.3f}", f"{r.plain:.1f}", f"{r.group_attention_loop:.1f}"]
        print(" | ".join(["", *cells, ""]).strip(), flush=True)


if __name__ == "__main__":
    main()
