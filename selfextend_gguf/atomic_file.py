"""Files that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_ABANDONED = 60  # seconds


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A temporary file beside `path`, and its name; it takes the place of `path` when all went well.

    Raises OSError that names `path`; an older file stays as it is then.
    """
    prefix = f".{path.name}."
    remove_abandoned(path.parent, prefix)
    try:
        descriptor, name_string = tempfile.mkstemp(".tmp", prefix, path.parent)
        name = Path(name_string)
        try:
            with os.fdopen(descriptor, "w+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until closed: somebody is writing it
                yield file, name
                file.flush()
                os.fsync(file.fileno())
                name.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                name.unlink()
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # not the temporary file's name
    _sync_folder(path.parent)


def remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove temporary files of writers that were killed; `prefix` is `.NAME.`, where NAME may hold wildcards."""
    for name in folder.glob(f"{prefix}*.tmp"):
        with contextlib.suppress(OSError), name.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while a writer lives
            if time.time() - name.stat().st_mtime > _ABANDONED:  # or it may be about to lock it
                name.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename last beyond a power failure; not every file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
