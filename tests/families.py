"""Tiny models of every family: random weights in the architectures of llama.cpp, and how each rotates its keys.

Names and shapes of the tensors are not listed here: llama.cpp itself tells which ones it creates for our metadata.
What is listed is what the models' papers and configurations say about the cached keys, so that it can be held
against what the engine reads from llama.cpp's graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from selfextend_gguf.tiny.model_file import add_byte_vocabulary

N_VOCAB = 256


# ---- rotary embeddings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): pairs that turn often within the original context keep their speed."""

    original_context: int
    ext_factor: float = 1.0
    beta_fast: float = 32.0  # turns from which a pair keeps its speed
    beta_slow: float = 1.0  # turns up to which it is slowed down by freq_scale


@dataclass(frozen=True)
class Rotary:
    """RoPE of one layer's cached keys as the model's definition says it."""

    dims: int = 32  # rotated elements of a head of the cached key
    base: float = 10000.0
    neox: bool = False  # pairs (i, i + dims/2) rather than (2i, 2i + 1)
    offset: int = 0  # first rotated element of a head
    freq_scale: float = 1.0  # linear scaling / YaRN interpolation
    factors: tuple[float, ...] | None = None  # (dims/2) frequency divisors (LongRoPE, llama3)
    yarn: Yarn | None = None

    def frequencies(self) -> np.ndarray:
        """Angle per position of each pair: float64 (dims/2)."""
        pair = np.arange(self.dims // 2)
        frequency = self.base ** (-2.0 * pair / self.dims) / (1.0 if self.factors is None else np.array(self.factors))
        if self.yarn is None:
            return frequency * self.freq_scale

        def pair_that_turns(n: float) -> float:
            wavelength = self.yarn.original_context / n
            return self.dims * np.log(wavelength / (2 * np.pi)) / (2 * np.log(self.base))

        first = max(0.0, np.floor(pair_that_turns(self.yarn.beta_fast)))
        last = min(self.dims - 1.0, np.ceil(pair_that_turns(self.yarn.beta_slow)))
        kept = self.yarn.ext_factor * (1 - np.clip((pair - first) / max(last - first, 0.001), 0, 1))
        return frequency * (self.freq_scale * (1 - kept) + kept)


def rotate(keys: np.ndarray, rotary: Rotary, delta: np.ndarray) -> np.ndarray:
    """Keys (n, n_head_kv, head size) turned by `delta` (n) positions, in float64; their length stays."""
    turned = keys.astype(np.float64)
    angle = (delta[:, None] * rotary.frequencies())[:, None, :]
    part = turned[..., rotary.offset : rotary.offset + rotary.dims]  # a view
    half = rotary.dims // 2
    x, y = (part[..., :half], part[..., half:]) if rotary.neox else (part[..., ::2], part[..., 1::2])
    x[:], y[:] = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    return turned


# ---- families ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One architecture, or one form of it."""

    name: str  # the GGUF architecture, perhaps with a form in brackets
    note: str  # what is special about its attention
    metadata: Mapping[str, object]  # keys without the "arch." prefix, except "tokenizer.*"
    # What each layer with a cache does: "R" rotates its keys and looks everywhere (to be rewritten), "N" does not
    # rotate them, "L" looks only locally (sliding window, chunks) and keeps them in a cache of its own.
    kinds: str
    rotary: Rotary  # of the "R" layers
    k_shift: bool = True  # llama.cpp's own K-shift (llama_memory_seq_add) gives the logits of moved keys
    relative: bool = True  # logits depend on distances alone: no attention temperature that grows with the position
    refused: str | None = None  # what the error message says if the family cannot be extended
    optional: tuple[str, ...] = ()  # patterns of tensors it has and others of its architecture have not
    fused_qkv: bool = False  # one matrix for queries, keys and values, where llama.cpp takes both forms
    gain: float = 1.5  # of queries and keys: attention far from uniform, so that positions matter
    tried: str = ""  # published file of this family that tests/test_real_models.py tries, and the layers rewritten

    @property
    def arch(self) -> str:
        return self.name.split(" (")[0]

    @property
    def layers(self) -> tuple[Rotary | None, ...]:
        """RoPE of each layer's cached keys; None = they must never be rewritten."""
        return tuple(self.rotary if kind == "R" else None for kind in self.kinds)

    @property
    def global_layers(self) -> tuple[Rotary | None, ...]:
        """The same for the layers in llama.cpp's first cache: all but the local ones."""
        return tuple(layer for kind, layer in zip(self.kinds, self.layers, strict=True) if kind != "L")

    @property
    def n_head_kv(self) -> int:
        return self.metadata["attention.head_count_kv"]

    @property
    def key_length(self) -> int:
        """Elements of a head of the cached key."""
        return self.metadata["attention.key_length"]


NORM = Rotary()
NEOX = Rotary(neox=True)
PARTIAL = replace(NEOX, dims=12)
STRETCHED = tuple(np.geomspace(1, 8, 16).tolist())
YARN = replace(NORM, freq_scale=0.25, yarn=Yarn(original_context=16))
TAIL = replace(NORM, dims=16, offset=24)  # the end of a key whose beginning has no position


def family(
    name: str, note: str, rotary: Rotary = NORM, *metadata: Mapping[str, object], kinds: str = "RRR", **options
) -> Family:
    """A family with what is usual here; `metadata` adds and replaces."""
    usual: dict[str, object] = {
        "vocab_size": N_VOCAB,
        "context_length": 64,
        "block_count": len(kinds),
        "embedding_length": 128,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        **heads(2),
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": rotary.dims,
        "rope.freq_base": rotary.base,
    }
    if rotary.freq_scale != 1:
        usual["rope.scaling.type"] = "yarn" if rotary.yarn else "linear"
        usual["rope.scaling.factor"] = 1 / rotary.freq_scale
    if rotary.yarn:
        usual["rope.scaling.original_context_length"] = rotary.yarn.original_context
    if "L" in kinds:
        usual["attention.sliding_window"] = 16
        usual["attention.sliding_window_pattern"] = len(kinds) - len(kinds.lstrip("L")) + 1  # one in so many is global
        options = {"k_shift": False} | options  # it moves the keys of local layers too, out of their window
    for more in metadata:
        usual |= more
    return Family(name, note, usual, kinds, rotary, **options)


def refused(name: str, note: str, why: str, *metadata: Mapping[str, object], **options) -> Family:
    return family(name, note, NORM, *metadata, refused=why, **({"kinds": "NN", "k_shift": False} | options))


def heads(n_head_kv: int, size: int = 32) -> dict[str, object]:
    return {
        "attention.head_count_kv": n_head_kv,
        "attention.key_length": size,
        "attention.value_length": size,
    }


EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 48}
SHARED_EXPERT = EXPERTS | {"expert_shared_count": 1, "expert_shared_feed_forward_length": 48}
COMPRESSED = {
    "attention.q_lora_rank": 48,
    "attention.kv_lora_rank": 32,
    "attention.head_count_kv": 4,
    "attention.key_length": 40,
    "attention.value_length": 24,
}
MLA = {
    "attention.kv_lora_rank": 96,
    "attention.head_count_kv": 1,
    "attention.key_length": 128,
    "attention.value_length": 96,
    "attention.key_length_mla": 56,
    "attention.value_length_mla": 24,
}
GRANITE = {"logit_scale": 0.5, "residual_scale": 0.5, "embedding_scale": 12.0, "attention.scale": 0.25}
LOCAL_BASE = {"rope.freq_base_swa": 10000.0}
MAMBA = {"ssm.conv_kernel": 4, "ssm.inner_size": 256, "ssm.state_size": 16, "ssm.time_step_rank": 8}
RWKV = {
    "attention.head_count": 0,
    "wkv.head_size": 32,
    "attention.decay_lora_rank": 16,
    "attention.iclr_lora_rank": 16,
    "attention.value_residual_mix_lora_rank": 16,
    "attention.gate_lora_rank": 16,
}


