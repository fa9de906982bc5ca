"""Models by name: where the stores of other programs keep the file that a name means."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from selfextend_gguf.errors import ModelFileError
from selfextend_gguf.stores import hugging_face, lm_studio, ollama

STORES = {"hf": hugging_face, "ollama": ollama, "lmstudio": lm_studio}  #: by what stands before the colon of a name


def is_name(model: str | os.PathLike[str]) -> bool:
    """Whether `model` is a name in a store: it begins like one, and there is no such path."""
    store, colon, _ = os.fspath(model).partition(":")
    return bool(colon) and store in STORES and not os.path.lexists(model)


def name_of(path: Path) -> str:
    """What to call a model file: its name, or that of the model where Ollama calls the file by its digest."""
    name = ollama.name_of_blob(path)
    return path.name if name is None else f"ollama:{name}"


def model_path(model: str | os.PathLike[str], *, offline: bool = False) -> Path:
    """Path of the file that `model` means: a path, `hf:USER/REPO[:QUANT]`, `hf:USER/REPO/FILE`, `ollama:NAME[:TAG]`,
    or `lmstudio:PUBLISHER/MODEL[/FILE]`.

    A name that exists as a path is a path. A path is returned as it is, whether or not there is a file. What Hugging
    Face's cache does not hold is downloaded, unless `offline`.
    Raises ModelFileError if there is no such model, or it cannot be read."""
    try:
        if not is_name(model):
            return Path(model)
        store, _, name = os.fspath(model).partition(":")
        if store == "hf":
            return hugging_face.find(name, offline=offline)
        return ollama.find(name) if store == "ollama" else lm_studio.find(name)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise ModelFileError(f"{model}: cannot use{where}: {error.strerror or error}") from error


def names(store: str) -> Iterator[str]:
    """All that one of STORES holds, for `model_path`. Raises ModelFileError, OSError."""
    for name in dict.fromkeys(STORES[store].names()):
        yield f"{store}:{name}"
