"""Texts and tokens: which tokens a text becomes, what of it is special, and what tokens spell.

Every text that is read goes through this file, on the command line, in the server and in Python; docs/tokens.md says
what is recognised where.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import llama_cpp
import llama_cpp._internals as internals
from llama_cpp.llama_chat_format import (
    ChatFormatter,
    ChatFormatterResponse,
    LlamaChatCompletionHandler,
    chat_formatter_to_chat_completion_handler,
)
from llama_cpp.llama_tokenizer import BaseLlamaTokenizer

from selfextend_gguf import _native
from selfextend_gguf.errors import TextError
from selfextend_gguf.machine_memory import memory

# llama.cpp's pre-tokenizers recurse for each character of a match, which takes 320 bytes of stack (gcc 12, x86-64).
_STACK_PER_BYTE = 1024
_STACK_BESIDE = 2**20
_SHORT_MATCH = 256  # bytes: any thread has the stack for these
_LONGEST_TEXT = 2**31 - 1  # bytes, llama.cpp's limit

_SPELLS_NOTHING = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
_SPACE = " \t\n\v\f\r"  # C's isspace
# Some control tokens are listed as user-defined, which llama.cpp recognises in any text: DeepSeek's roles by their
# makers, gpt-oss's by llama.cpp itself, so that they are shown.
_CONTROL_LIKE = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
_LONG_NUMBER = re.compile(rb"[0-9]{600,}")
_DIGITS = 60  # in a part of such a number; a multiple of three
_PRIVATE_USE = range(0x100000, 0x10FFFE)  # the last plane of Unicode: characters without a meaning

Marks = Mapping[str, str]  #: stand-ins, each with the character it stands for
NO_MARKS: Marks = {}


@dataclass(frozen=True)
class _Special:
    """A token that llama.cpp looks for in a text before it splits the text into words."""

    token: int
    text: str
    attributes: int

    @property
    def is_guarded(self) -> bool:
        """Whether it is not to be recognised in texts from outside."""
        return bool(self.attributes & _SPELLS_NOTHING or _CONTROL_LIKE.fullmatch(self.text))

    @property
    def is_found_in_texts(self) -> bool:
        """Whether llama.cpp recognises it even if told to leave special tokens alone."""
        return not self.attributes & _SPELLS_NOTHING


class Tokenizer(BaseLlamaTokenizer):
    """The tokenizer of a loaded model. It neither ends the process nor takes a text for more than a text."""

    def __init__(self, model: internals.LlamaModel) -> None:
        self._model = model
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._spelled: frozenset[int] = frozenset()

    # ---- the vocabulary --------------------------------------------------------------------------------------------

    @property
    def _vocab(self) -> Any:
        return self._model.vocab

    @cached_property
    def bos(self) -> int | None:
        """The token that the vocabulary wants before a text, if it wants one."""
        bos = int(llama_cpp.llama_vocab_bos(self._vocab))
        return bos if bos != -1 and llama_cpp.llama_vocab_get_add_bos(self._vocab) else None

    @cached_property
    def _special(self) -> list[_Special]:
        """In the order in which llama.cpp looks for them: the longest first."""
        found = []
        for token in _native.special_tokens(self._vocab):
            text = llama_cpp.llama_vocab_get_text(self._vocab, token).decode("utf-8", "ignore")
            if text:
                found.append(_Special(token, text, int(llama_cpp.llama_vocab_get_attr(self._vocab, token))))
        return sorted(found, key=lambda special: -len(special.text.encode()))

    @cached_property
    def _guarded(self) -> list[_Special]:
        """Those that are not to be recognised in texts from outside."""
        return [special for special in self._special if special.is_guarded]

    @cached_property
    def _firsts(self) -> list[str]:
        """The characters with which their texts begin."""
        return sorted({special.text[0] for special in self._guarded})

    @cached_property
    def _find_guarded(self) -> Callable[[str], Iterator[tuple[int, _Special]]]:
        return _finder(self._guarded)

    @cached_property
    def _find_hidden(self) -> Callable[[str], Iterator[tuple[int, _Special]]]:
        """Those of them that llama.cpp would recognise all the same."""
        return _finder([special for special in self._guarded if special.is_found_in_texts])

    # ---- from texts to tokens --------------------------------------------------------------------------------------

    def tokens(self, text: str, *, special: bool = False, marks: Marks = NO_MARKS, begins: bool = True) -> list[int]:
        """Tokens of a text to read.

        Args:
            special: Recognise special tokens in it.
            marks: Of `mark`, where the text was made of marked ones: what is marked is not recognised.
            begins: Whether nothing comes before the text. If so it begins with exactly one BOS token, if the vocabulary
                wants one.

        Raises TextError, also when a run in the text is too long to be split into words, and NotEnoughMemoryError.
        """
        tokens: list[int] = []
        for number, (part, is_special) in enumerate(self._parts(text, special, marks)):
            # Later parts are next to a special token, where llama.cpp begins anew too.
            tokens += self._part(part, is_special) if begins or number else self._more(part, is_special)
        return self.with_bos(tokens) if begins else tokens

    def with_bos(self, tokens: list[int]) -> list[int]:
        """The tokens of a whole text with exactly one BOS token before them, if the vocabulary wants one."""
        if self.bos is None:
            return tokens
        first = next((i for i, token in enumerate(tokens) if token != self.bos), len(tokens))
        return [self.bos, *tokens[first:]]

    def without_bos(self, text: str) -> str:
        """A text for a caller that recognises special tokens and puts BOS before it, if the vocabulary wants one."""
        if self.bos is None:
            return text
        bos = next((special.text for special in self._special if special.token == self.bos), "")
        while bos and text.startswith(bos) and self._encode(text[: len(bos) + 64], special=True)[:1] == [self.bos]:
            text = text.removeprefix(bos)
        return text

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """As llama_cpp's `LlamaTokenizer`, except that BOS never comes twice. Raises as `tokens` does."""
        if isinstance(text, MarkedBytes):
            return self.tokens(text.decode(), special=special, marks=text.marks)
        if not add_bos:
            return self._encode(text, special=special)
        if self._can_add_special:
            tokens = self._encode(text, special=special, add_special=True)
        else:
            tokens = self._encode(text, special=special)
        return self.with_bos(tokens)

    @cached_property
    def _can_add_special(self) -> bool:
        """Whether all tokens exist that llama.cpp would put around a text: it asserts that they do."""
        vocab = self._vocab
        is_wpm = llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_WPM
        wanted = [
            (llama_cpp.llama_vocab_bos, is_wpm or llama_cpp.llama_vocab_get_add_bos(vocab)),
            (llama_cpp.llama_vocab_eos, not is_wpm and llama_cpp.llama_vocab_get_add_eos(vocab)),
            (llama_cpp.llama_vocab_sep, is_wpm),
        ]
        return all(token(vocab) != -1 for token, is_wanted in wanted if is_wanted)

    def _parts(self, text: str, special: bool, marks: Marks) -> Iterator[tuple[str, bool]]:
        """The text in as few parts as possible, each with whether special tokens are recognised in it.

        Cut where llama.cpp cuts as well, at special tokens outside of what is marked.
        """
        if not marks or not special:
            yield restore(text, marks), special
            return
        text = _unescaped(text, marks)
        begin, end_of_text = 0, _Special(-1, "", 0)
        edges = [(0, 0, end_of_text), *self._spans(text), (len(text), len(text), end_of_text)]
        for (_, left, before), (right, _, after) in pairwise(edges):
            fragment = text[left:right]
            if not any(stand_in in fragment for stand_in in marks):
                continue
            if begin < left:
                yield text[begin:left], True
            if before.attributes & llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP:
                fragment = fragment.lstrip(_SPACE)
            if after.attributes & llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP:
                fragment = fragment.rstrip(_SPACE)
            yield restore(fragment, marks), False
            begin = right
        if begin < len(text):
            yield text[begin:], True

    def _spans(self, text: str) -> list[tuple[int, int, _Special]]:
        """Begin and end of the guarded tokens in a text, found as llama.cpp does it."""
        spans, fragments = [], [(0, len(text))]
        for special in self._special:
            if special.text not in text:
                continue
            rest = []
            for begin, end in fragments:
                while (at := text.find(special.text, begin, end)) >= 0:
                    spans.append((at, at + len(special.text), special))
                    rest.append((begin, at))
                    begin = at + len(special.text)
                rest.append((begin, end))
            fragments = rest
        return sorted((span for span in spans if span[2].is_guarded), key=lambda span: span[0])

    def _part(self, text: str, special: bool) -> list[int]:
        """Tokens of a text at its beginning or next to a special token."""
        if special:
            return self._encode(text, special=True)
        ends = [at + 1 for at, _ in self._find_hidden(text)]  # in the middle of what shall not be recognised
        tokens: list[int] = []
        for begin, end in pairwise([0, *ends, len(text)]):
            piece = text[begin:end]
            tokens += self._more(piece, False) if begin else self._encode(piece, special=False)
        return tokens

    def _more(self, text: str, special: bool) -> list[int]:
        """Tokens of a text where it goes on from other text; alone, some vocabularies would put a space before it."""
        start = self._encode("\n", special=special)
        tokens = self._encode("\n" + text, special=special)
        # Where the line break grew together with the text, the vocabulary is of the kind that adds no space.
        return tokens[len(start) :] if tokens[: len(start)] == start else self._encode(text, special=special)

    def _encode(self, text: str | bytes, *, special: bool, add_special: bool = False) -> list[int]:
        """llama_tokenize, on a thread whose stack is large enough for the text."""
        text = text if isinstance(text, bytes) else encode(text)
        if len(text) > _LONGEST_TEXT:
            raise TextError(f"the text has {len(text)} bytes, {_LONGEST_TEXT} are possible")
        if self._splits_numbers_from_their_end and not add_special:
            cuts = [0, *_cuts_in_numbers(text), len(text)]
            return [t for begin, end in pairwise(cuts) for t in self._call(text[begin:end], special, False)]
        return self._call(text, special, add_special)

    @cached_property
    def _splits_numbers_from_their_end(self) -> bool:
        return bool(self._vocab) and self._model.metadata().get("tokenizer.ggml.pre") == "superbpe"

    def _call(self, text: bytes, special: bool, add_special: bool) -> list[int]:
        stack = self._stack_for(text)
        return _native.tokenize(self._vocab, text, add_special=add_special, parse_special=special, n_stack=stack)

    def _stack_for(self, text: bytes) -> int:
        """Bytes of stack to tokenize a text with, of which few are used nearly always; 0 = whatever the thread has."""
        if len(text) <= _SHORT_MATCH or llama_cpp.llama_vocab_type(self._vocab) != llama_cpp.LLAMA_VOCAB_TYPE_BPE:
            return 0
        longest = _native.longest_match(text)
        if longest <= _SHORT_MATCH:
            return 0
        n_stack, available = _STACK_BESIDE + longest * _STACK_PER_BYTE, memory().available
        if n_stack > available:
            raise TextError(
                f"the text has up to {longest} bytes without a break; splitting them into words may take "
                f"{n_stack / 2**30:.1f} GiB of stack, {available / 2**30:.1f} GiB of memory are available"
            )
        return n_stack

    # ---- what texts say and what templates say -----------------------------------------------------------------------

    def mark(self, value: Any) -> tuple[Any, Marks]:
        """A copy of a text, or of lists and dicts that hold texts, in which no special token can be recognised.

        The first character of each text of such a token is replaced by a stand-in, a character that occurs nowhere, so
        that a template renders the copy as it would the original. `tokens` takes what it renders, with the marks.
        Raises TextError.
        """
        texts = list(_texts_in(value))
        for text in texts:
            encode(text)
        if not any(self._starts(text) for text in texts):
            return value, NO_MARKS
        stand_ins = _unused_characters(len(self._firsts), texts)
        stand_in_of = dict(zip(self._firsts, stand_ins, strict=True))

        def marked(text: str) -> str:
            parts, begin = [], 0
            for at in self._starts(text):
                parts += [text[begin:at], stand_in_of[text[at]]]
                begin = at + 1
            return "".join(parts) + text[begin:]

        return _map_texts(value, marked), dict(zip(stand_ins, self._firsts, strict=True))

    def _starts(self, text: str) -> list[int]:
        """Where guarded tokens begin in a text, also such as could go on in what a template puts behind it."""
        longest = max((len(special.text) for special in self._guarded), default=0)
        tail = [at for at in range(max(0, len(text) - longest + 1), len(text)) if text[at] in self._firsts]
        begun = {at for at in tail if any(special.text.startswith(text[at:]) for special in self._guarded)}
        return sorted(begun | {at for at, _ in self._find_guarded(text)})

    # ---- from tokens to texts --------------------------------------------------------------------------------------

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """What tokens spell: control tokens nothing, unless `special`. Raises TextError for numbers that are no tokens.

        As llama_cpp's `LlamaTokenizer`, without its limit of 32 bytes a token.
        """
        spelled = b"".join([self._piece(int(token), special or token in self._spelled) for token in tokens])
        if spelled[:1] == b" " and tokens[0] == llama_cpp.llama_vocab_bos(self._vocab):
            return spelled[1:]
        return spelled

    def _piece(self, token: int, special: bool) -> bytes:
        piece = self._pieces.get((token, special))
        if piece is None:
            piece = self._pieces[token, special] = self._look_up_piece(token, special)
        return piece

    def _look_up_piece(self, token: int, special: bool) -> bytes:
        n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        if not 0 <= token < n_vocab:
            raise TextError(f"{token} is no token of the model (0 to {n_vocab - 1})")
        size = 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def spelled_in(self, stop: Sequence[str]) -> frozenset[int]:
        """Tokens that spell nothing and whose texts occur in strings that end an answer."""
        found = {special for text in stop for _, special in self._find_guarded(text)}
        return frozenset(special.token for special in found if special.attributes & _SPELLS_NOTHING)

    @contextmanager
    def spelling(self, tokens: frozenset[int]) -> Iterator[None]:
        """Let `detokenize` spell tokens that spell nothing otherwise."""
        before, self._spelled = self._spelled, tokens
        try:
            yield
        finally:
            self._spelled = before


