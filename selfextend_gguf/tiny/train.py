"""Train a tiny byte-level Llama-architecture model and write it as GGUF.

    python -m selfextend_gguf.tiny.train --text train.txt --heldout heldout.txt --out base.gguf
    python -m selfextend_gguf.tiny.train --text train.txt --heldout heldout.txt --out tiny.gguf \\
        --recipe sharpen --start base.gguf

Needs the extra `[train]` (PyTorch). Two recipes, whose stages are mixtures of the sequences in `batches.py`: "base"
trains on text alone, on dense copies (induction appears here), then on the full context with key retrieval;
"sharpen" makes attention sharp enough for texts of many trained contexts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from selfextend_gguf.tiny import batches, keys
from selfextend_gguf.tiny.model_file import LlamaShape, Weights, write_llama


class Block(nn.Module):
    """One Llama block: RMSNorm, grouped-query attention with interleaved RoPE, RMSNorm, SwiGLU."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        dim, kv_dim = shape.n_embd, shape.n_head_kv * shape.head_dim
        self.attn_norm = nn.RMSNorm(dim, eps=shape.norm_eps)
        self.attn_q = nn.Linear(dim, shape.n_head * shape.head_dim, bias=False)
        self.attn_k = nn.Linear(dim, kv_dim, bias=False)
        self.attn_v = nn.Linear(dim, kv_dim, bias=False)
        self.attn_output = nn.Linear(shape.n_head * shape.head_dim, dim, bias=False)
        self.ffn_norm = nn.RMSNorm(dim, eps=shape.norm_eps)
        self.ffn_gate = nn.Linear(dim, shape.n_ff, bias=False)
        self.ffn_up = nn.Linear(dim, shape.n_ff, bias=False)
        self.ffn_down = nn.Linear(shape.n_ff, dim, bias=False)

    def forward(self, x: torch.Tensor, angles: torch.Tensor, softness: float) -> torch.Tensor:
        rows, length, _ = x.shape
        h = self.attn_norm(x)
        q = self.attn_q(h).view(rows, length, -1, self.shape.head_dim).transpose(1, 2)
        k = self.attn_k(h).view(rows, length, -1, self.shape.head_dim).transpose(1, 2)
        v = self.attn_v(h).view(rows, length, -1, self.shape.head_dim).transpose(1, 2)
        groups = self.shape.n_head // self.shape.n_head_kv
        k = rotate(k, angles).repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
        scale = softness / self.shape.head_dim**0.5
        a = F.scaled_dot_product_attention(rotate(q, angles), k, v, is_causal=True, scale=scale)
        x = x + self.attn_output(a.transpose(1, 2).reshape(rows, length, -1))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RoPE on (rows, heads, length, head_dim), pairs (2i, 2i+1), `angles` (length, head_dim / 2) in radians."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class TinyLlama(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.output_norm = nn.RMSNorm(shape.n_embd, eps=shape.norm_eps)
        self.output = nn.Linear(shape.n_embd, shape.n_vocab, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = (
                    0.02 / (2 * shape.n_layer) ** 0.5 if name.endswith(("attn_output.weight", "down.weight")) else 0.02
                )
                nn.init.normal_(p, std=scale)
        frequency = shape.rope_base ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, tokens: torch.Tensor, softness: float = 1.0) -> torch.Tensor:
        """(rows, length) int64 -> logits (rows, length, vocabulary). Attention scores are multiplied by `softness`."""
        position = torch.arange(tokens.shape[1], dtype=torch.float64)
        angles = torch.outer(position, self.frequency).float()
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, angles, softness)
        return self.output(self.output_norm(x))

    def gguf_tensors(self) -> dict[str, Weights]:
        """Weights under llama.cpp's tensor names."""
        return {name: p.detach().float().numpy() for name, p in self.state_dict().items()}


@dataclass(frozen=True)
class Stage:
    """`steps` optimiser steps of sequences of `length` tokens; `mixture` = how many are (text, copies, retrieval).

    Each step multiplies attention scores by a random factor between `softest` and 1. A model that finds its way
    with soft attention has attention to spare at full strength: among 16 times as many keys as it was trained on
    (a text 16 trained contexts long), the right one still stands out.
    """

    name: str
    steps: int
    length: int
    mixture: tuple[int, int, int]
    softest: float = 1.0
    copies: Callable[..., batches.Batch] = batches.copy_batch


@dataclass(frozen=True)
class Recipe:
    """Stages in order and their optimiser: linear warm-up over `warm_up` steps to `learning_rate`, constant, then
    linear decay over the last `decay` (a fraction) of all steps."""

    stages: list[Stage]
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warm_up: int = 100
    decay: float = 0.4

    @property
    def n_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        left = (self.n_steps - step) / (self.decay * self.n_steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up, max(0.02, left))


