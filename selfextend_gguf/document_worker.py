"""Reads one document, as a program of its own: `documents.py` starts it, nothing imports it.

The document is standard input, a file that can be sought; the arguments are its kind and, as JSON, the ranges of pages
(or chapters) to read. Standard output is JSON: {"text"}, {"pages": [[number, text], ...]} as printed, {"chapters": the
same as read}, or {"error"}: what is wrong instead. A document can be made so that reading it takes all memory or ends
the process; here it ends this one.
"""

from __future__ import annotations

import contextlib
import io
import json
import posixpath
import re
import resource
import signal
import sys
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import unquote
from xml.etree import ElementTree

MEMORY = 2**31  # bytes
SECONDS = 600  # of processor time
LONGEST_TEXT = 2**26  # characters of a text, and bytes of HTML
LARGEST_UNPACKED = 2**28  # bytes of what is read of an archive
LARGEST_RATIO = 200  # unpacked to packed bytes; XML that people wrote has 3 to 30
_ALWAYS_FINE = 2**22  # bytes that may have any ratio
_CHUNK = 2**16  # bytes
_DEEPEST = 10_000  # elements within each other

# What is on a page of HTML beside its text.
_BESIDE = (
    "script, style, noscript, template, title, meta, link, svg, iframe, object, nav, [role=navigation], [role=search], "
    "[hidden], [aria-hidden=true], a.headerlink"
)
_INLINE = ["a", "img", "b", "strong", "i", "em", "code", "kbd", "samp", "del", "s"]  # marks that cost tokens
_CONTAINER = "{urn:oasis:names:tc:opendocument:xmlns:container}"
_OPF = "{http://www.idpf.org/2007/opf}"
_ENCRYPTED = "{http://www.w3.org/2001/04/xmlenc#}CipherReference"


class Unreadable(Exception):
    """What is wrong with a document, to go on after its name."""


def main() -> None:
    """Read standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    with contextlib.suppress(OSError, ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.setrecursionlimit(_DEEPEST)
    json.dump(answer(sys.argv[1], sys.stdin.buffer, json.loads(sys.argv[2])), sys.stdout)


def answer(kind: str, file: BinaryIO, ranges: list[list[int]] | None) -> dict[str, Any]:
    """What to say of a document."""
    try:
        if kind == "pdf":
            return {"pages": list(pdf_pages(file, ranges))}
        if kind == "html":
            return {"text": checked(html_text(file.read(LONGEST_TEXT + 1)))}
        return archive_text(file, ranges)
    except Unreadable as error:
        return {"error": str(error)}
    except ImportError as error:
        return {"error": f"needs {error.name} to be read: pip install 'selfextend-gguf[documents]'"}
    except MemoryError:
        return {"error": f"takes more than {MEMORY // 2**30} GiB of memory to be read"}
    except RecursionError:
        return {"error": f"has more than {_DEEPEST // 10} elements within each other"}
    except Exception as error:  # the readers raise whatever they stumble over
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return {"error": f"is damaged: {reason}"}


def checked(text: str) -> str:
    """A text, if there is one and it is not too long."""
    if len(text) > LONGEST_TEXT:
        raise Unreadable(f"has more than {LONGEST_TEXT} characters of text")
    if not text.strip():
        raise Unreadable("holds no text")
    return text


def numbers_in(ranges: list[list[int]] | None, n: int, what: str) -> list[int]:
    """The numbers from 1 to `n` in `ranges` (first and last), None = all; each once, in the order of the ranges."""
    last = max((last for _, last in ranges or []), default=0)
    if last > n:
        raise Unreadable(f"has {n} {what}, not {last}")
    return list(dict.fromkeys(number for first, last in ranges or [[1, n]] for number in range(first, last + 1)))


# ---- PDF -------------------------------------------------------------------------------------------------------------


def pdf_pages(file: BinaryIO, ranges: list[list[int]] | None) -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and texts of the pages in `ranges` (first and last page), None = all."""
    import pypdfium2
    from pypdfium2 import raw

    try:
        document = pypdfium2.PdfDocument(file)
        n_pages = len(document)
    except pypdfium2.PdfiumError as error:
        if getattr(error, "err_code", None) == raw.FPDF_ERR_PASSWORD:
            raise Unreadable("is encrypted: save a copy without a password") from error
        raise Unreadable("is damaged: it cannot be read as a PDF") from error
    if not n_pages:
        raise Unreadable("has no pages")
    n_characters, is_blank = 0, True
    for number in numbers_in(ranges, n_pages, "pages"):
        try:
            page = document[number - 1]
            words = page.get_textpage()
        except pypdfium2.PdfiumError as error:
            raise Unreadable(f"is damaged: page {number} cannot be read; leave it out with --pages") from error
        text = words.get_text_range(errors="replace")
        words.close()
        page.close()
        n_characters += len(text)
        if n_characters > LONGEST_TEXT:
            raise Unreadable(f"has more than {LONGEST_TEXT} characters of text: read it in parts with --pages")
        is_blank = is_blank and not text.strip()
        yield number, text
    if is_blank:
        raise Unreadable("has no text layer, only pictures of pages: recognise its text first, as with ocrmypdf")


# ---- HTML ------------------------------------------------------------------------------------------------------------