# Patterns for `optional`.
BIAS = ("*.bias",)
QKV_BIAS = ("*.attn_[qkv].bias",)
NORM_BIAS = ("*norm*.bias",)
FACTORS = ("rope_f*",)

EXTENDED = (
    family("llama", "neighbouring pairs", tried="SmolLM2-135M-Instruct.Q4_1: 30 of 30"),
    family("llama (Llama 3)", "frequency factors", replace(NORM, base=5e5, factors=STRETCHED), optional=FACTORS),
    family("llama (linear scaling)", "positions divided by 4", replace(NORM, freq_scale=0.25)),
    family("llama (YaRN)", "keys longer by YaRN's magnitude", replace(YARN, base=50.0), k_shift=False),
    family("mistral3", "neighbouring pairs", replace(NORM, base=1e6)),
    family(
        "mistral3 (YaRN)",
        "magnitude 1, attention temperature",
        replace(YARN, base=1e6),
        {"rope.scaling.yarn_log_multiplier": 1.0, "attention.temperature_scale": 0.1},
        k_shift=False,
        relative=False,
    ),
    family("qwen2", "halves, biases", replace(NEOX, base=1e6), optional=QKV_BIAS),
    family("qwen2moe", "biases, experts", replace(NEOX, base=1e6), SHARED_EXPERT, optional=QKV_BIAS),
    family("qwen3", "norms on q and k, wide heads", replace(NEOX, dims=64, base=1e6), heads(2, 64)),
    family("qwen3moe", "norms on q and k, experts", replace(NEOX, base=1e6), EXPERTS),
    family("phi2", "partial rotary, fused q, k, v", PARTIAL, heads(4), optional=BIAS, fused_qkv=True),
    family("phi3", "fused q, k, v", NEOX, fused_qkv=True),
    family(
        "phi3 (LongRoPE)",
        "long factors, keys longer by a magnitude",
        replace(NEOX, factors=STRETCHED),
        {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.19},
        optional=FACTORS,
        fused_qkv=True,
        k_shift=False,
    ),
    family("gemma", "one wide head of keys", replace(NEOX, dims=64), heads(1, 64)),
    family("gemma2", "local layers, capped scores", NEOX, kinds="LRLR"),
    family(
        "gemma3",
        "local layers with another base and scale",
        replace(NEOX, base=1e6, freq_scale=0.125),
        LOCAL_BASE,
        kinds="LLLLLR",
        tried="gemma-3-270m-q4_k_m: 3 of 18",
    ),
    family(
        "gemma3n",
        "local layers, the last five share keys",
        replace(NEOX, base=1e6),
        LOCAL_BASE,
        heads(1),
        {"block_count": 25, "embedding_length": 64, "attention.head_count": 2},
        kinds="LLLLR" * 4,
        gain=0.65,  # its scores are not divided by the root of the head size
    ),
    family(
        "gpt-oss",
        "local layers, YaRN, attention sinks",
        replace(YARN, base=150000.0, neox=True),
        EXPERTS,
        kinds="LRLR",
        optional=BIAS,
    ),
    family("stablelm", "partial rotary, norms on q and k", PARTIAL, optional=NORM_BIAS),
    family(
        "gptneox",
        "partial rotary, fused q, k, v",
        PARTIAL,
        heads(4),
        {"use_parallel_residual": True},
        optional=BIAS,
    ),
    family("falcon", "one head of keys", NEOX, heads(1), optional=NORM_BIAS),
    family("olmo", "clamped q, k, v", NORM, {"attention.clamp_kqv": 2.0}),
    family("olmo2", "norms across heads", replace(NEOX, base=5e5)),
    family("olmo2 (Olmo 3)", "YaRN in global layers only", replace(YARN, neox=True, base=5e5), kinds="LLLR"),
    family("olmoe", "norms across heads, experts", NEOX, heads(4), EXPERTS),
    family("granite", "scaled scores", NORM, GRANITE),
    family("granitemoe", "scaled scores, experts", NORM, GRANITE, EXPERTS),
    family("smollm3", "every fourth layer without RoPE", replace(NORM, base=2e6), kinds="RRRN", k_shift=False),
    family("cohere2", "RoPE in local layers only", NORM, {"logit_scale": 2.0}, kinds="LLLN"),
    family("command-r", "attention beside the feed-forward layer", NORM, {"logit_scale": 2.0}),
    family(
        "llama4",
        "RoPE in chunked layers only, attention temperature",
        NORM,
        EXPERTS | {"expert_used_count": 1, "interleave_moe_layer_step": 1},
        kinds="LLLN",
    ),
    family("deepseek2", "keys of two parts", TAIL, COMPRESSED, SHARED_EXPERT, {"leading_dense_block_count": 1}),
    family(
        "deepseek2 (MLA)",
        "one compressed key, YaRN of magnitude 1",
        replace(YARN, offset=96),
        COMPRESSED,
        MLA,
        SHARED_EXPERT,
        {"leading_dense_block_count": 1, "rope.scaling.yarn_log_multiplier": 0.1},
    ),
    family(
        "minicpm3",
        "keys of two parts, LongRoPE",
        replace(TAIL, neox=True, factors=STRETCHED[::2]),
        COMPRESSED,
        optional=FACTORS,
    ),
    family("plm", "keys of two parts", TAIL, COMPRESSED),
    family("minicpm", "scaled embeddings"),
    family("internlm2", "neighbouring pairs", replace(NORM, base=1e6)),
    family("starcoder2", "biases", NEOX, optional=BIAS),
    family("codeshell", "fused q, k, v", NEOX, optional=BIAS, fused_qkv=True),
    family("exaone", "halves", NEOX),
    # Of its small models llama.cpp reads the window, and does not use it.
    family("exaone4", "norms on q and k", replace(NEOX, base=1e6), {"attention.sliding_window": 16}),
    family("glm4", "partial rotary, neighbouring pairs", replace(NORM, dims=16), optional=QKV_BIAS),
    family("nemotron", "partial rotary", replace(NEOX, dims=16), optional=NORM_BIAS),
    family("dbrx", "clamped q, k, v, experts", NEOX, EXPERTS, {"attention.clamp_kqv": 2.0}),
    family("orion", "halves", NEOX, optional=NORM_BIAS),
    family("baichuan", "7B, known by its 32 layers", NORM, heads(4), kinds="R" * 32),
    family("ernie4_5", "neighbouring pairs", replace(NORM, base=5e5)),
    family("arcee", "neighbouring pairs"),
    family("seed_oss", "biases", replace(NEOX, base=1e7), optional=QKV_BIAS),
)
REFUSED = (
    refused("hunyuan-dense", "norms on q and k after RoPE", "rotated keys"),
    refused("granite (NoPE)", "RoPE turned off", "rotated keys", GRANITE, {"rope.scaling.finetuned": False}),
    refused("baichuan (13B)", "ALiBi, known by its 40 layers", "rotated keys", heads(4), kinds="N" * 40),
    refused("bloom", "ALiBi", "no rotary", optional=BIAS),
    refused("gpt2", "learned positions", "no rotary", optional=BIAS),
    refused("mpt", "ALiBi", "no rotary", {"attention.max_alibi_bias": 8.0}),
    refused("mamba", "a state", "recurrent", MAMBA, optional=BIAS),
    refused("rwkv7", "a state", "recurrent", RWKV, optional=BIAS),
    refused("jamba", "a state in one layer", "recurrent", MAMBA, {"attention.head_count_kv": (0, 2)}, optional=BIAS),
    refused("t5", "encoder", "not a plain decoder", heads(4), {"attention.relative_buckets_count": 8}),
    refused("dream", "diffusion", "not a plain decoder", optional=QKV_BIAS),
    refused(
        "bert",
        "learned positions, no cache",
        "not a plain decoder",
        {"tokenizer.ggml.token_type_count": 2},
        optional=BIAS,
    ),
    refused("qwen2vl", "three positions", "M-RoPE", {"rope.dimension_sections": (4, 6, 6, 0)}, optional=QKV_BIAS),
    refused("glm4 (V)", "three positions", "M-RoPE", {"rope.dimension_sections": (4, 6, 6, 0)}),
)
FAMILIES: dict[str, Family] = {family.name: family for family in EXTENDED + REFUSED}


