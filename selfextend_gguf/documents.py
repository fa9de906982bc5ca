"""Texts from files: plain text in any encoding, PDF, EPUB, DOCX and HTML, told apart by their content.

Plain text is read here; the others by `document_worker.py`, in a process of its own with a limit of memory.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from selfextend_gguf.checks import shown
from selfextend_gguf.errors import DocumentError
from selfextend_gguf.pages import readable
from selfextend_gguf.programs import command_of

LARGEST = 2**28  #: bytes of a plain text, and of any document from a pipe
_HEAD = 2**12  # bytes that tell what a file is
_SAMPLE = 2**20  # bytes that tell the encoding of a text
_CHUNK = 2**20  # bytes

Pages = Sequence[tuple[int, int]]  #: first and last page of each range, from 1

_REFUSED = {
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"BZh": "is compressed (bzip2): unpack it first",
    b"\xfd7zXZ\0": "is compressed (xz): unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd): unpack it first",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "is a file of an old Word, or encrypted: save it as DOCX, without a password",
    b"\x89PNG": "is a picture",
    b"\xff\xd8\xff": "is a picture",
    b"GIF8": "is a picture",
    b"GGUF": "is a model",
}
_MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_USUAL = {"cp1252", "latin_1"}  # where nothing tells encodings apart, it is Windows' Western one
_UNLIKELY = ["utf_7", "utf_16", "utf_16_le", "utf_16_be", "utf_32", "utf_32_le", "utf_32_be"]  # without marks or zeros
_HTML = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--(?:(?!-->).)*-->\s*)*<(?:!doctype\s+html|html)\b",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Document:
    """A text from a file."""

    name: str
    text: str
    pages: dict[int, str] = field(default_factory=dict)  # its pages or chapters by number, {} where there are none
    encoding: str | None = None  # of a plain text, where it had to be guessed

    def first_pages(self, n: int) -> Document:
        """The same of its first `n` pages."""
        pages = dict(list(self.pages.items())[:n])
        return Document(self.name, _text_of(pages), pages)


def _text_of(pages: dict[int, str]) -> str:
    return "\n\n".join(text for text in pages.values() if text)


# ---- pages -----------------------------------------------------------------------------------------------------------


def parse_pages(text: str) -> Pages:
    """Ranges such as "3,10-30". Raises DocumentError."""
    ranges = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last:
            raise DocumentError(f"{shown(text)} are no pages: give ranges from 1, as in 3,10-30")
        ranges.append((first, last))
    return ranges


def show_pages(numbers: Sequence[int]) -> str:
    """Page numbers as `parse_pages` takes them."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_document(path: Path, pages: Pages | None = None) -> Document:
    """The text of a file; `pages`: of a PDF, or chapters of an EPUB, what to read. Raises DocumentError and OSError."""
    with path.open("rb") as file:
        document = read_stream(file, str(path), pages)
    if not document.text:
        raise DocumentError(f"{path} is empty")
    return document


def read_stream(file: BinaryIO, name: str, pages: Pages | None = None) -> Document:
    """The text of a file, or of a pipe, that users know as `name`; "" if it is empty. Raises as `read_document`."""
    head = file.read(_HEAD)
    kind = _kind_of(head, name)
    if pages is not None and kind in ("text", "html"):
        raise DocumentError(f"{name} has no pages: --pages is for PDF files, and for chapters of EPUB files")
    if kind == "text":
        text, encoding = decode(_all_of(file, head, name), name)
        return Document(name, text, encoding=encoding)
    with ExitStack() as stack:
        if not _can_be_shared(file):
            file = stack.enter_context(_copy_of(file, head, name))
        answer = _convert(kind, file, name, pages)
    if "text" in answer:
        return Document(name, answer["text"])
    read = readable(dict(answer["pages"])) if "pages" in answer else dict(answer["chapters"])
    return Document(name, _text_of(read), read)


def _kind_of(head: bytes, name: str) -> str:
    """ "pdf", "archive", "html" or "text"."""
    for magic, fault in _REFUSED.items():
        if head.startswith(magic):
            raise DocumentError(f"{name} {fault}")
    if b"%PDF-" in head[:1024]:
        return "pdf"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "archive"
    is_named_so = name.lower().endswith((".html", ".htm", ".xhtml")) and b"<" in head
    if is_named_so or _HTML.match(head):
        return "html"
    if b"\0" in head and not head.startswith(tuple(_MARKS)) and _encoding_with_zeros(head) is None:
        raise DocumentError(f"{name} is binary, no text")
    return "text"