# ---- texts of templates ----------------------------------------------------------------------------------------------


class MarkedText(str):
    """What a template made of marked texts, for `Llama.tokenize`: its marks stay with it when it is encoded."""

    marks: Marks

    def __new__(cls, text: str, marks: Marks) -> MarkedText:
        self = super().__new__(cls, text)
        self.marks = marks
        return self

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> MarkedBytes:
        """As UTF-8. Raises TextError."""
        encoded = MarkedBytes(encode(str(self)))
        encoded.marks = self.marks
        return encoded


class MarkedBytes(bytes):
    """An encoded `MarkedText`."""

    marks: Marks


class TextFormatter(ChatFormatter):
    """A chat formatter whose own words alone have special tokens: what it is given are texts."""

    def __init__(self, formatter: ChatFormatter, tokenizer: Tokenizer) -> None:
        self._formatter = formatter
        self._tokenizer = tokenizer

    def __call__(self, **arguments: Any) -> ChatFormatterResponse:
        """As the formatter, with a `MarkedText` as prompt."""
        marked, marks = self._tokenizer.mark(arguments)
        response = self._formatter(**marked)
        response.prompt = MarkedText(response.prompt, marks)
        return response

    def to_chat_handler(self) -> LlamaChatCompletionHandler:
        """For `Llama.create_chat_completion`."""
        return chat_formatter_to_chat_completion_handler(self)


