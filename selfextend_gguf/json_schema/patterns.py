"""Regular expressions of JSON schemas (ECMA 262) in llguidance's syntax.

Engines disagree: on what `\\d`, `\\w`, `\\s` and `.` stand for, and on what some signs mean. Sets are written out here,
and what means something else elsewhere is refused.
"""

from __future__ import annotations

import re
from typing import NoReturn

from selfextend_gguf.errors import GrammarError

_SPACES = "\t\n\x0b\x0c\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# What classes and the dot stand for, as insides of a character class: for ECMA 262, Python and others alike ...
_CERTAIN = {"d": "0-9", "w": "0-9A-Z_a-z", "s": _SPACES, "line end": "\n\r\u2028\u2029"}
# ... and for at least one of them.
_POSSIBLE = {
    "d": r"\p{Nd}",
    "w": r"\p{L}\p{N}_",
    "s": _SPACES + "\ufeff\x1c-\x1f\x85",
    "line end": "\n",
}

_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
_QUANTIFIER = re.compile(r"[*+?]|\{([0-9]{1,9})(?:,([0-9]{0,9}))?\}")
_CODE = re.compile(r"u\{([0-9A-Fa-f]{1,6})\}|u([0-9A-Fa-f]{4})|x([0-9A-Fa-f]{2})")
_PROPERTY = re.compile(r"[pP]\{[A-Za-z_=]+\}")
_GROUP = re.compile(r"\((?:\?:|\?<[A-Za-z_][A-Za-z0-9_]*>)?(?!\?)")
_MOST_REPETITIONS = 9999


def translated(pattern: str, place: str) -> str:
    """A pattern, found at a place of a schema, in llguidance's syntax: what matches it, matches in every engine.

    Raises GrammarError.
    """
    return _Translation(pattern, place, _CERTAIN, _POSSIBLE).text()


def is_one_to_all(pattern: str) -> bool:
    """Whether engines agree on what matches a pattern that can be translated."""
    return translated(pattern, "") == _Translation(pattern, "", _POSSIBLE, _CERTAIN).text()


