"""Ollama's store: manifests by name, which name blobs by digest."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfextend_gguf.errors import ModelFileError
from selfextend_gguf.stores.files import check_there, home

SYSTEM_STORE = Path("/usr/share/ollama/.ollama/models")  #: of the service that Ollama's installer sets up on Linux
_HOST, _USER, _TAG = "registry.ollama.ai", "library", "latest"  # where a name does not say
_MODEL_MEDIA_TYPE = "application/vnd.ollama.image.model"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]*")  # of a path: it cannot lead out of its store
_BLOB = re.compile(r"sha256-[0-9a-f]{64}")
_MOST_BYTES = 2**20  # of a manifest; usual ones have some hundred


def stores() -> list[Path]:
    """Where Ollama keeps models: OLLAMA_MODELS, or the user's folder and the service's."""
    if given := os.environ.get("OLLAMA_MODELS"):
        return [Path(given)]
    return [home() / ".ollama" / "models", SYSTEM_STORE]


def find(name: str) -> Path:
    """The blob that the manifest of [[HOST/]USER/]NAME[:TAG] names. Raises ModelFileError, OSError."""
    *before, last = name.split("/")
    if len(before) > 2 or not all(_PART.fullmatch(part) for part in (*before, last)):
        raise ModelFileError(f"{name!r} is no name of a model: expected ollama:[[HOST/]USER/]NAME[:TAG]")
    base, _, tag = last.partition(":")
    place = Path(*[_HOST, _USER][: 2 - len(before)], *before, base, tag or _TAG)
    looked = []
    for store in stores():
        manifest = store / "manifests" / place
        try:
            manifest.lstat()
        except (FileNotFoundError, NotADirectoryError):
            looked.append(f"there is no {manifest}")
        except PermissionError as error:  # the service's store is not open to everyone
            looked.append(f"{manifest} cannot be read ({error.strerror})")
        else:
            return _blob(store, manifest)
    raise ModelFileError(f"Ollama has no model {name}: {', and '.join(looked)}")


def names() -> Iterator[str]:
    """All names, as Ollama shows them, for `find`."""
    for store in stores():
        for manifest in _manifests(store):
            yield _name_of(manifest)


def name_of_blob(path: Path) -> str | None:
    """A name, for `find`, of the model that a file in a store is; None if it has none."""
    store = path.parent.parent
    if not _BLOB.fullmatch(path.name) or path.parent.name != "blobs":
        return None
    for manifest in _manifests(store):
        try:
            if _blob(store, manifest) == path:
                return _name_of(manifest)
        except (ModelFileError, OSError):
            continue
    return None


def _manifests(store: Path) -> list[Path]:
    found = (store / "manifests").glob("*/*/*/*")
    return sorted(path for path in found if all(map(_PART.fullmatch, path.parts[-4:])))


def _name_of(manifest: Path) -> str:
    host, user, base, tag = manifest.parts[-4:]
    before = [] if (host, user) == (_HOST, _USER) else [user] if host == _HOST else [host, user]
    return "/".join([*before, f"{base}:{tag}"])


def _blob(store: Path, manifest: Path) -> Path:
    """The model's file. Raises ModelFileError unless it is there."""
    blob = store / "blobs" / _digest(manifest).replace(":", "-")
    try:
        check_there(blob)
    except ModelFileError as error:
        raise ModelFileError(f"Ollama's {_name_of(manifest)} is not complete: {error}") from error
    return blob


def _digest(manifest: Path) -> str:
    """Of the model's file, as sha256:HEX."""
    check_there(manifest)
    with manifest.open("rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ModelFileError(f"{manifest} is damaged: it is too large for a manifest")
    try:
        content: Any = json.loads(text)
        digests = [layer["digest"] for layer in content["layers"] if layer["mediaType"] == _MODEL_MEDIA_TYPE]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFileError(f"{manifest} is damaged: it is no manifest of Ollama's") from error
    if not digests:
        raise ModelFileError(f"{manifest} names no model file")
    if not isinstance(digests[0], str) or not _BLOB.fullmatch(digests[0].replace(":", "-", 1)):
        raise ModelFileError(f"{manifest} is damaged: {digests[0]!r} is no digest")
    return digests[0]
