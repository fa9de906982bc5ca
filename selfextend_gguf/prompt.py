"""From a user's text to the tokens a model expects."""

from __future__ import annotations

from dataclasses import dataclass, field

import jinja2
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.model_info import ModelInfo


@dataclass(frozen=True)
class Prompt:
    """Tokens to complete and the strings that end the answer."""

    tokens: list[int]
    stop: list[str] = field(default_factory=list)


def raw_prompt(info: ModelInfo, text: str) -> Prompt:
    """`text` as it is, with the model's BOS token if it wants one."""
    return Prompt(info.tokenize(text.encode(), add_bos=info.model.add_bos_token()))


def chat_formatter(info: ModelInfo) -> Jinja2ChatFormatter:
    """The model's own chat template. Raises ConfigError when it has none or when it is no template."""
    if info.chat_template is None:
        raise ConfigError("the model has no chat template")

    def piece(token: int) -> str:
        return info.model.token_get_text(token) if token != -1 else ""

    try:
        return Jinja2ChatFormatter(
            info.chat_template, eos_token=piece(info.model.token_eos()), bos_token=piece(info.model.token_bos())
        )
    except jinja2.TemplateError as error:
        raise ConfigError(f"the model's chat template failed ({error}); --raw leaves it out") from error


def chat_prompt(info: ModelInfo, text: str, system: str | None = None) -> Prompt:
    """`text` as a user's message in the model's own chat template.

    Raises ConfigError when the model has no template or its template fails.
    """
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    formatter = chat_formatter(info)
    try:
        rendered = formatter(messages=messages)  # type: ignore[arg-type]
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise ConfigError(f"the model's chat template failed ({error}); --raw leaves it out") from error
    tokens = info.tokenize(rendered.prompt.encode(), add_bos=not rendered.added_special and info.model.add_bos_token())
    stop = rendered.stop if isinstance(rendered.stop, list) else [rendered.stop] if rendered.stop else []
    return Prompt(tokens, [s for s in stop if s])
