"""Small documents of every kind, made for tests."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

CONTAINER = (
    '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
)
WORD = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def write_pdf(path: Path, pages: Sequence[Sequence[str]], *, is_encrypted: bool = False, stream: bytes = b"") -> Path:
    """A PDF with these lines on its pages. `stream`: what all pages show instead, with its dictionary."""
    count = len(pages)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count %d /Kids [%s] >>" % (count, b" ".join(b"%d 0 R" % (4 + 2 * i) for i in range(count))),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for number, lines in enumerate(pages):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Resources << /Font << /F 3 0 R >> >> "
            b"/Contents %d 0 R >>" % (5 + 2 * number)
        )
        shown = [line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)") for line in lines]
        text = "BT /F 10 Tf 50 760 Td 14 TL " + " T* ".join(f"({line}) Tj" for line in shown) + " ET" if lines else ""
        content = text.encode("cp1252")
        objects.append(stream or b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content))
    written, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(written))
        written += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(written)
    key = b"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >> /ID [<00> <00>]" % (b"5a" * 32, b"a5" * 32)
    written += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    written += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    written += b"trailer\n<< /Size %d /Root 1 0 R %s >>\n" % (len(objects) + 1, key if is_encrypted else b"")
    path.write_bytes(written + b"startxref\n%d\n%%%%EOF\n" % start)
    return path


def write_zip(path: Path, files: Mapping[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_epub(path: Path, chapters: Mapping[str, str], spine: Sequence[str], **more: str | bytes) -> Path:
    """A book of chapters (file name -> body in HTML), read in the order of `spine`; `more`: other files."""
    items = "".join(f'<item id="{name}" href="text/{name}"/>' for name in chapters)
    order = "".join(f'<itemref idref="{name}"/>' for name in spine)
    opf = f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{order}</spine></package>'
    pages = {
        f"OEBPS/text/{name}": f"<html><head><title>t</title></head><body>{body}</body></html>"
        for name, body in chapters.items()
    }
    files = {"mimetype": "application/epub+zip", "META-INF/container.xml": CONTAINER, "OEBPS/book.opf": opf}
    return write_zip(path, {**files, **pages, **more})


def write_docx(path: Path, body: str) -> Path:
    """A Word file with this body in WordprocessingML."""
    relationship = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    return write_zip(
        path,
        {
            "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"/>',
            "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
            f'<Relationship Id="r" Type="{relationship}" Target="word/document.xml"/></Relationships>',
            "word/document.xml": f"<w:document {WORD}><w:body>{body}</w:body></w:document>",
            "word/media/picture.png": b"\x89PNG no picture",
        },
    )
