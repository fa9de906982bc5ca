"""Files of a repository on Hugging Face, into the cache of its own library.

That library throws a broken download away, and does not compare what arrived with its digest. So the large files are
read here: a part that is there is gone on from, in another process too, and what is no equal of the digest is dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import operator
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, NoReturn

from selfextend_gguf.errors import ModelFileError, NotReachedError
from selfextend_gguf.stores.files import parts_of

_SITE = "https://huggingface.co"
_HEX = re.compile("[0-9a-f]{40,64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository."""

    name: str  # with its folders
    commit: str
    size: int  # bytes
    digest: str  # its SHA-256, or what git calls it if it is small
    is_sha256: bool


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise NotReachedError(f"names of Hugging Face need {error.name}: pip install 'selfextend-gguf[hub]'") from error
    return huggingface_hub


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or _SITE).rstrip("/")


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """The library's errors in a line. Raises ModelFileError, NotReachedError."""
    from huggingface_hub import errors

    page = f"{_endpoint()}/{repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelFileError(
            f"{repo} is open to those only whom its authors let in: ask at {page}, then set HF_TOKEN to your token"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelFileError(f"Hugging Face shows no {repo}: if it is private, set HF_TOKEN to your token") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ModelFileError(f"Hugging Face refuses {repo} ({status}): is HF_TOKEN right?") from error
        problem = f"{_endpoint()} answers {status} {error.response.reason_phrase}"
        if status >= 500 or status in (408, 429):
            raise NotReachedError(problem) from error
        raise ModelFileError(f"{repo}: {problem}") from error
    except errors.LocalEntryNotFoundError as error:
        raise NotReachedError(f"{_endpoint()} is not reached") from error
    except errors.HTTPError as error:  # of the HTTP client: no connection, or one that broke off
        raise NotReachedError(f"{_endpoint()} is not reached ({str(error) or type(error).__name__})") from error


def list_files(repo: str) -> list[RemoteFile]:
    """The files of the main branch. Raises ModelFileError, NotReachedError."""
    hub = _library()
    with _explained(repo):
        try:
            info = hub.HfApi(endpoint=_endpoint()).model_info(
                repo, files_metadata=True, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT
            )
            return [_remote_file(file, info.sha) for file in info.siblings or [] if file.blob_id or file.lfs]
        except hub.errors.HFValidationError as error:
            raise ModelFileError(f"{repo} is no name of a repository on Hugging Face") from error
        except UnicodeEncodeError as error:  # of what goes into the headers of a request
            raise ModelFileError("the token for Hugging Face (HF_TOKEN) has letters that no token has") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # such as a hotel's page
            raise NotReachedError(f"{_endpoint()} does not answer as Hugging Face does") from error


def _remote_file(file: Any, commit: Any) -> RemoteFile:
    """What the server says of a file, which names files of ours. Raises ValueError, TypeError."""
    found = RemoteFile(
        file.rfilename, commit, file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id, is_sha256=bool(file.lfs)
    )
    path = PurePosixPath(found.name)
    if path.is_absolute() or ".." in path.parts or not _HEX.fullmatch(found.commit) or not _HEX.fullmatch(found.digest):
        raise ValueError(f"no file of a repository: {found}")
    return replace(found, size=operator.index(found.size))


def fetch(repo: str, name: str, files: Sequence[RemoteFile], cache: Path) -> Path:
    """Path in the `cache` of a repository's file, of which all parts are downloaded. Raises ModelFileError, OSError."""
    hub = _library()
    by_name = {file.name: file for file in files}
    parts = [part.as_posix() for part in parts_of(PurePosixPath(name))]
    if missing := [part for part in parts if part not in by_name]:
        raise ModelFileError(f"{repo} has not all parts of {name}: {missing[0]} is missing")
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / by_name[name].commit
    absent = [by_name[part] for part in parts if not (snapshot / part).exists()]
    try:
        with _explained(repo):
            _check_room(folder, absent)
            for file in absent:
                if file.is_sha256 and file.size <= hub.constants.MAX_HTTP_DOWNLOAD_SIZE:
                    _fetch_blob(repo, file, folder)
                # Makes the link to it, and notes the commit of the main branch.
                hub.hf_hub_download(repo, file.name, cache_dir=cache, endpoint=_endpoint())
    except NotReachedError as error:
        raise NotReachedError(f"{error}; what has arrived is kept, and the same command goes on from there") from error
    return snapshot / name


def _partial(folder: Path, file: RemoteFile) -> Path:
    """Where what has arrived of a file is kept."""
    return folder / "blobs" / f"{file.digest}.incomplete"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_room(folder: Path, files: Sequence[RemoteFile]) -> None:
    """Raise ModelFileError where the disk has not enough room for what is to arrive."""
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    missing = sum(file.size - _size(_partial(folder, file)) for file in files)
    if missing > (free := shutil.disk_usage(folder).free):
        raise ModelFileError(
            f"{missing / 1e9:.1f} GB are to be downloaded, and {folder} has room for {free / 1e9:.1f} GB"
        )


def _fetch_blob(repo: str, file: RemoteFile, folder: Path) -> None:
    """Download the content of a file, going on from what is there. Raises ModelFileError, the library's errors."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    blob, partial = folder / "blobs" / file.digest, _partial(folder, file)
    lock = folder.parent / ".locks" / folder.name / f"{file.digest}.lock"  # the library's own
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():  # another process has been faster, or another commit has the same file
            return
        done = _size(partial)
        if done > file.size:
            partial.unlink()
            done = 0
        url = hf_hub_url(repo, file.name, revision=file.commit, endpoint=_endpoint())
        try:
            with partial.open("ab") as opened, _without_warnings():
                http_get(
                    url,
                    opened,
                    resume_size=done,
                    headers=build_hf_headers(),
                    expected_size=file.size,
                    displayed_filename=file.name,
                )
        except OSError as error:
            if error.errno is not None or isinstance(error, HfHubHTTPError):
                raise
            _drop(partial, file, f"{_size(partial)} bytes came, not {file.size}")  # more, or an answer that was cut
        if _sha256(partial) != file.digest:
            _drop(partial, file, "its SHA-256 is another")
        partial.replace(blob)


def _drop(partial: Path, file: RemoteFile, reason: str) -> NoReturn:
    partial.unlink()
    raise ModelFileError(f"{file.name} is not what {_endpoint()} announced and was dropped: {reason}; try again")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """The library goes on after a broken connection, with two lines of warning each time."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