def text_handler(handler: LlamaChatCompletionHandler, tokenizer: Tokenizer) -> LlamaChatCompletionHandler:
    """One of llama_cpp's chat handlers with a `TextFormatter` in it; handlers without a formatter stay as they are."""
    if not inspect.isfunction(handler):
        return handler
    formatter = inspect.getclosurevars(handler).nonlocals.get("chat_formatter")
    return handler if formatter is None else TextFormatter(formatter, tokenizer).to_chat_handler()


def encode(text: str) -> bytes:
    """A text in UTF-8. Raises TextError for what is none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"the text is not Unicode: half a character at position {error.start}") from error


def restore(text: str, marks: Marks) -> str:
    """A marked text as it was."""
    return text.translate({ord(stand_in): character for stand_in, character in marks.items()}) if marks else text


def _unescaped(text: str, marks: Marks) -> str:
    """A text in which stand-ins are themselves, also where a template wrote it as ASCII JSON."""
    for stand_in in marks:
        text = text.replace(json.dumps(stand_in)[1:-1], stand_in)
    return text


def _unused_characters(n: int, texts: Sequence[str]) -> list[str]:
    """`n` characters that occur in none of the texts, neither as themselves nor in ASCII JSON; the same ones for most
    texts."""
    for begin in range(_PRIVATE_USE.start, _PRIVATE_USE.stop - n, n):
        characters = [chr(begin + i) for i in range(n)]
        forms = [*characters, *(json.dumps(c)[1:-1] for c in characters)]
        if not any(form in text for text in texts for form in forms):
            return characters
    raise TextError("the text uses all of Unicode's private characters")


def _cuts_in_numbers(text: bytes) -> Iterator[int]:
    """Where a text can be cut for a pre-tokenizer that makes groups of three digits from the end of a number.

    llama.cpp's looks ahead to that end from each digit, which takes minutes for 100,000 of them.
    """
    for number in _LONG_NUMBER.finditer(text):
        yield from range(number.end() - (number.end() - number.start() - 1) // _DIGITS * _DIGITS, number.end(), _DIGITS)


def _finder(specials: Sequence[_Special]) -> Callable[[str], Iterator[tuple[int, _Special]]]:
    """A function that finds where texts of tokens begin in a text: (character index, token), the longest of each."""
    by_text = {special.text: special for special in specials}
    if not by_text:
        return lambda _: iter(())
    firsts = re.compile("|".join(map(re.escape, sorted({text[0] for text in by_text}))))
    lengths = sorted({len(text) for text in by_text}, reverse=True)

    def find(text: str) -> Iterator[tuple[int, _Special]]:
        for match in firsts.finditer(text):
            at = match.start()
            special = next((s for n in lengths if (s := by_text.get(text[at : at + n]))), None)
            if special is not None:
                yield at, special

    return find


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts_in(item)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_texts(item, change) for item in value]
    return value
