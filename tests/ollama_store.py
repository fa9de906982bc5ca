"""A store of models laid out like Ollama's."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from selfextend_gguf.models import TINY_MODEL

MODEL = "application/vnd.ollama.image.model"


def write_manifest(store: Path, name: str, content: Any) -> Path:
    """`content` as text, or to be made JSON; `name` is HOST/USER/NAME/TAG."""
    path = store / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def write_ollama(store: Path, name: str, model: Path = TINY_MODEL) -> Path:
    """A model as `ollama pull` leaves it; the path of its blob."""
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    template = {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64, "size": 1}
    weights = {"mediaType": MODEL, "digest": f"sha256:{digest}", "size": model.stat().st_size}
    write_manifest(store, name, {"schemaVersion": 2, "layers": [template, weights]})
    blob = store / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir(exist_ok=True)
    shutil.copy(model, blob)
    return blob
