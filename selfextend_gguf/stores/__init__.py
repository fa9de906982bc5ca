"""Models by name: where the stores of other programs keep the file that a name means."""

from __future__ import annotations

import os
from pathlib import Path

from selfextend_gguf.errors import ModelFileError
from selfextend_gguf.stores import lm_studio, ollama

STORES = {"ollama": ollama, "lmstudio": lm_studio}  #: by what stands before the colon


def is_name(model: str | os.PathLike[str]) -> bool:
    """Whether `model` is a name in a store: it begins like one, and there is no such path."""
    store, colon, _ = os.fspath(model).partition(":")
    return bool(colon) and store in STORES and not os.path.lexists(model)


def name_of(path: Path) -> str:
    """What to call a model file: its name, or that of the model where Ollama calls the file by its digest."""
    name = ollama.name_of_blob(path)
    return path.name if name is None else f"ollama:{name}"


def model_path(model: str | os.PathLike[str]) -> Path:
    """Path of the file that `model` means: a path, `ollama:NAME[:TAG]`, or `lmstudio:PUBLISHER/MODEL[/FILE]`.

    A name that exists as a path is a path. A path is returned as it is, whether or not there is a file.
    Raises ModelFileError if a store does not hold the model, or cannot be read."""
    try:
        if not is_name(model):
            return Path(model)
        store, _, name = os.fspath(model).partition(":")
        return STORES[store].find(name)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise ModelFileError(f"{model}: cannot use{where}: {error.strerror or error}") from error
