"""Write Llama-architecture GGUF files with a byte-level vocabulary (the tiny models, random test models)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a model; lengths in tokens, the rest in elements."""

    arch: str = "llama"  # "llama" (RoPE on neighbouring pairs) or "qwen2" (on halves, biases on q, k, v)
    n_ctx_train: int = 256
    n_layer: int = 4
    n_embd: int = 192
    n_head: int = 6
    n_head_kv: int = 2
    head_dim: int = 32
    n_ff: int = 512
    n_vocab: int = 256  # ids 0..255 are the bytes; more ids are padding nobody can type
    rope_base: float = 10000.0
    norm_eps: float = 1e-5


def random_tensors(shape: LlamaShape, seed: int) -> dict[str, Weights]:
    """Weights under llama.cpp's tensor names: random, with attention far from uniform so that positions matter."""
    rng = np.random.default_rng(seed)
    q_dim, kv_dim = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim

    def matrix(n_out: int, n_in: int, gain: float = 1.0) -> Weights:
        weights: Weights = rng.standard_normal((n_out, n_in), np.float32) * (gain / n_in**0.5)
        return weights.astype(np.float32)

    tensors: dict[str, Weights] = {
        "token_embd.weight": matrix(shape.n_vocab, shape.n_embd, shape.n_embd**0.5),
        "output_norm.weight": np.ones(shape.n_embd, np.float32),
        "output.weight": matrix(shape.n_vocab, shape.n_embd),
    }
    for i in range(shape.n_layer):
        tensors |= {
            f"blk.{i}.attn_norm.weight": np.ones(shape.n_embd, np.float32),
            f"blk.{i}.attn_q.weight": matrix(q_dim, shape.n_embd, 1.5),
            f"blk.{i}.attn_k.weight": matrix(kv_dim, shape.n_embd, 1.5),
            f"blk.{i}.attn_v.weight": matrix(kv_dim, shape.n_embd),
            f"blk.{i}.attn_output.weight": matrix(shape.n_embd, q_dim),
            f"blk.{i}.ffn_norm.weight": np.ones(shape.n_embd, np.float32),
            f"blk.{i}.ffn_gate.weight": matrix(shape.n_ff, shape.n_embd),
            f"blk.{i}.ffn_up.weight": matrix(shape.n_ff, shape.n_embd),
            f"blk.{i}.ffn_down.weight": matrix(shape.n_embd, shape.n_ff),
        }
        if shape.arch == "qwen2":
            for name, size in (("q", q_dim), ("k", kv_dim), ("v", kv_dim)):
                tensors[f"blk.{i}.attn_{name}.bias"] = rng.standard_normal(size, np.float32)
    return tensors


def byte_characters() -> list[str]:
    """The printable character GPT-2's byte-level BPE writes for each byte 0..255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [table[b] for b in range(256)]


def add_byte_vocabulary(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """A BPE vocabulary without useful merges: one token a byte, no BOS. Byte 0 doubles as end of text."""
    tokens = byte_characters() + [f"<pad{i}>" for i in range(256, n_vocab)]
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.UNUSED] * (n_vocab - 256)
    kinds[0] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # llama.cpp wants a merge list; this one joins characters that stand for no byte, and so never do.
    writer.add_token_merges(["\u2603 \u2603"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(False)


def write_llama(
    path: str | Path,
    shape: LlamaShape,
    tensors: dict[str, Weights],
    *,
    weight_type: str = "F32",
    name: str = "tiny",
    chat_template: str | None = None,
) -> None:
    """Write `tensors` (llama.cpp names, float32, matrices as (out, in)) as a GGUF file of `weight_type`."""
    quantisation = gguf.GGMLQuantizationType[weight_type]
    file_type = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}[weight_type]
    writer = gguf.GGUFWriter(str(path), shape.arch)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.n_vocab)
    add_byte_vocabulary(writer, shape.n_vocab)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for tensor_name, array in tensors.items():
        array = np.ascontiguousarray(array, np.float32)
        if array.ndim == 1:
            writer.add_tensor(tensor_name, array)
        else:
            writer.add_tensor(tensor_name, gguf.quants.quantize(array, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