# ---- files ---------------------------------------------------------------------------------------------------------

# Tensors that llama.cpp offers to load and most models do without.
OPTIONAL = ("*.bias", "*.scale", "*.scales", "*.input_scale", "rope_f*")


class _TensorHead(ctypes.Structure):
    """The beginning of ggml.h's struct ggml_tensor."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4)]


class _GgufInitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def _tensor_shapes(metadata_file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes (numpy's order) of all tensors llama.cpp creates for a file without tensors.
    A mistake in the metadata may abort the process."""
    lib = llama_cpp.llama_cpp._lib
    set_tensor_data = ctypes.CFUNCTYPE(None, ctypes.POINTER(_TensorHead), ctypes.c_void_p)
    # struct gguf_context * gguf_init_from_file(const char * fname, struct gguf_init_params params);
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _GgufInitParams]
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    # void gguf_free(struct gguf_context * ctx);
    lib.gguf_free.argtypes = [ctypes.c_void_p]
    lib.gguf_free.restype = None
    # const char * ggml_get_name(const struct ggml_tensor * tensor);
    lib.ggml_get_name.argtypes = [ctypes.POINTER(_TensorHead)]
    lib.ggml_get_name.restype = ctypes.c_char_p
    # int ggml_n_dims(const struct ggml_tensor * tensor);
    lib.ggml_n_dims.argtypes = [ctypes.POINTER(_TensorHead)]
    lib.ggml_n_dims.restype = ctypes.c_int
    # struct llama_model * llama_model_init_from_user(struct gguf_context * metadata,
    #     llama_model_set_tensor_data_t set_tensor_data, void * set_tensor_data_ud, struct llama_model_params params);
    lib.llama_model_init_from_user.argtypes = [
        ctypes.c_void_p,
        set_tensor_data,
        ctypes.c_void_p,
        llama_cpp.llama_model_params,
    ]
    lib.llama_model_init_from_user.restype = ctypes.c_void_p

    shapes: dict[str, tuple[int, ...]] = {}

    @set_tensor_data
    def remember(tensor, _):
        shapes[lib.ggml_get_name(tensor).decode()] = tuple(tensor.contents.ne[: lib.ggml_n_dims(tensor)])[::-1]

    metadata = lib.gguf_init_from_file(str(metadata_file).encode(), _GgufInitParams(no_alloc=True))
    model = lib.llama_model_init_from_user(metadata, remember, None, llama_cpp.llama_model_default_params())
    lib.gguf_free(metadata)
    if not model:
        raise ValueError(f"llama.cpp makes no model of {metadata_file}")
    llama_cpp.llama_model_free(model)
    return shapes


