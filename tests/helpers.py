"""What several test modules share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from selfextend_gguf import Llama, SelfExtendConfig, schedule_positions
from selfextend_gguf._native import schedule_step
from selfextend_gguf.cli.info import describe
from selfextend_gguf.errors import SelfExtendError
from selfextend_gguf.kv_cache import KV_TYPES
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.reference import Reference
from selfextend_gguf.tiny.model_file import LlamaShape

F32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
F16 = {"type_k": llama_cpp.GGML_TYPE_F16, "type_v": llama_cpp.GGML_TYPE_F16}

# Unrelated shapes: head sizes 32, 64 and 128, grouped-query attention of 1, 2 and 4 heads, both kinds of RoPE.
SHAPES = {
    "norm-32": LlamaShape(n_ctx_train=64, n_layer=3, n_embd=64, n_head=4, n_head_kv=2, head_dim=32, n_ff=96),
    "neox-64": LlamaShape(
        arch="qwen2", n_ctx_train=96, n_layer=2, n_embd=256, n_head=4, n_head_kv=1, head_dim=64, n_ff=128, rope_base=1e6
    ),
    "norm-128": LlamaShape(
        n_ctx_train=128, n_layer=2, n_embd=96, n_head=2, n_head_kv=2, head_dim=128, n_ff=64, rope_base=500.0
    ),
}

CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
TOOLS_TEMPLATE = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tool messages') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
)


def with_slow_keys(tensors: dict[str, np.ndarray], shape: LlamaShape) -> dict[str, np.ndarray]:
    """The same model with keys that lie, but for a hundredth, in the three pairs that turn slowest, as those of a first
    token do in real models."""
    pair = np.arange(shape.head_dim) % (shape.head_dim // 2)  # pairs (i, i + half)
    gain = np.where(pair < shape.head_dim // 2 - 3, 0.01, 10.0).astype(np.float32)
    rows = np.tile(gain, shape.n_head_kv)
    return {
        name: tensor * rows.reshape(-1, *[1] * (tensor.ndim - 1)) if ".attn_k." in name else tensor
        for name, tensor in tensors.items()
    }


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 256, n).tolist()


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference in relation to the largest value."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def logits_of_parts(
    reference: Reference, tokens: Sequence[int], parts: Sequence[tuple[int, SelfExtendConfig]]
) -> np.ndarray:
    """Logits (n_tokens, n_vocab) of a text whose parts, given by their ends, were read under different parameters."""
    steps: list[int] = []
    configs: dict[int, SelfExtendConfig] = {}
    n0 = 0
    for end, config in parts:
        while n0 < end:
            configs[n0] = config
            steps.append(schedule_step(config, n0, end - n0))
            n0 += steps[-1]
    return reference.logits(tokens, steps, lambda n0, n1: schedule_positions(configs[n0], n0, n1))


def write_adapter(
    path: Path, *, arch: str = "llama", tensor: str = "blk.0.attn_k.weight", n_in: int = 192, seed: int = 0
) -> Path:
    """A LoRA adapter of rank 4 for the bundled model's first keys."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    rng = np.random.default_rng(seed)
    for name, shape in (("lora_a", (4, n_in)), ("lora_b", (64, 4))):
        writer.add_tensor(f"{tensor}.{name}", 0.3 * rng.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def foreseen(path: str | Path, n_ctx: int, keys: str, values: str) -> str:
    """What `info` says of a context, for caches of these types."""
    with ModelInfo(path) as file:
        return describe(file, n_ctx, {}, keys, values, verbose=False)["explanation"]


def happening(path: str | Path, n_ctx: int, keys: str, values: str, *, model_info: ModelInfo | None = None) -> str:
    """What `Llama` does, in the words of `info`."""
    types = {"type_k": KV_TYPES[keys], "type_v": KV_TYPES[values]}
    try:
        llm = Llama(str(path), n_ctx=n_ctx, **types, model_info=model_info, verbose=False)
    except SelfExtendError as error:
        return f"not possible: {error}".replace(f" of {n_ctx} tokens for {path}", "")
    with closing(llm):
        if llm.self_extend is None:
            return f"not needed: {n_ctx} tokens fit the trained context"
        if llm._engine.n_layers == 0:
            return "not needed: layers with RoPE look back a window only, the others use no positions"
        return str(llm.self_extend)
