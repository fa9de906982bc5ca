"""Documents of every kind become the text that people read in them; what cannot be read is an error in one line."""

from __future__ import annotations

import io
import os
import threading
import zipfile
import zlib
from pathlib import Path

import pytest
from click.testing import CliRunner
from document_files import write_docx, write_epub, write_pdf, write_zip

from selfextend_gguf import documents
from selfextend_gguf.cli import main
from selfextend_gguf.documents import parse_pages, read_document, read_stream, show_pages
from selfextend_gguf.errors import DocumentError
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.pages import readable

MODEL = str(TINY_MODEL)
TABLE = "<table><tr><th>Land</th><th>Town</th></tr><tr><td>Peru</td><td>Lima</td></tr></table>"


def invoke(*arguments: str | Path, stdin: str | bytes | None = None):
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


def text_of(content: bytes, name: str = "file") -> str:
    return read_stream(io.BytesIO(content), name).text


@pytest.fixture
def pdf(tmp_path):
    return write_pdf(tmp_path / "book.pdf", [[f"Page {n} tells of {word}."] for n, word in enumerate("abcdef", 1)])


# ---- plain text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["plain\r\ntext\n", "  <b>é</b> & ~ \t", "# Title\n\n| a |\n", "x < y <html>", "\ufeff"]
)
def test_utf8_text_stays_as_it_is(text):
    assert text_of(text.encode()) == text.removeprefix("\ufeff")
    assert text_of(text.encode("utf-8-sig")) == text
    assert read_stream(io.BytesIO(text.encode()), "file").encoding is None


SENTENCES = {
    "cp1252": "Où est passée l’œuvre de Noël ? Ça dépend, à côté de la forêt.",
    "cp1250": "Zażółć gęślą jaźń. Wszyscy ludzie rodzą się wolni i równi pod względem swej godności.",
    "cp1251": "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "koi8-r": "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "cp1253": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.",
    "shift_jis": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "gb18030": "我们在学习中文，这是一本书。人人生而自由，在尊严和权利上一律平等。",
    "utf-16": "Zwölf Boxkämpfer",
    "utf-32": "Zwölf Boxkämpfer",
    "utf-16-le": "Zwölf Boxkämpfer",
    "utf-16-be": "Zwölf Boxkämpfer",
}


@pytest.mark.parametrize("encoding", SENTENCES)
def test_other_encodings_are_found(encoding):
    assert text_of(SENTENCES[encoding].encode(encoding)) == SENTENCES[encoding]


@pytest.mark.parametrize("text", ["café", "naïve café résumé", "Ærlig talt, så spiste han blåbær på øen."])
def test_short_western_texts_are_windows_western(text):
    document = read_stream(io.BytesIO(text.encode("cp1252")), "file")
    assert (document.text, document.encoding) == (text, "cp1252")


def test_a_long_text_is_told_from_its_beginning(monkeypatch):
    monkeypatch.setattr(documents, "_SAMPLE", 100)
    text = "Größe und Güte.\n" * 100
    assert text_of(text.encode("cp1252")) == text


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"\x7fELF\x02\x01\x01\0\0\0\0\0" * 9, "is binary, no text"),
        (b"some text, and then\0\0\0\0\0", "is binary, no text"),
        (bytes(range(1, 256)) * 9, "is binary, or text in an encoding that cannot be told"),
        (b"\xff\xfea", "is not utf-16 text, as it seems to be: invalid byte at offset 2"),
        (zlib.compress(b"x", wbits=31), "is compressed (gzip): unpack it first"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is a file of an old Word"),
        (b"\x89PNG\r\n", "is a picture"),
        (TINY_MODEL.read_bytes()[:100], "is a model"),
    ],
)
def test_what_is_no_text(content, fault):
    with pytest.raises(DocumentError) as error:
        text_of(content, "thing")
    assert str(error.value).startswith(f"thing {fault}")


def test_endless_input_is_read_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(documents, "LARGEST", 2**22)

    class Endless(io.RawIOBase):
        n = 0

        def read(self, size: int = -1) -> bytes:
            self.n += size
            return self.head.ljust(size, b"x")

    for head in (b"x", b"%PDF-1.7"):
        source = Endless()
        source.head = head
        with pytest.raises(DocumentError, match="pipe has more than 4 MiB: give"):
            read_stream(source, "pipe")
        assert source.n < 2**22 + 2**21