def recipes(context: int, scale: float = 1.0) -> dict[str, Recipe]:
    """Recipes for a trained context, of about 6144 tokens a step; `scale` stretches the number of steps.

    "base" teaches text, copying and, over the full context, key retrieval. "sharpen" starts from a base model and
    teaches it to do so with soft attention: without it, keys are found within the trained context but fewer and
    fewer beyond 4 times its length, where the right key competes with ever more others.
    """
    rows = max(6, 6144 // context)
    text, copies, third = round(rows * 0.4), round(rows * 0.2), rows // 3
    base = [
        Stage("text", round(500 * scale), 96, (64, 0, 0)),
        Stage("copies", round(700 * scale), 96, (14, 50, 0)),
        Stage("retrieval", round(2600 * scale), context, (text, copies, rows - text - copies)),
    ]
    mixture = (third, third, rows - 2 * third)
    sharpen = Stage("sharpen", round(1000 * scale), context, mixture, 0.4, batches.partial_copy_batch)
    return {
        "base": Recipe(base),
        "sharpen": Recipe([sharpen], learning_rate=1.5e-3, weight_decay=0.01, warm_up=30, decay=1.0),
    }


def make_batch(rng: np.random.Generator, text: batches.Text, words: list[str], stage: Stage) -> batches.Batch:
    n_text, n_copy, n_key = stage.mixture
    parts = []
    if n_text:
        parts.append(batches.text_batch(rng, text, n_text, stage.length))
    if n_copy:
        parts.append(stage.copies(rng, text, n_copy, stage.length))
    if n_key:
        parts.append(batches.retrieval_batch(rng, text, words, n_key, stage.length))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def loss_of(model: TinyLlama, batch: batches.Batch, softness: float = 1.0) -> torch.Tensor:
    tokens, weights = torch.from_numpy(batch[0]), torch.from_numpy(batch[1])
    logits = model(tokens[:, :-1], softness)
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


@torch.no_grad()
def evaluate(model: TinyLlama, heldout: batches.Text, context: int) -> str:
    """Held-out perplexity and key retrieval within the trained context, as one line."""
    rng = np.random.default_rng(7)
    ppl = loss_of(model, batches.text_batch(rng, heldout, 32, context)).exp().item()
    text = bytes(heldout).decode("ascii")
    tasks = [keys.key_task(rng, text, context - 8, depth) for depth in np.linspace(0.05, 0.95, 40)]
    right = 0
    for task in tasks:
        line = list((task.prompt + task.answer).encode())
        guess = model(torch.tensor([line[:-1]]))[0, -len(task.answer) :].argmax(-1).tolist()
        right += guess == list(task.answer.encode())
    return f"held-out perplexity {ppl:.3f}  key retrieval {right / len(tasks):.2f}"


def train(
    text: batches.Text,
    heldout: batches.Text,
    model: TinyLlama,
    recipe: Recipe,
    *,
    seed: int = 1,
    bf16: bool = False,
    log_every: int = 100,
    log: Callable[[str], None] = print,
) -> None:
    """Train `model` in place on `text` (bytes). `bf16` rounds the matrix products' inputs to bfloat16 (faster where
    the CPU has it). `log` gets one line of text at a time."""
    rng = np.random.default_rng(seed)
    words = batches.vocabulary_words(text)
    n_params = sum(p.numel() for p in model.parameters())
    log(f"{n_params} parameters, {model.shape}, seed {seed}, torch {torch.__version__}")
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    step, began = 0, time.monotonic()
    for stage in recipe.stages:
        for _ in range(stage.steps):
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step)
            softness = float(rng.uniform(stage.softest, 1.0)) if stage.softest < 1 else 1.0
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_of(model, make_batch(rng, text, words, stage), softness)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            step += 1
            if step % log_every == 0:
                elapsed = time.monotonic() - began
                log(f"step {step}/{recipe.n_steps} {stage.name} loss {loss.item():.3f} {elapsed:.0f} s")
            if step % (5 * log_every) == 0:
                log(f"step {step} {evaluate(model, heldout, model.shape.n_ctx_train)}")
    log(f"final {evaluate(model, heldout, model.shape.n_ctx_train)}")


def load_weights(model: TinyLlama, path: Path) -> None:
    """Put the (dequantised) weights of a GGUF file of the same shape into `model`."""
    reader = gguf.GGUFReader(str(path))
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in tensors.items()})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=["base", "sharpen"], default="base")
    parser.add_argument("--start", type=Path, help="GGUF file to start from instead of random weights")
    parser.add_argument("--text", required=True, help="training text")
    parser.add_argument("--heldout", required=True, help="ASCII text that is never trained on")
    parser.add_argument("--out", required=True, type=Path, help="GGUF file to write; the log goes beside it")
    parser.add_argument("--type", default="Q8_0", choices=["F32", "F16", "Q8_0"], help="type of the weights")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 matrix products")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = TinyLlama(LlamaShape(n_ctx_train=args.context))
    if args.start is not None:
        load_weights(model, args.start)
    text, heldout = batches.read_text(args.text), batches.read_text(args.heldout)
    with args.out.with_suffix(".log").open("w", encoding="utf-8") as log_file:

        def log(line: str) -> None:
            print(line, flush=True)
            print(line, file=log_file, flush=True)

        recipe = recipes(args.context, args.scale)[args.recipe]
        train(text, heldout, model, recipe, seed=args.seed, bf16=args.bf16, log=log)
    write_llama(
        args.out, model.shape, model.gguf_tensors(), weight_type=args.type, name=f"selfextend-tiny-{args.context}"
    )


if __name__ == "__main__":
    main()
