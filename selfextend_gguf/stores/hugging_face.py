"""Hugging Face's cache: which file of a repository a name means, there and on the server.

The cache is huggingface_hub's own, so that whatever uses that library finds what is here and the other way round:

    models--USER--REPO/blobs/DIGEST                  a file, by the digest of its content
    models--USER--REPO/refs/main                     the commit that the main branch was at
    models--USER--REPO/snapshots/COMMIT/NAME.gguf    a link to the blob
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from selfextend_gguf.errors import ModelFileError, NotReachedError, NotReachedWarning
from selfextend_gguf.stores.download import fetch, list_files
from selfextend_gguf.stores.files import check_complete, home, models_among

_REPO = r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*"
_NAME = re.compile(rf"(?P<repo>{_REPO})(?::(?P<quant>[^/:]+)|/(?P<file>.+\.gguf))?")
_PREFERRED = ("Q4_K_M", "Q8_0")  #: where a name does not say, as llama.cpp prefers them; else the first file
_YES = ("1", "ON", "YES", "TRUE")


def is_offline() -> bool:
    """Whether Hugging Face's variables say that nothing may be asked for."""
    return (os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "").upper() in _YES


def cache_folder() -> Path:
    """Where Hugging Face's library keeps models. Raises ModelFileError where there is no home folder."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if given := os.environ.get(name):
            return _expanded(given)
    if given := os.environ.get("HF_HOME"):
        return _expanded(given) / "hub"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (_expanded(cache) if cache else home() / ".cache") / "huggingface" / "hub"


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(path)))  # noqa: PTH111 (Path's raises where there is no home)


def find(name: str, *, offline: bool = False) -> Path:
    """The file of USER/REPO[:QUANT] or USER/REPO/FILE, downloaded if need be; of a split model the first part, with
    all others beside it. Offline, or where the server is not reached, what the cache holds.

    Raises ModelFileError, OSError."""
    repo, wanted = _parse(name)
    if offline or is_offline():
        return _cached(repo, wanted, "nothing is downloaded offline")
    try:
        files = list_files(repo)
    except NotReachedError as error:
        path = _cached(repo, wanted, str(error))
        warnings.warn(NotReachedWarning(f"{error}: the model is taken from the cache"), stacklevel=2)
        return path
    chosen = choose([file.name for file in files], wanted, repo)
    path = fetch(repo, chosen, files, cache_folder())
    check_complete(path)
    return path


def names() -> Iterator[str]:
    """All names in the cache, for `find`: USER/REPO:QUANT, or USER/REPO/FILE where that would mean another file."""
    for folder in sorted(cache_folder().glob("models--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/")
        if not re.fullmatch(_REPO, repo):
            continue
        for files in map(_files, _snapshots(folder)):
            for file in map(str, models_among(map(PurePosixPath, files))):
                quant = _quant_of(file)
                is_clear = quant is not None and choose(files, quant, repo) == file
                yield f"{repo}:{quant}" if is_clear else f"{repo}/{file}"


def choose(files: Sequence[str], wanted: str, repo: str) -> str:
    """Which of a repository's files is meant: by its name, its quantisation, or "" = the preferred one; of a split
    model the first part. Raises ModelFileError."""
    models = [str(path) for path in models_among(map(PurePosixPath, files))]
    if wanted in models:
        return wanted
    for quant in [wanted] if wanted else _PREFERRED:
        pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quant)}[./-]", re.IGNORECASE)
        if found := [model for model in models if pattern.search(model)]:
            return found[0]
    if not models:
        raise ModelFileError(f"{repo} holds no .gguf model")
    if wanted:
        there = ", ".join(dict.fromkeys(_quant_of(model) or model for model in models))
        raise ModelFileError(f"{repo} has no {wanted}; it has {there}")
    return models[0]


def _quant_of(file: str) -> str | None:
    """The quantisation that a file's name says, None if it says none."""
    found = re.findall(r"(?<![A-Za-z0-9])(?:I?Q\d\w*|TQ\d\w*|BF16|F16|F32|MXFP4\w*)(?=[.-])", file, re.IGNORECASE)
    return found[-1] if found else None


def _parse(name: str) -> tuple[str, str]:
    """USER/REPO, and what of it is wanted: QUANT, FILE or ""."""
    parts = _NAME.fullmatch(name)
    file = parts["file"] if parts else None
    if not parts or (file and (".." in file.split("/") or "\0" in file)):
        raise ModelFileError(f"{name!r} is no name of a model: expected hf:USER/REPO[:QUANT] or hf:USER/REPO/FILE.gguf")
    return parts["repo"], file or parts["quant"] or ""


def _snapshots(folder: Path) -> Iterator[Path]:
    """Of a repository in the cache: that of the main branch, then the others, newest first."""
    snapshots = folder / "snapshots"
    try:
        main = (folder / "refs" / "main").read_text("ascii").strip()
    except (OSError, ValueError):
        main = ""
    others = sorted(snapshots.glob("*/"), key=lambda path: path.stat().st_mtime, reverse=True)
    yield from sorted(others, key=lambda path: path.name != main)


def _files(snapshot: Path) -> list[str]:
    return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.glob("**/*.gguf"))


def _cached(repo: str, wanted: str, reason: str) -> Path:
    """What the cache holds. Raises ModelFileError, with the `reason` why only that counts."""
    error = ModelFileError(f"Hugging Face's cache {cache_folder()} holds no GGUF file of {repo}, and {reason}")
    for snapshot in _snapshots(cache_folder() / f"models--{repo.replace('/', '--')}"):
        try:
            path = snapshot / choose(_files(snapshot), wanted, repo)
            check_complete(path)
            return path
        except ModelFileError as problem:
            error = ModelFileError(f"{problem} in Hugging Face's cache, and {reason}")
    raise error