def _fuse_qkv(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """One tensor for q, k and v, stacked along their outputs."""
    fused = {}
    for name, shape in shapes.items():
        parts = [name.replace(".attn_q.", f".attn_{x}.") for x in "qkv"]
        if parts[0] != parts[1]:
            shape = (sum(shapes[part][0] for part in parts), *shape[1:])
        if not fnmatch(name, "*.attn_[kv].*"):
            fused[name.replace(".attn_q.", ".attn_qkv.")] = shape
    return fused


def _random_tensor(family: Family, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Weights that leave activations of order 1."""
    if fnmatch(name, "rope_f*"):
        return np.ones(shape) if "short" in name else np.array(family.rotary.factors)
    noise = rng.standard_normal(shape)
    gain = family.gain if fnmatch(name, "*.attn_[qk]*.weight") else 1.0
    # Feed-forward parts whisper: llama.cpp reads GELU from a table of f16, whose steps would drown what is compared.
    if any(fnmatch(name, f"*.{part}*.weight") for part in ("ffn_down", "post_ffw_norm", "post_norm", "proj")):
        gain *= 0.03
    if fnmatch(name, "*norm*.weight"):
        return gain + 0.1 * noise
    if name.endswith(".bias"):
        return 0.3 * noise
    return noise * gain / shape[-1] ** 0.5


def _write(path: Path, family: Family, tensors: Mapping[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(str(path), family.arch)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in family.metadata.items():
        key = key if key.startswith("tokenizer.") else f"{family.arch}.{key}"
        add.get(type(value), writer.add_array)(key, value)
    add_byte_vocabulary(writer, N_VOCAB)
    for name, array in tensors.items():
        writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_header(family: Family, path: Path) -> None:
    """Write a model of `family` without weights."""
    _write(path, family, {})


def write_family(family: Family, path: Path, seed: int = 0) -> None:
    """Write a model of `family` with random F32 weights and a vocabulary of bytes."""
    write_header(family, path)
    shapes = {
        name: shape
        for name, shape in _tensor_shapes(path).items()
        if not any(fnmatch(name, p) for p in OPTIONAL) or any(fnmatch(name, p) for p in family.optional)
    }
    if family.fused_qkv:
        shapes = _fuse_qkv(shapes)
    rng = np.random.default_rng(seed)
    _write(path, family, {name: _random_tensor(family, name, shape, rng) for name, shape in shapes.items()})