def test_zeros_without_end_are_binary_at_once():
    with pytest.raises(DocumentError, match="/dev/zero is binary"):
        read_document(Path("/dev/zero"))


# ---- PDF -------------------------------------------------------------------------------------------------------------


def test_pages_of_a_pdf(pdf):
    document = read_document(pdf)
    assert list(document.pages) == [1, 2, 3, 4, 5, 6]
    assert document.text == "\n\n".join(f"Page {n} tells of {word}." for n, word in enumerate("abcdef", 1))
    assert document.first_pages(2).text == "Page 1 tells of a.\n\nPage 2 tells of b."
    chosen = read_document(pdf, parse_pages("5,2-3,3"))
    assert chosen.text == "Page 5 tells of e.\n\nPage 2 tells of b.\n\nPage 3 tells of c."


def test_a_pdf_is_known_by_its_content(pdf, tmp_path):
    assert read_document(pdf.rename(tmp_path / "book.txt")).pages
    content = (tmp_path / "book.txt").read_bytes()
    assert len(read_stream(io.BytesIO(b"\n" + content), "pipe").pages) == 6  # from memory, where no other process can


def test_ranges_of_pages():
    assert parse_pages(" 3, 10-30 ") == [(3, 3), (10, 30)]
    assert show_pages([3, 10, 11, 12, 9]) == "3,10-12,9"
    for text in ("", "0", "3-", "5-3", "-1", "1,,2", "1-2-3", "x", "1" * 5000, "²"):
        with pytest.raises(DocumentError, match="are no pages: give ranges from 1, as in 3,10-30"):
            parse_pages(text)


def test_pages_out_of_range(pdf):
    with pytest.raises(DocumentError, match=r"book\.pdf has 6 pages, not 999999999"):
        read_document(pdf, [(1, 999999999)])


