"""Model files in folders: which of them are models, which belong together, and whether they are there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TypeVar

from selfextend_gguf.errors import ModelFileError

# What a model sees images with, what it was quantised by, and what drafts for it: never the model itself.
_BESIDE_MODELS = re.compile(r"mmproj|imatrix|(mtp|eagle3|dflash|dspark)-", re.IGNORECASE)

AnyPath = TypeVar("AnyPath", bound=PurePath)


@dataclass(frozen=True)
class SplitName:
    """The name of a part of a split model: model-00001-of-00003.gguf."""

    stem: str
    number: int  # from 1
    count: int

    @classmethod
    def of(cls, path: PurePath) -> SplitName | None:
        """None if it is no such name."""
        match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name)
        return cls(match[1], int(match[2]), int(match[3])) if match else None

    def path_of(self, number: int, folder: AnyPath) -> AnyPath:
        """Where another part is expected."""
        return folder / f"{self.stem}-{number:05}-of-{self.count:05}.gguf"


def models_among(paths: Iterable[AnyPath]) -> list[AnyPath]:
    """The models of a folder, sorted: its GGUF files, of a split one the first part alone. The first part is named
    even where only later parts are there."""
    models: set[AnyPath] = set()
    for path in paths:
        if path.name.endswith(".gguf") and not _BESIDE_MODELS.search(path.name):
            name = SplitName.of(path)
            models.add(path if name is None else name.path_of(1, path.parent))
    return sorted(models)


def parts_of(path: AnyPath) -> Iterator[AnyPath]:
    """The files of a model: `path`, and the later parts if it is the first of several."""
    yield path
    name = SplitName.of(path)
    if name is not None and name.number == 1:
        for number in range(2, name.count + 1):
            yield name.path_of(number, path.parent)


def check_there(path: Path) -> None:
    """Raise ModelFileError unless there is a file, or a link that leads to one."""
    if path.is_file():
        return
    if path.is_dir():
        raise ModelFileError(f"{path} is a directory, not a file")
    if path.is_symlink():
        raise ModelFileError(f"{path} leads to {path.readlink()}, which is not there")
    raise ModelFileError(f"there is no file {path}")


def check_complete(path: Path) -> None:
    """Raise ModelFileError unless all files of the model are there."""
    name = SplitName.of(path)
    for number, part in enumerate(parts_of(path), 1):
        try:
            check_there(part)
        except ModelFileError as error:
            if name is None:
                raise
            raise ModelFileError(f"part {number} of {name.count} is missing: {error}") from error


def home() -> Path:
    """The user's home folder. Raises ModelFileError where the system knows none."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise ModelFileError("nobody knows the home folder, where models would be: set HOME") from error