def _all_of(file: BinaryIO, head: bytes, name: str) -> bytes:
    content = bytearray(head)
    while chunk := file.read(_CHUNK):
        content += chunk
        if len(content) > LARGEST:
            raise DocumentError(f"{name} has more than {LARGEST // 2**20} MiB: give a part of it")
    return bytes(content)


def _can_be_shared(file: BinaryIO) -> bool:
    """Whether another process can read the file from its beginning."""
    try:
        file.fileno()
        return file.seekable()
    except io.UnsupportedOperation:
        return False


@contextmanager
def _copy_of(file: BinaryIO, head: bytes, name: str) -> Iterator[BinaryIO]:
    """What is left of a pipe, in a file that nobody else sees."""
    with tempfile.TemporaryFile() as copy:
        n_bytes = copy.write(head)
        while chunk := file.read(_CHUNK):
            n_bytes += copy.write(chunk)
            if n_bytes > LARGEST:
                raise DocumentError(f"{name} has more than {LARGEST // 2**20} MiB: give it as a file")
        copy.flush()
        yield copy


def _convert(kind: str, file: BinaryIO, name: str, pages: Pages | None) -> dict[str, Any]:
    """What the worker says of a document. Raises DocumentError for what is wrong with it."""
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    command = command_of("document_worker.py", kind, json.dumps(pages))
    with subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            output = process.communicate()[0]
        finally:
            process.kill()
    try:
        answer: dict[str, Any] = json.loads(output)
    except ValueError:
        ended = process.returncode
        how = signal.Signals(-ended).name if ended < 0 else f"exit code {ended}"
        raise DocumentError(f"{name} ended the process that reads it ({how}): it is damaged, or too large") from None
    if "error" in answer:
        raise DocumentError(f"{name} {answer['error']}")
    return answer


# ---- plain text ------------------------------------------------------------------------------------------------------


def decode(content: bytes, name: str) -> tuple[str, str | None]:
    """A plain text without its byte order mark, and its encoding if that had to be guessed. Raises DocumentError."""
    for mark, marked in _MARKS.items():
        if content.startswith(mark):
            return _decoded(content, marked, name), None
    if b"\0" in content:
        encoding = _encoding_with_zeros(content)
        if encoding is None:
            raise DocumentError(f"{name} is binary, no text")
        return _decoded(content, encoding, name), encoding
    try:
        return content.decode("utf-8-sig"), None
    except UnicodeDecodeError:
        encoding = _guess(content)
    if encoding is None:
        raise DocumentError(f"{name} is binary, or text in an encoding that cannot be told: convert it to UTF-8")
    return _decoded(content, encoding, name), encoding


def _decoded(content: bytes, encoding: str, name: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} is not {encoding} text, as it seems to be: invalid byte at offset {error.start}; "
            "convert it to UTF-8"
        ) from error


def _encoding_with_zeros(content: bytes) -> str | None:
    """UTF-16 without a mark: every other byte of Western letters is 0. None if it is something else."""
    n_even, n_odd = content[::2].count(0), content[1::2].count(0)
    if 8 * max(n_even, n_odd) < len(content) or 20 * min(n_even, n_odd) > len(content):
        return None
    return "utf-16-le" if n_odd > n_even else "utf-16-be"


def _guess(content: bytes) -> str | None:
    """The likeliest encoding of a text, None for what is no text."""
    import charset_normalizer  # only where a text needs it: every start of a command would wait for it

    sample = content if len(content) <= _SAMPLE else content[: content.rfind(b"\n", 0, _SAMPLE) + 1 or _SAMPLE]
    matches = charset_normalizer.from_bytes(sample, cp_exclusion=_UNLIKELY)
    best = matches.best()
    if best is None:
        return None
    for match in matches:
        is_as_good = match.chaos <= best.chaos and match.coherence >= best.coherence
        if is_as_good and _USUAL & set(match.could_be_from_charset):
            return "cp1252" if "cp1252" in match.could_be_from_charset else "latin_1"
    return best.encoding
