"""What a GGUF file says about itself, read by llama.cpp without loading the weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import gguf
import llama_cpp
import llama_cpp._internals as internals
from llama_cpp._logger import logger, set_verbose

from selfextend_gguf._native import last_error, note_log_errors
from selfextend_gguf.errors import ModelFileError
from selfextend_gguf.kv_cache import kv_cache_bytes
from selfextend_gguf.tokenizer import Tokenizer

_MAGIC = b"GGUF"


def model_file_error(path: str | Path, reason: str = "") -> ModelFileError:
    """Why llama.cpp did not load `path`, as an error to raise; `reason` is what llama.cpp said of it."""
    path = Path(path)
    if not path.exists():
        return ModelFileError(f"Model path does not exist: {path}")
    if path.is_dir():
        return ModelFileError(f"{path} is a directory, not a GGUF file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        return ModelFileError(f"cannot read {path}: {error.strerror}")
    if not magic:
        return ModelFileError(f"{path} is empty")
    if magic != _MAGIC:
        return ModelFileError(f"{path} is not a GGUF file")
    reason = reason.removeprefix("error loading model: ") or "llama.cpp does not say why"
    return ModelFileError(f"Failed to load model from file: {path}: {reason}")


def set_log_level(verbose: bool) -> None:
    """Show all or nothing of llama.cpp's log.

    llama-cpp-python's quiet level lets warnings through (it numbers the levels as llama.cpp used to), among them one
    about contexts beyond the trained one, which is what Self-Extend is for. Errors arrive as exceptions.
    """
    set_verbose(verbose)
    if not verbose:
        logger.setLevel(logging.CRITICAL)


def load_model(path: str | Path, *, vocab_only: bool, verbose: bool = False) -> internals.LlamaModel:
    """Load a model file, or its vocabulary and metadata alone. Raises ModelFileError."""
    set_log_level(verbose)
    if not Path(path).is_file():
        raise model_file_error(path)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = 0
    note_log_errors(True)
    try:
        return internals.LlamaModel(path_model=str(path), params=params, verbose=verbose)
    except ValueError as error:
        raise model_file_error(path, last_error()) from error
    finally:
        note_log_errors(False)


class ModelInfo:
    """Metadata and tokenizer of a GGUF file. Use as a context manager or call `close`."""

    def __init__(
        self, path: str | Path, *, verbose: bool = False, kv_overrides: Mapping[str, object] | None = None
    ) -> None:
        """`kv_overrides` replace metadata, as in `Llama`. Raises ModelFileError."""
        self.path = Path(path)
        self.model = load_model(path, vocab_only=True, verbose=verbose)
        self.tokenizer = Tokenizer(self.model)
        overrides = {key: str(value) for key, value in (kv_overrides or {}).items()}
        self.metadata: dict[str, str] = self.model.metadata() | overrides
        self.architecture = self.metadata.get("general.architecture", "unknown")

    def __enter__(self) -> ModelInfo:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.model.close()

    @property
    def n_ctx_train(self) -> int:
        """Trained context in tokens, 0 if the file does not say."""
        return int(self.metadata.get(f"{self.architecture}.context_length", 0))

    @property
    def rope(self) -> str:
        """Kind of RoPE, with its base and scaling."""
        names = {
            -1: "none",
            0: "norm",
            2: "neox",
            8: "multi-dimensional",
            24: "vision",
            40: "interleaved multi-dimensional",
        }
        kind = int(llama_cpp.llama_model_rope_type(self.model.model))
        if kind == -1:
            return "none"
        scaling = self.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        suffix = "" if scaling == "none" else f", {scaling} scaling"
        return f"{names.get(kind, str(kind))}, base {self.rope_base:g}{suffix}"

    @property
    def rope_base(self) -> float:
        """Base of the RoPE frequencies."""
        return float(self.metadata.get(f"{self.architecture}.rope.freq_base", 10000.0))

    @property
    def n_rot(self) -> int:
        """Rotated elements of a head."""
        n_embd = int(self.metadata.get(f"{self.architecture}.embedding_length", 0))
        n_head = int(self.metadata.get(f"{self.architecture}.attention.head_count", 1))
        return int(self.metadata.get(f"{self.architecture}.rope.dimension_count", n_embd // n_head))

    @property
    def quantisation(self) -> str:
        """File type as llama.cpp names it, e.g. "Q8_0"."""
        number = self.metadata.get("general.file_type")
        if number is None:
            return "unknown"
        try:
            return gguf.LlamaFileType(int(number)).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        except ValueError:
            return f"file type {number}"

    @property
    def has_sliding_windows(self) -> bool:
        """Whether some layers look back a window only."""
        return int(llama_cpp.llama_model_n_swa(self.model.model)) > 0

    @property
    def chat_template(self) -> str | None:
        """The model's chat template (Jinja), if it has one."""
        return self.metadata.get("tokenizer.chat_template")

    def kv_cache_bytes(self, n_ctx: int, type_k: int, type_v: int) -> int:
        """Size of a KV cache of `n_ctx` tokens, in bytes."""
        return kv_cache_bytes(self.metadata, n_ctx, type_k, type_v)

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return int(self.metadata.get(f"{self.architecture}.block_count", 0))