def test_pages_of_what_has_none(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.html").write_text("<p>x")
    letter = write_docx(tmp_path / "letter", "<w:p><w:r><w:t>x</w:t></w:r></w:p>")
    for path in (tmp_path / "a.txt", tmp_path / "a.html", letter):
        with pytest.raises(DocumentError, match=r"has no pages: --pages is for PDF files, and for chapters of EPUB"):
            read_document(path, [(1, 1)])


def test_words_that_line_ends_cut(tmp_path):
    lines = [
        "The exam-",
        "ple is a well-",
        "known one, and well-known in exam-",
        "ple books of 1990-",
        "1995 on the X-",
    ]
    document = read_document(write_pdf(tmp_path / "a.pdf", [[*lines, "Ray"], ["An uncom-"], ["mon page."]]))
    assert " ".join(document.text.split()) == (
        "The example is a well-known one, and well-known in example books of 1990-1995 on the X-Ray An uncommon page."
    )


def test_running_heads_and_page_numbers_are_dropped():
    chapter = ["The Whale", "The Ship", "The Sea"]
    pages = {
        n: f"A Long Book, second edition\r\nText {chr(97 + n)}.\r\n1851\r\n{chapter[n // 4]} {n - 2}" if n % 2 else
        f"A Long Book, second edition\r\nText {chr(97 + n)}.\r\nend\r\n{n - 2} {chapter[n // 4]}"
        for n in range(3, 12)
    }  # fmt: skip
    pages = {1: "Title", 2: "ii\r\nContents 1", **pages}
    got = readable(pages)
    assert got[1] == "Title"
    assert got[3] == "A Long Book, second edition\nText d.\n1851"  # once
    assert got[5] == "Text f.\n1851"
    assert got[4].startswith("Text e.")
    assert all("book," not in text and not text.rstrip().endswith(str(n - 2)) for n, text in got.items() if n > 3)


def test_lines_that_only_look_alike_stay():
    assert readable({1: "}\na", 2: "}\nb", 3: "}\nc"}) == {1: "}\na", 2: "}\nb", 3: "}\nc"}
    assert readable({1: "Head\na", 2: "Head\nb"}) == {1: "Head\na", 2: "Head\nb"}  # two pages tell nothing
    assert readable({7: "ﬁne\x00 oﬃce\rx"}) == {7: "fine office\nx"}


def test_pdfs_that_cannot_be_read(tmp_path, pdf):
    faults = {
        "is encrypted: save a copy without a password": write_pdf(tmp_path / "e.pdf", [["x"]], is_encrypted=True),
        "has no text layer, only pictures of pages": write_pdf(tmp_path / "s.pdf", [[], []]),
        "is damaged: it cannot be read as a PDF": tmp_path / "cut.pdf",
    }
    (tmp_path / "cut.pdf").write_bytes(pdf.read_bytes()[:60])
    for fault, path in faults.items():
        with pytest.raises(DocumentError) as error:
            read_document(path)
        assert str(error.value).startswith(f"{path} {fault}")


def test_a_pdf_that_unpacks_to_too_much(tmp_path):
    packed = zlib.compress(b"BT /F 10 Tf (x) Tj ET " + b" " * 2**27, 9)
    packed = zlib.compress(packed, 9)
    stream = b"<< /Length %d /Filter [/FlateDecode /FlateDecode] >>\nstream\n%s\nendstream" % (len(packed), packed)
    path = write_pdf(tmp_path / "bomb.pdf", [["x"]], stream=stream)
    assert path.stat().st_size < 2**16
    try:
        assert set(read_document(path).text.split()) == {"x"}  # within the limit of memory, it is only blanks
    except DocumentError as error:
        assert str(error).startswith(f"{path} ")


# ---- HTML, EPUB, DOCX ------------------------------------------------------------------------------------------------

PAGE = f"""<!DOCTYPE html><html><head><title>T</title><style>p {{}}</style><script>var x</script></head><body>
<nav><a href="/">Home</a></nav><div role="navigation">Menu</div><p hidden>Secret</p>
<h1>Lands<a class="headerlink" href="#x">¶</a></h1><p>Some <b>bold</b>, <a href="u">linked</a> &amp; snake_case*
<p>unclosed<ul><li>one<li>two</ul>{TABLE}<pre>a  b
  c</pre></body></html>"""


def test_html():
    text = text_of(PAGE.encode())
    assert text == (
        "# Lands\n\nSome bold, linked & snake_case*\n\nunclosed\n\n- one\n- two\n\n"
        "| Land | Town |\n| --- | --- |\n| Peru | Lima |\n\n```\na  b\n  c\n```"
    )


@pytest.mark.parametrize(
    "content",
    [
        "<html><p>é</p>".encode(),
        '\ufeff<?xml version="1.0"?>\n<!-- a --><!-- b -->\n<HTML><p>é</p></HTML>'.encode(),
        '<!doctype html><meta charset="koi8-r"><p>é</p>'.encode(),  # it is UTF-8, whatever it says
        b'<!doctype html><meta charset="latin-1"><p>\xe9</p>',
        "<html><p>é</p>".encode("utf-16"),
    ],
)
def test_encodings_of_html(content):
    assert text_of(content, "page.html") == "é"


def test_html_that_does_not_say_its_encoding_is_guessed():
    text = "Слово о полку Игореве, Игоря, сына Святославля, внука Ольгова. Не лепо ли ны бяшет, братие, начяти. " * 3
    assert text_of(f"<html><p>{text}</p>".encode("cp1251"), "page.html") == text.strip()
    assert text_of(f'<html><meta charset="unheard-of"><p>{text}</p>'.encode("cp1251"), "page.html") == text.strip()


def test_html_is_known_by_its_content_or_its_name():
    assert text_of(b"<p>x</p>", "a.HTM") == "x"
    assert text_of(b"<p>x</p>", "a.txt") == "<p>x</p>"
    assert text_of(b"<!---->" * 500 + b"<p>", "a.txt").endswith("<p>")  # at once


def test_an_epub_is_read_in_the_order_of_its_spine(tmp_path):
    chapters = {"z.xhtml": "<h1>First</h1>", "a b.xhtml": f"<h1>Second</h1>{TABLE}", "n.xhtml": "<nav>Contents</nav>"}
    path = write_epub(tmp_path / "book", chapters, ["n.xhtml", "z.xhtml", "a b.xhtml"])
    assert read_document(path).text == "# First\n\n# Second\n\n| Land | Town |\n| --- | --- |\n| Peru | Lima |"


def test_chapters_of_an_epub(tmp_path):
    chapters = {name: f"<p>Chapter {name}-</p>" for name in "abcd"} | {"e": "<nav>x</nav>"}
    path = write_epub(tmp_path / "book", chapters, list("abecd"))
    book = read_document(path)
    assert book.pages == {1: "Chapter a-", 2: "Chapter b-", 3: "", 4: "Chapter c-", 5: "Chapter d-"}
    assert book.first_pages(4).text == "Chapter a-\n\nChapter b-\n\nChapter c-"
    assert read_document(path, [(4, 5), (1, 1)]).text == "Chapter c-\n\nChapter d-\n\nChapter a-"
    with pytest.raises(DocumentError, match="book has 5 chapters, not 6"):
        read_document(path, [(2, 6)])
    with pytest.raises(DocumentError, match="holds no text"):
        read_document(path, [(3, 3)])


def test_a_docx(tmp_path):
    def paragraph(text: str, style: str = "") -> str:
        look = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
        return f"<w:p>{look}<w:r><w:t>{text}</w:t></w:r></w:p>"

    rows = "".join(
        f"<w:tr>{''.join(f'<w:tc>{paragraph(cell)}</w:tc>' for cell in row)}</w:tr>"
        for row in (("Land", "Town"), ("Peru", "Lima"))
    )
    path = write_docx(
        tmp_path / "letter", paragraph("Dear", "Heading1") + paragraph("reader") + f"<w:tbl>{rows}</w:tbl>"
    )
    text = read_document(path).text
    assert "Dear\n\nreader\n\n" in text
    assert "| Land | Town |" in text and "| Peru | Lima |" in text


def bomb(name: str) -> dict[str, str | bytes]:
    return {name: b"<p>x</p>" + b" " * 2**26}


def test_archives_that_cannot_be_read(tmp_path, monkeypatch):
    key = (
        '<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><e:EncryptedData '
        'xmlns:e="http://www.w3.org/2001/04/xmlenc#"><e:CipherData><e:CipherReference URI="OEBPS/text/a"/>'
        "</e:CipherData></e:EncryptedData></encryption>"
    )
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 30))
    laughs = f'<!DOCTYPE x [<!ENTITY l0 "ha">{laughs}]><x>&l29;</x>'
    book = write_epub(tmp_path / "whole", {"a": "x" * 5000}, ["a"]).read_bytes()
    damaged = book[:100] + b"?" * 30 + book[130:]
    paths = {
        "is a ZIP archive, neither EPUB nor DOCX": write_zip(tmp_path / "a", {"x": "y"}),
        "is encrypted: it is bound to a reader": write_epub(
            tmp_path / "b", {"a": "x"}, ["a"], **{"META-INF/encryption.xml": key}
        ),
        "unpacks to more than 200 times its size": write_epub(
            tmp_path / "c", {"a": "x"}, ["a"], **bomb("OEBPS/text/a")
        ),
        "is damaged: it has no OEBPS/text/b": write_epub(tmp_path / "d", {"a": "x", "b": ""}, ["a", "b"]),
        "is damaged: META-INF/container.xml is no XML": write_zip(tmp_path / "e", {"META-INF/container.xml": laughs}),
        "is damaged: it begins as a ZIP archive": tmp_path / "f",
        "holds no text": write_epub(tmp_path / "g", {"a": "<img src='x'>"}, ["a"]),
        "is damaged: META-INF/container.xml cannot be unpacked": tmp_path / "h",
    }
    with zipfile.ZipFile(tmp_path / "d") as whole:
        write_zip(tmp_path / "d", {n: whole.read(n) for n in whole.namelist() if not n.endswith("/b")})
    (tmp_path / "f").write_bytes(book[:-40])
    (tmp_path / "h").write_bytes(damaged)
    for fault, path in paths.items():
        with pytest.raises(DocumentError) as error:
            read_document(path)
        assert str(error.value).startswith(f"{path} {fault}")


