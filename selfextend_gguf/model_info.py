"""What a GGUF file says about itself, read by llama.cpp without loading the weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from ctypes import Array
from pathlib import Path
from typing import Any, Literal, TypeVar

import llama_cpp
from llama_cpp._logger import logger, set_verbose

from selfextend_gguf._native import last_error, note_log_errors
from selfextend_gguf.checks import path as check_path
from selfextend_gguf.errors import ModelFileError
from selfextend_gguf.handles import Model
from selfextend_gguf.kv_cache import kv_cache_bytes
from selfextend_gguf.stores.files import SplitName
from selfextend_gguf.tokenizer import Tokenizer
from selfextend_gguf.weights import check_vectors

_MAGIC = b"GGUF"
_MOST_LAYERS = 512  # LLAMA_MAX_LAYERS
Number = TypeVar("Number", int, float)
Opened = TypeVar("Opened", bound="ModelHeader")


def check_is_gguf(path: str | Path) -> None:
    """Raise ModelFileError unless there is a file that begins as GGUF files do."""
    path = Path(path)
    if not path.exists():
        leads = f" (it leads to {path.readlink()}, which is not there)" if path.is_symlink() else ""
        raise ModelFileError(f"Model path does not exist: {path}{leads}")
    if path.is_dir():
        raise ModelFileError(f"{path} is a directory, not a GGUF file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}") from error
    if not magic:
        raise ModelFileError(f"{path} is empty")
    if magic != _MAGIC:
        raise ModelFileError(f"{path} is not a GGUF file")


def model_file_error(path: str | Path, reason: str = "") -> ModelFileError:
    """Why llama.cpp did not load `path`, as an error to raise; `reason` is what llama.cpp said of it."""
    try:
        check_is_gguf(path)
    except ModelFileError as error:
        return error
    reason = reason.removeprefix("error loading model: ") or "llama.cpp does not say why"
    return _split_error(Path(path), reason) or ModelFileError(f"Failed to load model from file: {path}: {reason}")


def _split_error(path: Path, reason: str) -> ModelFileError | None:
    """What `reason` means for a split model, None if it is about something else."""
    name = SplitName.of(path)
    if later := re.match(r"illegal split file idx: (\d+)", reason):
        number = int(later[1]) + 1
        first = "give the first" if name is None else f"give the first, {name.path_of(1, path.parent)}"
        of = "" if name is None else f" of {name.count}"
        return ModelFileError(f"{path} is part {number}{of} of a split model: {first}")
    if reason.startswith("invalid split file name"):
        return ModelFileError(
            f"{path} is the first part of a split model under another name, or all of them in one file: keep them "
            f"apart as {path.stem}-00001-of-00003.gguf and so on, or let llama-gguf-split --merge join them"
        )
    if name is not None:
        for number in range(2, name.count + 1):
            part = name.path_of(number, path.parent)
            if not part.exists():
                return ModelFileError(f"{path} is part 1 of {name.count}, and part {number} is missing: {part}")
    return None


def set_log_level(verbose: bool) -> None:
    """Show all or nothing of llama.cpp's log.

    llama-cpp-python's quiet level lets warnings through (it numbers the levels as llama.cpp used to), among them one
    about contexts beyond the trained one, which is what Self-Extend is for. Errors arrive as exceptions.
    """
    set_verbose(verbose)
    if not verbose:
        logger.setLevel(logging.CRITICAL)


def load_model(
    path: str | Path, read: Literal["header", "vocabulary", "all"] = "all", *, verbose: bool = False
) -> Model:
    """Load a model file, all of it, without its weights, or its metadata alone. Raises ModelFileError."""
    set_log_level(verbose)
    check_is_gguf(path)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = read != "all"
    params.n_gpu_layers = 0
    if read == "header":
        params.kv_overrides = _NO_VOCABULARY
    note_log_errors(True)
    try:
        return Model(path_model=str(path), params=params, verbose=verbose)
    except ValueError as error:
        raise model_file_error(path, last_error()) from error
    finally:
        note_log_errors(False)


def _no_vocabulary() -> Array[llama_cpp.llama_model_kv_override]:
    """llama.cpp's way to skip the vocabulary, which takes most of the time: an override, and the empty one it ends
    with."""
    overrides = (llama_cpp.llama_model_kv_override * 2)()
    override: Any = overrides[0]
    override.tag, override.key = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, b"tokenizer.ggml.model"
    override.value.val_str = b"no_vocab"
    return overrides


_NO_VOCABULARY = _no_vocabulary()


class ModelHeader:
    """Metadata of a GGUF file, without its vocabulary: fast. Use as a context manager or call `close`."""

    _READ: Literal["header", "vocabulary"] = "header"

    def __init__(
        self, path: str | Path, *, verbose: bool = False, kv_overrides: Mapping[str, object] | None = None
    ) -> None:
        """`kv_overrides` replace metadata, as in `Llama`. Raises ModelFileError."""
        self.path = Path(check_path("path", path))
        self.model = load_model(path, self._READ, verbose=verbose)
        overrides = {key: str(value) for key, value in (kv_overrides or {}).items()}
        try:
            self.metadata: dict[str, str] = self.model.metadata() | overrides
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{path} is damaged: its metadata is no UTF-8") from error
        self.architecture = self.metadata.get("general.architecture", "unknown")
        self._check_epsilons()
        if self.n_layers > _MOST_LAYERS:  # where llama.cpp ends the process, after some hours
            raise ModelFileError(f"{self.path} has {self.n_layers} layers; llama.cpp knows {_MOST_LAYERS} at most")

    def _check_epsilons(self) -> None:
        """llama.cpp ends the process where it first divides by the root of something negative."""
        for key in self.metadata:
            if key.endswith("epsilon") and not self._number(key, 0, float) >= 0:
                raise ModelFileError(f"{self.path} has {key} = {self.metadata[key]}, which must not be negative")

    def _number(self, key: str, default: float, kind: type[Number]) -> Number:
        """A number of the metadata. Raises ModelFileError for what is none."""
        value = self.metadata.get(key, str(default))
        try:
            return kind(value)
        except (ValueError, OverflowError):
            raise ModelFileError(f"{self.path} has {key} = {value}, which is no number of the right kind") from None

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.model.close()

    @property
    def n_ctx_train(self) -> int:
        """Trained context in tokens, 0 if the file does not say."""
        return self._number(f"{self.architecture}.context_length", 0, int)

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
        return self._number(f"{self.architecture}.rope.freq_base", 10000.0, float)

    @property
    def n_rot(self) -> int:
        """Rotated elements of a head."""
        n_embd = self._number(f"{self.architecture}.embedding_length", 0, int)
        n_head = self._number(f"{self.architecture}.attention.head_count", 1, int)
        return self._number(f"{self.architecture}.rope.dimension_count", n_embd // n_head, int)

    @property
    def quantisation(self) -> str:
        """File type as llama.cpp names it, e.g. "Q8_0"."""
        number = self.metadata.get("general.file_type")
        if number is None:
            return "unknown"
        import gguf  # takes as long as a small model to load, and only this asks for it

        try:
            return gguf.LlamaFileType(int(number)).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        except ValueError:
            return f"file type {number}"

    @property
    def has_sliding_windows(self) -> bool:
        """Whether some layers look back a window only."""
        return int(llama_cpp.llama_model_n_swa(self.model.model)) > 0

    def kv_cache_bytes(self, n_ctx: int, type_k: int, type_v: int) -> int:
        """Size of a KV cache of `n_ctx` tokens, in bytes. Raises ConfigError for a type that no cache can have."""
        return kv_cache_bytes(self.metadata, n_ctx, type_k, type_v)

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return self._number(f"{self.architecture}.block_count", 0, int)


class ModelInfo(ModelHeader):
    """Metadata and tokenizer of a GGUF file. Use as a context manager or call `close`."""

    _READ = "vocabulary"

    def __init__(
        self,
        path: str | Path,
        *,
        verbose: bool = False,
        kv_overrides: Mapping[str, object] | None = None,
        chat_template: str | None = None,
        template_variables: Mapping[str, object] | None = None,
    ) -> None:
        """`kv_overrides` replace metadata, as in `Llama`, `chat_template` the model's own, which is given
        `template_variables` with the messages. Raises ModelFileError."""
        super().__init__(path, verbose=verbose, kv_overrides=kv_overrides)
        check_vectors(self.path)
        self.tokenizer = Tokenizer(self.model)
        #: The chat template (Jinja), if there is one.
        self.chat_template = self.metadata.get("tokenizer.chat_template") if chat_template is None else chat_template
        self.template_variables = dict(template_variables or {})
        self.may_think = True  #: False: the template's own variable for that is switched off, unless it is given