def html_text(content: bytes) -> str:
    """The text of a page of HTML, with headings, lists and tables as Markdown."""
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    if len(content) > LONGEST_TEXT:
        raise Unreadable(f"has more than {LONGEST_TEXT} bytes of HTML")
    soup = BeautifulSoup(_as_utf8(content), "lxml", from_encoding="utf-8")
    for element in soup.select(_BESIDE):
        element.decompose()
    converter = MarkdownConverter(
        heading_style="ATX",
        bullets="-",
        strip=_INLINE,
        escape_asterisks=False,
        escape_underscores=False,
        escape_misc=False,
    )
    text: str = converter.convert_soup(soup)
    return re.sub(r"\n{3,}", "\n\n", text.replace("\xa0", " ")).strip()


def _as_utf8(content: bytes) -> bytes:
    """The same page in UTF-8. (BeautifulSoup asks whatever guesses of encodings are installed, before the page.)"""
    import charset_normalizer
    from bs4.dammit import EncodingDetector

    try:
        content.decode("utf-8-sig")
        return content  # whatever it says of itself
    except UnicodeDecodeError:
        pass
    unmarked, marked = EncodingDetector.strip_byte_order_mark(content)
    declared = EncodingDetector.find_declared_encoding(content, is_html=True)
    for encoding in filter(None, (marked, declared)):
        with contextlib.suppress(LookupError, UnicodeError):
            return unmarked.decode(encoding).encode()
    guess = charset_normalizer.from_bytes(unmarked).best()
    return unmarked.decode(guess.encoding if guess else "windows-1252", "replace").encode()


# ---- archives --------------------------------------------------------------------------------------------------------


class Archive:
    """A ZIP archive of which not more than LARGEST_UNPACKED bytes are unpacked in all."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            self._zip = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise Unreadable("is damaged: it begins as a ZIP archive and is none") from error
        self.names = self._zip.namelist()
        self._left = LARGEST_UNPACKED

    def read(self, name: str) -> bytes:
        """A file of the archive. What it says of its size is not believed."""
        try:
            entry = self._zip.getinfo(name)
        except KeyError as error:
            raise Unreadable(f"is damaged: it has no {name[:100]}") from error
        if entry.flag_bits & 1:
            raise Unreadable("is encrypted: save a copy without a password")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Unreadable(f"is packed in a way that documents are not (method {entry.compress_type})")
        content = bytearray()
        try:
            with self._zip.open(entry) as file:
                while chunk := file.read(_CHUNK):
                    content += chunk
                    if len(content) > max(_ALWAYS_FINE, LARGEST_RATIO * entry.compress_size):
                        raise Unreadable(f"unpacks to more than {LARGEST_RATIO} times its size: it is made to do harm")
                    if len(content) > self._left:
                        raise Unreadable(f"unpacks to more than {LARGEST_UNPACKED // 2**20} MiB")
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise Unreadable(f"is damaged: {name[:100]} cannot be unpacked") from error
        self._left -= len(content)
        return bytes(content)


def archive_text(file: BinaryIO, ranges: list[list[int]] | None) -> dict[str, Any]:
    """What to say of an EPUB or a DOCX file."""
    archive = Archive(file)
    if "META-INF/container.xml" in archive.names:
        chapters = list(epub_chapters(archive, ranges))
        checked("".join(text for _, text in chapters))
        return {"chapters": chapters}
    if "word/document.xml" in archive.names:
        if ranges is not None:
            raise Unreadable("has no pages: --pages is for PDF files, and for chapters of EPUB files")
        return {"text": checked(docx_text(archive))}
    raise Unreadable("is a ZIP archive, neither EPUB nor DOCX: unpack it, or save it as one of them")


def epub_chapters(archive: Archive, ranges: list[list[int]] | None) -> Iterator[tuple[int, str]]:
    """The chapters of a book in the order of its spine, those in `ranges`, with their numbers from 1."""
    root = _xml(archive, "META-INF/container.xml").find(f".//{_CONTAINER}rootfile")
    package = unquote("" if root is None else root.get("full-path", ""))
    book = _xml(archive, package)
    files = {item.get("id"): unquote(item.get("href", "")) for item in book.iter(f"{_OPF}item")}
    folder = posixpath.dirname(package)
    encrypted = set()
    if "META-INF/encryption.xml" in archive.names:
        locked = _xml(archive, "META-INF/encryption.xml").iter(_ENCRYPTED)
        encrypted = {unquote(reference.get("URI", "")) for reference in locked}
    spine = list(book.iter(f"{_OPF}itemref"))
    for number in numbers_in(ranges, len(spine), "chapters"):
        name = posixpath.normpath(posixpath.join(folder, files.get(spine[number - 1].get("idref"), "")))
        if name in encrypted:
            raise Unreadable("is encrypted: it is bound to a reader (DRM)")
        yield number, html_text(archive.read(name))


def _xml(archive: Archive, name: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(archive.read(name))
    except ElementTree.ParseError as error:
        raise Unreadable(f"is damaged: {name[:100]} is no XML") from error


def docx_text(archive: Archive) -> str:
    """The text of a DOCX file, which mammoth gets without its pictures and unpacked."""
    import mammoth

    unpacked = io.BytesIO()
    with zipfile.ZipFile(unpacked, "w") as copy:
        for name in dict.fromkeys(archive.names):
            if name.endswith((".xml", ".rels")):
                copy.writestr(name, archive.read(name))
    ignore_pictures = mammoth.images.inline(lambda _: {"src": ""})
    return html_text(mammoth.convert_to_html(unpacked, convert_image=ignore_pictures).value.encode())


if __name__ == "__main__":
    main()