def test_sizes_in_an_archive_are_not_believed(tmp_path):
    path = write_epub(tmp_path / "a", {"a": "x"}, ["a"], **bomb("OEBPS/text/a"))
    small = (10).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace((2**26 + 8).to_bytes(4, "little"), small))
    with pytest.raises(DocumentError, match=r"is damaged|times its size"):
        read_document(path)


def test_elements_without_end():
    with pytest.raises(DocumentError, match=r"pipe (has more than|takes more than|ended the process)"):
        text_of(b"<html>" + b"<div>x" * 20_000, "pipe")


def test_a_reader_that_ends_is_an_error(pdf, monkeypatch):
    monkeypatch.setattr(documents, "command_of", lambda *_: ["sh", "-c", "kill -SEGV $$"])
    with pytest.raises(DocumentError, match=r"book\.pdf ended the process that reads it \(SIGSEGV\)"):
        read_document(pdf)


def test_what_is_not_installed_is_named(pdf, monkeypatch, tmp_path):
    (tmp_path / "pypdfium2.py").write_text("raise ModuleNotFoundError(name='pypdfium2')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DocumentError, match=r"needs pypdfium2 to be read: pip install 'selfextend-gguf\[documents\]'"):
        read_document(pdf)


# ---- the doors -------------------------------------------------------------------------------------------------------


def test_run_reads_files_in_order(pdf, tmp_path):
    (tmp_path / "a.txt").write_text("First.\n")
    arguments = ["run", MODEL, "-n", "3", "--temp", "0", "--json"]
    together = invoke(*arguments, "First.\n\nPage 2 tells of b.\n\nWhat?")
    (tmp_path / "q.txt").write_text("First.\n\nPage 2 tells of b.\n\n")
    one = invoke(*arguments, "-f", tmp_path / "q.txt", "-p", "What?")
    write_pdf(tmp_path / "b.pdf", [["Page 2 tells of b."]])
    several = invoke(*arguments, "-f", tmp_path / "a.txt", "-f", tmp_path / "b.pdf", "-p", "What?")
    piped = invoke(*arguments, "-f", tmp_path / "a.txt", "-f", "-", "What?", stdin=(tmp_path / "b.pdf").read_bytes())
    n_bytes = len("First.\n\nPage 2 tells of b.\n\nWhat?")
    for result in (together, one, several, piped):
        assert result.exit_code == 0, result.output
        assert f'"prompt_tokens": {n_bytes}' in result.stdout
        assert result.stdout.split('"text"')[1][:20] == together.stdout.split('"text"')[1][:20]
        assert result.stderr == ""


def test_run_reads_pages(pdf):
    result = invoke("run", MODEL, "-f", pdf, "--pages", "2,4", "-n", "1", "--json")
    assert f'"prompt_tokens": {2 * len("Page 2 tells of b.") + 2}' in result.stdout
    assert f'"prompt_tokens": {len("Page 2 tells of b.")}' in invoke(
        "run", MODEL, "--pages", "2", "-n", "1", "--json", stdin=pdf.read_bytes()
    ).stdout  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["run", MODEL, "x", "--pages", "1"], b"", "--pages is for a file: give one with -f"),
        (["tune", MODEL, "-c", "512", "--pages", "1"], b"", "--pages is for a file: give one with -f"),
        (["run", MODEL, "-f", "-", "-f", "-"], b"x", "standard input can be read once: give -f - once"),
        (["chat", MODEL, "-f", "-"], b"x", "standard input is the conversation"),
        (["run", MODEL, "-f", "PDF", "--pages", "3-9"], b"", "book.pdf has 6 pages, not 9"),
        (["eval", "ppl", MODEL, "-f", "PDF", "--pages", "7"], b"", "book.pdf has 6 pages, not 7"),
        (["tune", MODEL, "-c", "512", "-f", "PDF", "--pages", "7"], b"", "book.pdf has 6 pages, not 7"),
        (["chat", MODEL, "-f", "PDF", "--pages", "7"], b"", "book.pdf has 6 pages, not 7"),
        (["run", MODEL, "-f", "PDF", "--pages", "7-3"], b"", "are no pages: give ranges from 1"),
        (["run", MODEL, "-f", "EMPTY", "x"], b"", "EMPTY is empty"),
        (["run", MODEL, "-f", "SECRET", "x"], b"", "Permission denied"),
        (["run", MODEL], bytes(range(1, 256)), "standard input is binary, or text in an encoding that cannot be told"),
    ],
)  # fmt: skip
def test_bad_documents_on_the_command_line(one_line_error, tmp_path, pdf, arguments, stdin, message):
    (tmp_path / "EMPTY").touch()
    (tmp_path / "SECRET").write_text("x")
    (tmp_path / "SECRET").chmod(0)
    if "SECRET" in arguments and os.access(tmp_path / "SECRET", os.R_OK):
        pytest.skip("root reads everything")
    names = {"PDF": str(pdf), "EMPTY": str(tmp_path / "EMPTY"), "SECRET": str(tmp_path / "SECRET")}
    assert message in one_line_error(*[names.get(a, a) for a in arguments], stdin=stdin)


