"""The models that a folder and the stores hold, and what the headers of their files say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selfextend_gguf._native import check_model
from selfextend_gguf.errors import ModelFileError, UnsupportedModelError
from selfextend_gguf.memory import weights_bytes
from selfextend_gguf.model_info import ModelHeader
from selfextend_gguf.stores import STORES, model_path, names
from selfextend_gguf.stores.files import check_complete, models_among


@dataclass(frozen=True)
class HeldModel:
    """A model that is there, or half there; what its file does not say is None."""

    name: str  #: for `model_path`
    error: str | None = None  #: why nothing else is known
    path: str | None = None
    n_bytes: int | None = None  #: of all its files
    quantisation: str | None = None
    architecture: str | None = None
    n_ctx_train: int | None = None  #: trained context, in tokens
    extendable: bool | None = None  #: as far as the header says: `examine` looks closer
    reason: str | None = None  #: why it cannot be extended


def held_models(folder: Path) -> Iterator[HeldModel]:
    """What `folder` holds, itself, and what all stores hold."""
    for path in models_among(folder.glob("*.gguf")):
        yield _look_at(path.name, path)
    for store in STORES:
        try:
            for name in names(store):
                yield _look_at(name)
        except (ModelFileError, OSError) as error:
            yield HeldModel(f"{store}:", error=str(error))


def _look_at(name: str, path: Path | None = None) -> HeldModel:
    try:
        path = path or model_path(name, offline=True)
        check_complete(path)
        with ModelHeader(path) as header:
            reason = _why_not(header)
            return HeldModel(
                name=name,
                path=str(path),
                n_bytes=weights_bytes(path),
                quantisation=header.quantisation,
                architecture=header.architecture,
                n_ctx_train=header.n_ctx_train or None,
                extendable=reason is None,
                reason=reason,
            )
    except (ModelFileError, OSError) as error:
        return HeldModel(name, error=str(error), path=None if path is None else str(path))


def _why_not(header: ModelHeader) -> str | None:
    """Why a model cannot be extended, None if it can."""
    try:
        check_model(header.model.model)
    except UnsupportedModelError as error:
        return str(error)
    if header.metadata.get(f"{header.architecture}.attention.causal") == "false":
        return "the model is not a plain decoder"
    return None if header.n_ctx_train > 0 else "its file does not say the trained context"
