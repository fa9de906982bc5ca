"""The format of a chat template: the one that reads what the template makes of a call."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

from selfextend_gguf.errors import TemplateError
from selfextend_gguf.tool_calls.families import FORMATS, GENERIC
from selfextend_gguf.tool_calls.formats import Format
from selfextend_gguf.tool_calls.reading import CallReader

_NAME = "look_up"
_QUESTION = {"role": "user", "content": "What is red?"}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call00001", "type": "function", "function": {"name": _NAME, "arguments": {"word": "red"}}}
    ],
}  # fmt: skip
_WORD = {"type": "string", "description": "A word"}
_PARAMETERS = {"type": "object", "properties": {"word": _WORD}, "required": ["word"]}
_TOOL = {"type": "function", "function": {"name": _NAME, "description": "Look up", "parameters": _PARAMETERS}}


def format_of(render: Callable[[list[dict[str, Any]], list[dict[str, Any]]], str]) -> Format | None:
    """The format of a template, which `render` applies to messages and tools; None if no format reads its calls."""
    try:
        asked = render([_QUESTION], [_TOOL])
        called = render([_QUESTION, _CALL], [_TOOL])
    except TemplateError:
        return None
    # The prompt for an answer may begin a thought, or a mark, that what the template makes of a call goes on with.
    written = called[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(asked, called, strict=False))) :]
    with_header = called[called.rfind(_QUESTION["content"]) :]
    form = next((form for form in FORMATS if _reads(form, written) or _reads(form, with_header)), None)
    if form is None and _NAME not in written:  # calls of earlier turns are left out; the prompt may say how to call
        return next((form for form in FORMATS if any(sign in asked for sign in (*form.begins, *form.signs))), GENERIC)
    return form


def _reads(form: Format, written: str) -> bool:
    reader = CallReader(form, {_NAME: _PARAMETERS})
    calls = [part for parts in (reader.feed(written), reader.finish()) for part in parts if part.name]
    return [(call.name, call.arguments) for call in calls] == [(_NAME, '{"word": "red"}')]