def test_a_named_pipe(tmp_path, pdf):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(pdf.read_bytes()))
    writer.start()
    assert len(read_document(tmp_path / "pipe").pages) == 6
    writer.join()


def test_texts_that_are_too_long_say_what_would_fit(one_line_error, tmp_path):
    book = write_pdf(tmp_path / "book.pdf", [[f"{n:02d}" + "x" * 98] for n in range(10)])  # 102 tokens a page, but one
    # 10 * 102 - 2 + 2 + 1 = 1021 tokens; 511 and one for the answer fit: 5 * 102 - 2 + 3 = 511.
    error = one_line_error("run", MODEL, "-f", str(book), "-p", "x", "-c", "512")
    assert error.endswith("510 tokens of the texts are too many; --pages 1-5 would fit")
    assert invoke("run", MODEL, "-f", book, "--pages", "1-5", "-p", "x", "-c", "512", "-n", "1").exit_code == 0
    error = one_line_error("run", MODEL, "-f", str(book), "--pages", "3-10", "-p", "x", "-c", "512")
    assert error.endswith("306 tokens of the texts are too many; --pages 3-7 would fit")
    error = one_line_error("run", MODEL, "-f", str(book), "-p", "x", "-gan", "2", "-n", "100")
    assert "take a group size of at least" in error and error.endswith("--pages 1 would fit")
    error = one_line_error("run", MODEL, "-f", str(book), "-p", "x" * 500, "-c", "512")
    assert error.endswith("not even its first page fits")
    text = tmp_path / "a.txt"
    text.write_text("x" * 600)
    assert one_line_error("run", MODEL, "-f", str(text), "-c", "512").endswith("89 tokens of the texts are too many")
    assert one_line_error("run", MODEL, "x" * 600, "-c", "512").endswith("exceed context window of 512")


