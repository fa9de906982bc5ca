"""LM Studio's store: a folder for each publisher, in it one for each model, in it the files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from selfextend_gguf.errors import ModelFileError
from selfextend_gguf.stores.files import check_complete, home, models_among


def stores() -> list[Path]:
    """Where LM Studio keeps models: where its settings say, and where newer and older versions do by default."""
    homes = [home() / ".lmstudio", home() / ".cache" / "lm-studio"]
    if moved := _read(home() / ".lmstudio-home-pointer").strip():
        homes.insert(0, Path(moved))
    found = []
    for folder in homes:
        try:
            chosen = json.loads(_read(folder / "settings.json"))["downloadsFolder"]
        except (ValueError, KeyError, TypeError, RecursionError):
            chosen = None
        found += [Path(chosen)] if isinstance(chosen, str) and chosen else []
        found.append(folder / "models")
    return list(dict.fromkeys(found))


def _read(path: Path) -> str:
    """A file of LM Studio's own, "" if there is none: its folders may still be where they are by default."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(2**20)
    except (OSError, ValueError):
        return ""


def find(name: str) -> Path:
    """The file of PUBLISHER/MODEL[/FILE]; without FILE, the only one, or the first part of the only split one.
    Raises ModelFileError, OSError."""
    parts = name.split("/")
    if len(parts) not in (2, 3) or any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ModelFileError(f"{name!r} is no name of a model: expected lmstudio:PUBLISHER/MODEL[/FILE]")
    publisher, model, *file = parts
    folder = next((folder for store in stores() if (folder := store / publisher / model).is_dir()), None)
    if folder is None:
        raise ModelFileError(f"LM Studio has no model {name} in {' or '.join(map(str, stores()))}")
    there = [path.name for path in models_among(folder.iterdir())]
    wanted = file or there
    if len(wanted) != 1:
        held = f"several models, say which: {', '.join(there)}" if there else "no .gguf file"
        raise ModelFileError(f"{folder} holds {held}")
    path = folder / wanted[0]
    if file and not path.is_symlink() and not path.exists():
        raise ModelFileError(f"there is no file {path}; there: {', '.join(there) or 'none'}")
    check_complete(path)
    return path


def names() -> Iterator[str]:
    """All names, for `find`: PUBLISHER/MODEL, with FILE where there are several."""
    for store in stores():
        for folder in sorted(store.glob("*/*/")):
            paths = models_among(folder.glob("*.gguf"))
            for path in paths:
                yield "/".join([*folder.relative_to(store).parts, *([path.name] if len(paths) > 1 else [])])
