"""Texts from outside."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import click

from selfextend_gguf.documents import Document, Pages, parse_pages, read_document, read_stream, show_pages
from selfextend_gguf.errors import DocumentError, TooLongError
from selfextend_gguf.planning import CELL_MULTIPLE

from .progress import status_line

STANDARD_INPUT = Path("-")
PAGES_OF_WHAT = "--pages is for a file: give one with -f"


def _parse_pages(_: click.Context, __: click.Parameter, value: str | None) -> Pages | None:
    try:
        return None if value is None else parse_pages(value)
    except DocumentError as error:
        raise click.BadParameter(str(error)) from error


def files_option(purpose: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """-f: texts and documents, as often as wanted."""
    return click.option(
        "-f",
        "--file",
        "files",
        type=click.Path(path_type=Path),
        multiple=True,
        help=f"Text or document {purpose}; may be given several times.",
    )


pages_option = click.option(
    "--pages",
    metavar="RANGES",
    callback=_parse_pages,
    help="Pages of a PDF or chapters of an EPUB, as in 3,10-30 [all].",
)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_documents(files: Sequence[Path], pages: Pages | None = None) -> list[Document]:
    """The texts of files, - being standard input. Raises DocumentError, OSError and UsageError."""
    if pages is not None and not files:
        raise click.UsageError(PAGES_OF_WHAT)
    if files.count(STANDARD_INPUT) > 1:
        raise click.UsageError("standard input can be read once: give -f - once")
    with status_line() as show:
        documents = []
        for file in files:
            show(f"Opening {file}")
            documents.append(
                read_stream(sys.stdin.buffer, "standard input", pages)
                if file == STANDARD_INPUT
                else read_document(file, pages)
            )
    return documents


def read_text(file: Path, pages: Pages | None = None) -> str:
    """The text of one file. Raises as `read_documents`."""
    return read_documents([file], pages)[0].text


def decode(line: bytes, name: str) -> str:
    """A UTF-8 line that came from `name`, without a byte order mark, or an error in one line."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{name} is not UTF-8 text: invalid byte at offset {error.start}") from error


# ---- putting together ------------------------------------------------------------------------------------------------


def before_question(text: str, question: str) -> str:
    """A text, a blank line, and the question about it."""
    return f"{text.rstrip()}\n\n{question}"


def combine(documents: Sequence[Document], question: str | None) -> str:
    """All texts one after the other, and the question about them; there must be one of either."""
    return reduce(before_question, [*(d.text for d in documents), *([] if question is None else [question])])


# ---- whether they fit ------------------------------------------------------------------------------------------------


def describe(document: Document, n_tokens: int, n_ctx: int) -> str:
    """What a document takes of a context."""
    guessed = f", taken for {document.encoding} text" if document.encoding else ""
    return f"{document.name}: {n_tokens} tokens, {n_tokens / n_ctx:.0%} of the context of {n_ctx}{guessed}"


def pages_that_fit(documents: Sequence[Document], count: Callable[[Sequence[Document]], int], n_tokens: int) -> str:
    """Which pages of the only document, if it has some, are at most `n_tokens` by `count`, to end an error message."""
    if len(documents) != 1 or not documents[0].pages:
        return ""
    document = documents[0]
    numbers = list(document.pages)
    sizes = range(1, len(numbers) + 1)
    n_fitting = bisect_left(sizes, True, key=lambda n: count([document.first_pages(n)]) > n_tokens)
    return f"; --pages {show_pages(numbers[:n_fitting])} would fit" if n_fitting else "; not even its first page fits"


@contextmanager
def advice_on_length(
    documents: Sequence[Document], count: Callable[[Sequence[Document]], int], n_beside: int
) -> Iterator[None]:
    """Within, an error of texts that are too long says how many tokens are too many, and which pages would fit.

    `count` = tokens of a prompt of documents, `n_beside` = those that the context must hold beside it.
    """
    try:
        yield
    except TooLongError as error:
        if error.longest is None or not documents:
            raise
        room = error.longest // CELL_MULTIPLE * CELL_MULTIPLE - n_beside
        n_too_many = count(documents) - room
        if n_too_many <= 0:
            raise  # it is not the texts that are too long, but the context that was asked for
        advice = pages_that_fit(documents, count, room)
        raise type(error)(f"{error}; {n_too_many} tokens of the texts are too many{advice}", error.longest) from error
