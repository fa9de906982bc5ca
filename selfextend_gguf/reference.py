"""Float64 numpy reference: a Llama or Qwen2 forward pass with any key positions.

Slow and plain on purpose. `Reference.logits` mirrors the engine: tokens are decoded in steps, and before each step
every cached key is given a key position; what a layer computed in earlier steps stays as it was. `paper_logits`
is the paper's own attention instead: each query sees its neighbors at the exact distance and all other keys at
q//G + W - W//G - k//G (arXiv 2401.01325, equation 4 and appendix A).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from selfextend_gguf.schedule import SelfExtendConfig, schedule_positions_numpy

Array = npt.NDArray[np.float64]
# (n_cached, n_total) -> key positions P(0..n_cached-1), (n_cached,), or for each frequency, (n_cached, head_dim / 2)
Schedule = Callable[[int, int], npt.NDArray[np.int32]]


@dataclass
class _Layer:
    keys: Array  # (n_tokens, n_head_kv, head_dim), not rotated
    values: Array  # (n_tokens, n_head_kv, head_dim)


class Reference:
    """The weights of a GGUF file (any quantisation, dequantised) and its forward pass in float64."""

    def __init__(self, path: str | Path) -> None:
        reader = gguf.GGUFReader(str(path))
        fields: dict[str, Any] = {
            name: field.contents() for name, field in reader.fields.items() if "tokens" not in name
        }
        self.arch: str = fields["general.architecture"]
        if self.arch not in ("llama", "qwen2"):
            raise ValueError(f"the reference knows llama and qwen2, not {self.arch}")
        self.weights: dict[str, Array] = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors
        }

        def number(key: str, default: float | None = None) -> float:
            value: float | None = fields.get(f"{self.arch}.{key}", default)
            assert value is not None, key
            return value

        self.n_layer = int(number("block_count"))
        self.n_head = int(number("attention.head_count"))
        self.n_head_kv = int(number("attention.head_count_kv", self.n_head))
        n_embd = int(number("embedding_length"))
        self.head_dim = int(number("attention.key_length", n_embd // self.n_head))
        self.n_ctx_train = int(number("context_length"))
        self.eps = float(number("attention.layer_norm_rms_epsilon"))
        base = float(number("rope.freq_base", 10000.0))
        self.frequency = base ** (-np.arange(0, self.head_dim, 2) / self.head_dim)  # radians per position

    # ---- pieces ------------------------------------------------------------------------------------------------

    def _norm(self, x: Array, weight: str) -> Array:
        normed: Array = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + self.eps) * self.weights[weight]
        return normed

    def _linear(self, x: Array, name: str) -> Array:
        y: Array = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def rotate(self, x: Array, positions: npt.ArrayLike) -> Array:
        """RoPE of x (n, heads, head_dim) at `positions`, (n,) or for each frequency (n, head_dim / 2), fast ones first:
        pairs (2i, 2i+1) for llama, (i, i + half) for qwen2."""
        positions = np.asarray(positions, np.float64)
        angle = positions.reshape(len(x), 1, *positions.shape[1:] or (1,)) * self.frequency
        cos, sin = np.cos(angle), np.sin(angle)
        half = self.head_dim // 2
        out = np.empty_like(x)
        first, second = (
            (slice(0, None, 2), slice(1, None, 2)) if self.arch == "llama" else (slice(0, half), slice(half, None))
        )
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out

    def _forward(
        self, tokens: Sequence[int], cache: list[_Layer], attend: Callable[..., Array], n_last: int | None = None
    ) -> Array:
        """One step over `tokens` after those in `cache` (which grows); logits (n_last, n_vocab) of the last ones."""
        x = self.weights["token_embd.weight"][np.asarray(tokens)]
        n = len(tokens)
        for i, layer in enumerate(cache):
            h = self._norm(x, f"blk.{i}.attn_norm.weight")
            k = self._linear(h, f"blk.{i}.attn_k").reshape(n, self.n_head_kv, self.head_dim)
            v = self._linear(h, f"blk.{i}.attn_v").reshape(n, self.n_head_kv, self.head_dim)
            layer.keys = np.concatenate([layer.keys, k])
            layer.values = np.concatenate([layer.values, v])
            if i == self.n_layer - 1 and n_last is not None:  # nothing else reads the others' outputs
                x, h = x[n - n_last :], h[n - n_last :]
            q = self._linear(h, f"blk.{i}.attn_q").reshape(len(h), self.n_head, self.head_dim)
            n_before = len(layer.keys) - len(q)
            p = attend(q, layer.keys, n_before)  # scores (heads, len(q), n_total), then probabilities in their place
            p /= np.sqrt(self.head_dim)
            future = np.arange(len(layer.keys))[None, :] > n_before + np.arange(len(q))[:, None]
            np.copyto(p, -np.inf, where=future)
            p -= p.max(-1, keepdims=True)
            np.exp(p, out=p)
            p /= p.sum(-1, keepdims=True)
            a = self._by_key_head(p) @ layer.values.transpose(1, 0, 2)  # (heads_kv, queries, head_dim)
            a = a.reshape(self.n_head, len(q), self.head_dim).transpose(1, 0, 2)
            a = a.reshape(len(q), self.n_head * self.head_dim)
            x = x + self._linear(a, f"blk.{i}.attn_output")
            h = self._norm(x, f"blk.{i}.ffn_norm.weight")
            gate = self._linear(h, f"blk.{i}.ffn_gate")
            x = x + self._linear(gate / (1 + np.exp(-gate)) * self._linear(h, f"blk.{i}.ffn_up"), f"blk.{i}.ffn_down")
        h = self._norm(x, "output_norm.weight")
        logits: Array = h @ self.weights.get("output.weight", self.weights["token_embd.weight"]).T
        return logits

    def _scores(self, q: Array, k: Array) -> Array:
        """Scores (heads, n_q, n_k) of rotated q (n_q, heads, d) and k (n_k, heads_kv, d)."""
        scores = self._by_key_head(q.transpose(1, 0, 2)) @ k.transpose(1, 2, 0)
        return scores.reshape(self.n_head, len(q), len(k))

    def _by_key_head(self, x: Array) -> Array:
        """(heads, n, d) -> (heads_kv, heads/heads_kv * n, d): what meets the same head of keys, together."""
        heads, n, d = x.shape
        return x.reshape(self.n_head_kv, heads // self.n_head_kv * n, d)

    def _empty_cache(self) -> list[_Layer]:
        shape = (0, self.n_head_kv, self.head_dim)
        return [_Layer(np.zeros(shape), np.zeros(shape)) for _ in range(self.n_layer)]

    # ---- whole texts -------------------------------------------------------------------------------------------

    def logits(
        self,
        tokens: Sequence[int],
        steps: Sequence[int],
        schedule: Schedule | SelfExtendConfig,
        n_last: int | None = None,
    ) -> Array:
        """Logits (n_tokens, n_vocab) of `tokens` decoded in `steps` (their sizes), keys positioned by `schedule`; with
        `n_last` only those of the last tokens, (n_last, n_vocab).

        Queries and the keys of the running step stand at their token index, cached keys at schedule(n0, n1).
        """
        assert sum(steps) == len(tokens)
        first = 0 if n_last is None else len(tokens) - n_last  # token whose logits are asked for
        positions_of: Schedule = (
            partial(schedule_positions_numpy, schedule) if isinstance(schedule, SelfExtendConfig) else schedule
        )
        cache, rows, n0 = self._empty_cache(), [], 0
        for step in steps:
            n1 = n0 + step
            cached = positions_of(n0, n1)
            own = np.arange(n0, n1).reshape(-1, *[1] * (cached.ndim - 1))
            key_positions = np.concatenate([cached, np.broadcast_to(own, (step, *cached.shape[1:]))])

            def attend(
                q: Array, k: Array, n_cached: int, key_positions: npt.NDArray[np.int32] = key_positions
            ) -> Array:
                queries = np.arange(n_cached, n_cached + len(q))
                return self._scores(self.rotate(q, queries), self.rotate(k, key_positions))

            rows.append(self._forward(tokens[n0:n1], cache, attend, min(step, max(0, n1 - first))))
            n0 = n1
        return np.concatenate(rows)

    def paper_logits(self, tokens: Sequence[int], group_size: int, window: int) -> Array:
        """Logits (n_tokens, n_vocab) of the paper's attention, all tokens in one step: for every single query,
        keys within the window at the exact distance, all others at q//G + W - W//G - k//G."""

        def attend(q: Array, k: Array, n_cached: int) -> Array:
            index = np.arange(len(k))
            near = self._scores(self.rotate(q, index), self.rotate(k, index))
            far_q = index // group_size + window - window // group_size
            far = self._scores(self.rotate(q, far_q), self.rotate(k, index // group_size))
            distance = index[:, None] - index[None, :]
            return np.where(distance < window, near, far)

        return self._forward(tokens, self._empty_cache(), attend)