def test_a_chat_reads_documents_and_goes_on_after_bad_ones(tmp_path):
    book = write_pdf(tmp_path / "the book.pdf", [["x" * 100]] * 10)
    (tmp_path / "cut.pdf").write_bytes(b"%PDF-1.4 cut")
    lines = [
        f"/file {book}",
        f"/file --pages 9 {book}",
        f"/file --pages=12 {book}",
        f"/file --pages x {book}",
        f"/file {tmp_path}/cut.pdf",
        f"/file {tmp_path}",
        "Hello",
    ]
    result = invoke("chat", MODEL, "-c", "512", "-n", "20", "--temp", "0", stdin="\n".join(lines) + "\n")
    assert result.exit_code == 0
    assert result.stdout.strip()
    assert result.stderr.splitlines()[1:7] == [
        f"Error: {book} has 1018 tokens, 506 too many for the context of 512, 0 of which are taken; --pages 1-4 would "
        "fit: /undo, /clear or a larger --ctx make room",
        f"{book}: 100 tokens, 20% of the context of 512, to be read before the next message.",
        f"Error: {book} has 10 pages, not 12",
        "Error: 'x' are no pages: give ranges from 1, as in 3,10-30",
        f"Error: {tmp_path}/cut.pdf is damaged: it cannot be read as a PDF",
        f"Error: [Errno 21] Is a directory: '{tmp_path}'",
    ]


def test_an_encoding_that_was_guessed_is_told(tmp_path):
    (tmp_path / "a.txt").write_bytes("Größe und Güte".encode("cp1252"))
    result = invoke("chat", MODEL, "-n", "1", stdin=f"/file {tmp_path}/a.txt\n")
    assert "a.txt: 17 tokens, 2% of the context of 1024, taken for cp1252 text, to be read before" in result.stderr
