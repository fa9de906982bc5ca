"""Text of printed pages as one reads it: words that a line end cut are whole, and what stands on every page is gone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

_LEAST = 3  # pages on which a line, or a number alone, must stand before it is taken for one of every page
_LEAST_WITH_TITLE = 8  # the same of a number with a title: else headings that are numbered would be
_EDGE = 3  # lines at the top and at the bottom of a page that can be such
_LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}
_CONTROLS = {code: None for code in range(32) if chr(code) not in "\n\t"}
_PAGE = "\f"  # between pages while they are one text
_SPLIT = "\ufffe"  # PDFium's mark of a word that a line end cut: it takes the hyphen and the line end away
_BARE = re.compile(r"\W*(?:\w+\W+)?\d{1,6}(?:\W+\w{0,3}\W*\d{1,6})?\W*|[ivxlcdm]{1,9}", re.IGNORECASE)  # "Page 3 of 9"
_FIRST = re.compile(r"^(?:\D{0,9}\W)?(\d{1,6})\b")
_LAST = re.compile(r"\b(\d{1,6})\W*$")
_ROMAN = re.compile(r"[ivxlcdm]{1,9}", re.IGNORECASE)
_CUT = re.compile(rf"([\w-]*\w)(?:[-\u00ad\u2010]([\n{_PAGE}])|{_SPLIT}([\n{_PAGE}]?))(\w+)")


def readable(pages: Mapping[int, str]) -> dict[int, str]:
    """Pages by number, as they were and as they are read."""
    lines = {number: _tidy(text).split("\n") for number, text in pages.items()}
    for is_top in (True, False):
        _drop_running_lines(lines, is_top)
    whole = _join_words(_PAGE.join("\n".join(page) for page in lines.values()))
    return dict(zip(pages, (page.strip("\n") for page in whole.split(_PAGE)), strict=True))


def _tidy(text: str) -> str:
    """One kind of line ends, letters for ligatures, no control characters."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate({**_LIGATURES, **_CONTROLS}).strip()


# ---- running heads, page numbers -------------------------------------------------------------------------------------


def _drop_running_lines(pages: Mapping[int, list[str]], is_top: bool) -> None:
    """Take page numbers out, and lines that several pages begin (or end) with; the first of equal ones stays."""
    ends = {number: page[:_EDGE] if is_top else page[: -_EDGE - 1 : -1] for number, page in pages.items()}
    offsets = Counter(offset for number, lines in ends.items() for offset in set(_offsets(lines[:2], number)))
    offset, n_numbered = max(offsets.items(), key=lambda item: item[1], default=(0, 0))
    counts = Counter(line for lines in ends.values() for line in set(lines))
    known: set[str] = set()

    def is_number(line: str, page: int) -> bool:
        if n_numbered < max(_LEAST, len(pages) // 3):
            return False
        is_bare = _BARE.fullmatch(line) is not None
        return (is_bare or n_numbered >= _LEAST_WITH_TITLE) and (
            offset in _offsets([line], page) or _ROMAN.fullmatch(line) is not None
        )

    for number, lines in ends.items():
        kept: list[str] = []
        n_taken, seeks_number = 0, True
        for line in lines[: len(pages[number]) - 1]:  # a page of one line keeps it
            if seeks_number and is_number(line.strip(), number):
                seeks_number = False
            elif counts[line] < _LEAST or not any(c.isalpha() for c in line):
                break
            elif line not in known:
                known.add(line)
                kept.append(line)
            n_taken += 1
        page = pages[number]
        page[:] = [*kept, *page[n_taken:]] if is_top else [*page[: len(page) - n_taken], *reversed(kept)]


def _offsets(lines: Sequence[str], page: int) -> list[int]:
    """By how much the numbers that lines begin or end with are larger than that of their page."""
    found = [number for line in lines for pattern in (_FIRST, _LAST) for number in pattern.findall(line)]
    return [int(number) - page for number in found]


# ---- words -----------------------------------------------------------------------------------------------------------


def _join_words(text: str) -> str:
    """Words that hyphens at line ends cut are whole, with the hyphen where the text writes it elsewhere."""
    written = set(re.findall(r"\w+(?:-\w+)+|\w+", text.lower()))

    def join(found: re.Match[str]) -> str:
        left, right = found[1], found[4]
        end = found[2] or found[3] or ""
        page = _PAGE if end == _PAGE else ""
        if not (left[-1].isalpha() and right[0].islower()):  # no word, but numbers, names, options
            return f"{left}-{right}{page}"
        whole, compound = (left + right).lower(), f"{left}-{right}".lower()
        hyphen = "-" if "-" in left or (compound in written and whole not in written) else ""
        return f"{left}{hyphen}{right}{page}"

    return _CUT.sub(join, text).replace(_SPLIT, "-")
