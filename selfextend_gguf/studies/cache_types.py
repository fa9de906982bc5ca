"""What each type of KV cache costs beyond the trained context, and what rewriting its keys adds: docs/kv-cache.md.

python -m selfextend_gguf.studies.cache_types --text tests/data/heldout.txt
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.llama import Llama
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.studies.quality import fraction_found, key_tasks, late_perplexity
from selfextend_gguf.tiny.model_file import LlamaShape, random_tensors, write_llama

REWRITES = (0, 1, 10, 50)
# Heads of 64: llama.cpp multiplies quantised keys of such heads with a Hadamard matrix. (The bundled model's have 32.)
WIDE_HEADS = LlamaShape(n_layer=3, n_embd=256, n_head=4, n_head_kv=2, head_dim=64, n_ff=512)


def quality(model: str, text: str, kind: str, n_tokens: int, n_trials: int, n_texts: int) -> tuple[float, float]:
    """Fraction of keys found, and perplexity of the second halves of `n_texts` stretches of `n_tokens`."""
    arguments: dict[str, Any] = {"type_k": KV_TYPES[kind], "type_v": KV_TYPES["f16"], "verbose": False}
    llm = Llama(model, n_ctx=n_tokens + 64, **arguments)
    found = fraction_found(llm, key_tasks(text, n_tokens, n_trials))
    llm.close()
    return found, late_perplexity("selfextend", model, text, n_tokens, n_texts, **arguments)


def logits_after_rewrites(model: str, tokens: list[int], kind: str) -> dict[int, npt.NDArray[np.float32]]:
    """Logits of the last 64 tokens after each number of REWRITES, each of which moves all keys but the first by another
    distance of up to 15 positions."""
    n = len(tokens) - 64
    llm = Llama(model, n_ctx=len(tokens), type_k=KV_TYPES[kind], type_v=KV_TYPES["f32"], logits_all=True, verbose=False)
    llm.eval(tokens[:n])
    engine, home = llm._engine, llm.key_positions
    assert engine is not None
    movable = np.arange(n) > 0  # moving the first key as well would only move the frame
    logits = {}
    for done in range(max(REWRITES) + 1):
        if done > 0:
            engine.set_key_positions(np.minimum(home + 7 * done % 16 * movable, n))
        if done in REWRITES:
            llm._batch.set_batch(batch=tokens[n:], n_past=n, logits_all=True)
            engine.decode(llm._batch.batch)
            logits[done] = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(64, llm.n_vocab())).copy()
            llm._ctx.kv_cache_seq_rm(0, n, -1)
    llm.close()
    return logits


def rewrite_errors(model: str, tokens: list[int], kind: str) -> list[float]:
    """Relative error of the logits (norm) against an f32 cache, after each number of REWRITES."""
    exact, rounded = logits_after_rewrites(model, tokens, "f32"), logits_after_rewrites(model, tokens, kind)
    return [float(np.linalg.norm(rounded[n] - exact[n]) / np.linalg.norm(exact[n])) for n in REWRITES]


@contextmanager
def hadamard_disabled() -> Iterator[None]:
    """llama.cpp's own switch, read when a context is made."""
    os.environ["LLAMA_ATTN_ROT_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["LLAMA_ATTN_ROT_DISABLE"]


def percentages(errors: list[float]) -> str:
    return " | ".join(f"{error:.2%}" for error in errors)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", required=True, type=Path, help="ASCII text the model was not trained on")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--trials", type=int, default=40, help="keys a type")
    parser.add_argument("--texts", type=int, default=8, help="stretches of text a type")
    args = parser.parse_args(argv)
    text = args.text.read_text(encoding="ascii")
    tokens = list(text[: args.tokens].encode())

    columns = " | ".join(f"{n} rewrites" if n != 1 else "1 rewrite" for n in REWRITES)
    print(f"| keys | key found | perplexity | to f16 | {columns} |")
    print("|---|---:|---:|---:" + "|---:" * len(REWRITES) + "|")
    f16 = None
    for kind in sorted(KV_TYPES, key=lambda kind: kind != "f16"):
        found, perplexity = quality(str(TINY_MODEL), text, kind, args.tokens, args.trials, args.texts)
        f16 = f16 or perplexity
        errors = percentages(rewrite_errors(str(TINY_MODEL), tokens, kind))
        print(f"| {kind} | {found:.2f} | {perplexity:.3f} | {perplexity / f16:.3f} | {errors} |", flush=True)

    print(f"\n| keys, heads of 64 | {columns} |")
    print("|---" + "|---:" * len(REWRITES) + "|")
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "heads64.gguf")
        write_llama(model, WIDE_HEADS, random_tensors(WIDE_HEADS, seed=1))
        for kind in ("q8_0", "q5_0", "q4_0"):
            print(f"| {kind} | {percentages(rewrite_errors(model, tokens, kind))} |", flush=True)
            with hadamard_disabled():
                print(f"| {kind}, no Hadamard | {percentages(rewrite_errors(model, tokens, kind))} |", flush=True)


if __name__ == "__main__":
    main()
