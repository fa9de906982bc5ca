"""From messages to the text and the tokens a model expects."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from selfextend_gguf.errors import ConfigError, TemplateError
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.reasoning import OFF, ON, end_of_open_thought, speaks_of_thoughts
from selfextend_gguf.templates import ChatTemplate, chat_template
from selfextend_gguf.tokenizer import NO_MARKS, Marks

#: "role" ("system", "user" or "assistant"), "content" and, where the model thought, "reasoning_content", as chat
#: templates take them.
Message = dict[str, str]


@dataclass(frozen=True)
class Rendering:
    """A conversation as one text to complete."""

    text: str
    special: bool  # whether it holds special tokens
    marks: Marks = field(default_factory=dict)  # what of it is no special token all the same
    stop: list[str] = field(default_factory=list)  # strings that end the answer


@dataclass(frozen=True)
class Prompt:
    """Tokens to complete and the strings that end the answer."""

    tokens: list[int]
    stop: list[str] = field(default_factory=list)
    thought_end: str | None = None  # the tag that ends the thought which the prompt begins, if it begins one


def render_raw(messages: Sequence[Message], *, special: bool = False) -> Rendering:
    """The messages one after another as they are; a system message is a paragraph of its own."""
    texts = [m["content"] + "\n\n" * (m["role"] == "system") for m in messages]
    return Rendering("".join(texts), special)


def chat_formatter(info: ModelInfo) -> ChatTemplate:
    """The model's own chat template. Raises ConfigError when it has none."""
    if info.chat_template is None:
        raise ConfigError("the model has no chat template")
    switched_off = {} if info.may_think else OFF
    return chat_template(info.model, info.chat_template, switched_off | info.template_variables)


def render_chat(info: ModelInfo, messages: Sequence[Message], *, special: bool = False) -> Rendering:
    """The messages in the model's own chat template, up to where the answer begins.

    Special tokens are those of the template; with `special` also such as the messages spell. Raises ConfigError when
    the model has no template or its template fails.
    """
    marked: Any = list(messages)
    marks = NO_MARKS
    if not special:
        marked, marks = info.tokenizer.mark(marked)
    formatter = chat_formatter(info)
    try:
        rendered = formatter(messages=marked)
    except TemplateError as error:
        raise TemplateError(f"{error}; --raw leaves it out") from error
    stop = rendered.stop if isinstance(rendered.stop, list) else [rendered.stop] if rendered.stop else []
    return Rendering(rendered.prompt, True, marks, [s for s in stop if s])


def always_thinks(info: ModelInfo) -> bool:
    """Whether the chat template is for a model that thinks, and none of the usual variables switches that off."""
    template = info.chat_template
    if template is None or not speaks_of_thoughts(template):
        return False
    question = [{"role": "user", "content": "?"}]
    with contextlib.suppress(TemplateError):  # whoever uses it will hear of it
        off, on = (chat_template(info.model, template, switch)(messages=question).prompt for switch in (OFF, ON))
        return off == on
    return False


def uses_template(info: ModelInfo, *, raw: bool) -> bool:
    """Whether messages are put into the model's chat template: if it has one, unless they shall stay as they are."""
    return info.chat_template is not None and not raw


def render(info: ModelInfo, messages: Sequence[Message], *, raw: bool, special: bool = False) -> Rendering:
    """The messages as one text to complete. Raises ConfigError when the model's template fails."""
    if uses_template(info, raw=raw):
        return render_chat(info, messages, special=special)
    return render_raw(messages, special=special)


def make_prompt(
    info: ModelInfo, text: str, system: str | None = None, *, raw: bool = False, special: bool = False
) -> Prompt:
    """`text` as a user's message; `special`: special tokens are recognised in it.

    Raises ConfigError when the model's template fails, and TextError.
    """
    return conversation_prompt(info, with_system(system, [{"role": "user", "content": text}]), raw=raw, special=special)


def conversation_prompt(
    info: ModelInfo, messages: Sequence[Message], *, raw: bool = False, special: bool = False
) -> Prompt:
    """As `make_prompt`, of messages of which the last is to be answered."""
    rendering = render(info, messages, raw=raw, special=special)
    tokens = info.tokenizer.tokens(rendering.text, special=rendering.special, marks=rendering.marks)
    return Prompt(tokens, rendering.stop, end_of_open_thought(rendering.text))


def with_system(system: str | None, messages: Sequence[Message]) -> list[Message]:
    """The messages after a system message, if there is one."""
    return [*([] if system is None else [{"role": "system", "content": system}]), *messages]
