"""Models by name: where the stores of other programs keep the file that a name means."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from selfextend_gguf.errors import ModelFileError

_MODEL_MEDIA_TYPE = "application/vnd.ollama.image.model"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]*")  # of a path: it cannot lead out of its store


def model_path(model: str | Path) -> Path:
    """Path of the file that `model` means: a path, `ollama:NAME[:TAG]`, or `lmstudio:PUBLISHER/MODEL[/FILE]`.

    A name that exists as a path is a path. A path is returned as it is, whether or not there is a file.
    Raises ModelFileError if a store does not hold the model, or cannot be read."""
    store, colon, name = str(model).partition(":")
    if not colon or store not in ("ollama", "lmstudio"):
        return Path(model)
    try:
        if Path(model).exists():
            return Path(model)
        return _ollama(name) if store == "ollama" else _lm_studio(name)
    except OSError as error:
        raise ModelFileError(f"{model}: cannot read {error.filename}: {error.strerror}") from error


def _parts(name: str, expected: str) -> list[str]:
    """What stands between the slashes of `name`."""
    parts = name.split("/")
    if not all(_PART.fullmatch(part) for part in parts):
        raise ModelFileError(f"{name!r} is no name of a model: expected {expected}")
    return parts


def _ollama(name: str) -> Path:
    """The blob that the manifest of [[HOST/]USER/]NAME[:TAG] names."""
    expected = "ollama:[[HOST/]USER/]NAME[:TAG]"
    *before, last = _parts(name, expected)
    if len(before) > 2:
        raise ModelFileError(f"{name!r} is no name of a model: expected {expected}")
    host, user = ["registry.ollama.ai", "library"][: 2 - len(before)] + before
    base, _, tag = last.partition(":")
    store = Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")
    manifest = store / "manifests" / host / user / base / (tag or "latest")
    if not manifest.is_file():
        raise ModelFileError(f"Ollama has no model {name}: there is no {manifest}")
    blob = store / "blobs" / _digest(manifest).replace(":", "-")
    if not blob.is_file():
        raise ModelFileError(f"Ollama's {name} is not complete: there is no {blob}")
    return blob


def _digest(manifest: Path) -> str:
    """Of the model's file, as sha256:HEX."""
    try:
        content: Any = json.loads(manifest.read_bytes())
        digests = [layer["digest"] for layer in content["layers"] if layer["mediaType"] == _MODEL_MEDIA_TYPE]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFileError(f"{manifest} is damaged: it is no manifest of Ollama's") from error
    if not digests:
        raise ModelFileError(f"{manifest} names no model file")
    if not isinstance(digests[0], str) or not re.fullmatch(r"sha256:[0-9a-f]{64}", digests[0]):
        raise ModelFileError(f"{manifest} is damaged: {digests[0]!r} is no digest")
    return digests[0]


def _lm_studio(name: str) -> Path:
    """The file of PUBLISHER/MODEL[/FILE]; without FILE, the only one, or the first part of the only split one."""
    parts = _parts(name, expected := "lmstudio:PUBLISHER/MODEL[/FILE]")
    if len(parts) not in (2, 3):
        raise ModelFileError(f"{name!r} is no name of a model: expected {expected}")
    stores = [Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models"]
    folder = next((store.joinpath(*parts[:2]) for store in stores if store.joinpath(*parts[:2]).is_dir()), None)
    if folder is None:
        raise ModelFileError(f"LM Studio has no model {name} in {' or '.join(map(str, stores))}")
    later_part = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
    files = [
        f for f in sorted(file.name for file in folder.iterdir()) if f.endswith(".gguf") and not later_part.search(f)
    ]
    files = [f for f in files if not f.startswith("mmproj")]  # what a model sees images with
    wanted = parts[2:] or files
    if len(wanted) != 1:
        there = f"say which: {', '.join(files)}" if files else "no .gguf file"
        raise ModelFileError(f"{folder} holds {there}")
    if not (folder / wanted[0]).is_file():
        raise ModelFileError(f"there is no file {folder / wanted[0]}; there: {', '.join(files) or 'none'}")
    return folder / wanted[0]