class _Translation:
    """`sets` is what classes stand for, `others` what they stand for where they are excluded."""

    def __init__(self, pattern: str, place: str, sets: dict[str, str], others: dict[str, str]) -> None:
        self._pattern = pattern
        self._place = place
        self._sets = sets
        self._others = others
        self._at = 0

    def text(self) -> str:
        parts = []
        while self._at < len(self._pattern):
            parts.append(self._term())
        return "".join(parts)

    def _refuse(self, problem: str) -> NoReturn:
        raise GrammarError(
            f"the JSON schema cannot be kept at {self._place}: {problem} (character {self._at + 1} of "
            f"{self._pattern!r:.60})"
        )

    def _next(self, n: int = 1) -> str:
        """The next characters, which are passed over; fewer at the end."""
        self._at += n
        return self._pattern[self._at - n : self._at]

    def _match(self, expression: re.Pattern[str]) -> re.Match[str] | None:
        """What an expression matches here, which is passed over."""
        found = expression.match(self._pattern, self._at)
        self._at = found.end() if found else self._at
        return found

    def _term(self) -> str:
        """The next assertion or sign of a group, or atom with its quantifier."""
        here = self._pattern[self._at]
        if here in "^$|":
            return self._next()
        if here == "(":
            if not self._match(_GROUP):
                self._refuse("look-around and flags are not supported")
            return "(?:"
        if here in "*+?{":
            self._refuse("a quantifier without anything to repeat")
        return self._atom() + self._quantifier()

    def _quantifier(self) -> str:
        found = self._match(_QUANTIFIER)
        if not found:
            if self._pattern.startswith("{", self._at):
                self._refuse("a brace that is no quantifier")
            return ""
        if any(count and int(count) > _MOST_REPETITIONS for count in found.groups()):
            self._refuse(f"more than {_MOST_REPETITIONS} repetitions are not supported")
        if self._pattern.startswith("?", self._at):
            self._next()  # repeat as seldom as possible: the same texts match
        if self._pattern.startswith(("*", "+", "?", "{"), self._at):
            self._refuse("a quantifier after a quantifier")
        return found[0]

    def _atom(self) -> str:
        here = self._next()
        if here == ".":
            return f"[^{_inside(self._sets['line end'])}]"
        if here == "[":
            return self._class()
        if here == "\\":
            inside = self._set(negated=False)
            return f"[{inside}]" if inside else self._written(self._escaped())
        return here if here == ")" else self._written(here)

    def _written(self, character: str) -> str:
        """A character that a text must contain."""
        if not is_writable(character):
            self._refuse("control characters are not supported")
        return _literal(character)

    def _class(self) -> str:
        negated = self._pattern.startswith("^", self._at)
        if negated:
            self._next()
        parts = []
        while True:
            if self._at >= len(self._pattern):
                self._refuse("a character class without an end")
            if self._pattern[self._at] == "]":
                break
            parts.append(self._class_part(negated))
        if not parts:
            self._refuse("an empty character class")
        self._next()
        return f"[{'^' * negated}{''.join(parts)}]"

    def _class_part(self, negated: bool) -> str:
        first = self._class_item(negated)
        is_range = self._pattern.startswith("-", self._at) and not self._pattern.startswith("-]", self._at)
        if not is_range:
            return first if len(first) > 1 else _literal(first)
        self._next()
        last = self._class_item(negated)
        if len(first) > 1 or len(last) > 1 or first > last:
            self._refuse("a range that is none")
        return f"{_literal(first)}-{_literal(last)}"

    def _class_item(self, negated: bool) -> str:
        """A character, or the longer inside of a set."""
        here = self._next()
        if here != "\\":
            return here
        inside = self._set(negated)
        if inside:
            return inside
        if self._pattern.startswith("b", self._at):
            self._next()
            return "\b"
        return self._escaped()

    def _set(self, negated: bool) -> str:
        """After a backslash: the inside of a class for a set of characters; "" if none comes."""
        found = self._match(_PROPERTY)
        if found:
            return f"\\{found[0]}"
        name = self._pattern[self._at : self._at + 1]
        if not name or name not in "dDsSwW":
            return ""
        self._next()
        # More in a set is less in its complement.
        sets = self._others if negated != name.isupper() else self._sets
        inside = _inside(sets[name.lower()])
        return f"[^{inside}]" if name.isupper() else inside

    def _escaped(self) -> str:
        """The character that an escape stands for."""
        code = self._match(_CODE)
        if code:
            return self._character(int(code[1] or code[2] or code[3], 16))
        name = self._next()
        if name in _CONTROLS and not (name == "0" and self._pattern[self._at : self._at + 1].isdigit()):
            return _CONTROLS[name]
        if not name or (name.isascii() and name.isalnum()):
            self._refuse(f"the escape \\{name} is not supported")
        return name

    def _character(self, code: int) -> str:
        if 0xD800 <= code < 0xDC00 and self._pattern.startswith("\\u", self._at):  # the first half of a character
            self._next()
            second = self._match(_CODE)
            low = int(second[1] or second[2], 16) if second else 0
            if 0xDC00 <= low < 0xE000:
                return chr(0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00))
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            self._refuse("half of a character")
        return chr(code)


def is_writable(character: str) -> bool:
    """Whether strings can hold a character without the escape \\u, which is never used."""
    return (character >= " " or character in "\b\t\n\f\r") and character != "\x7f"


def _literal(character: str) -> str:
    """A character as itself, inside classes and outside."""
    if character.isalnum() or character == "_":
        return character
    return f"\\u{{{ord(character):x}}}"


def _inside(characters: str) -> str:
    """Characters, ranges and properties as the inside of a class."""
    return "".join(c if c.isascii() and c.isprintable() and c != " " else _literal(c) for c in characters)
