"""/set: options of answers that can change during a chat."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from selfextend_gguf.arguments import check_arguments
from selfextend_gguf.checks import check_all
from selfextend_gguf.errors import ConversationError
from selfextend_gguf.llama import Llama
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.sampling import COMPLETION

from .options import predict_option, sampling_options, take_more_samplers, take_sampling
from .settings import key_of, settable
from .thoughts import reasoning_option, switch_thinking


@click.command()
@predict_option(None)
@sampling_options
@reasoning_option
def _set() -> None:
    """What /set knows; never called."""


_OPTIONS = {flag.lstrip("-"): option for option in settable(_set) for flag in option.opts}
KEYS = [key_of(option) for option in settable(_set)]  #: what can be set
NAMES = {option.name for option in settable(_set)}  #: the same, as parameters of `chat`


class AnswerOptions:
    """The options of answers: those of a `chat`, as its context has them, and what /set makes of them."""

    def __init__(self, context: click.Context, info: ModelInfo) -> None:
        """Raises UsageError, ConfigError, GrammarError."""
        self._context = context
        self._info = info
        self._new_seed: int | None = None  # that the model does not have yet
        self._take({name: context.params[name] for name in NAMES})

    def _take(self, values: dict[str, Any]) -> None:
        """All values, by `NAMES`, or none of them if one is wrong."""
        sampling = check_all(COMPLETION, take_sampling(dict(values), self._info))
        more_samplers = take_more_samplers(dict(values))
        check_arguments({"last_n_tokens_size": values["repeat_last_n"], "seed": values["seed"]})
        self._values = values
        self.sampling = sampling  #: arguments of `create_completion`
        self._more_samplers = more_samplers

    @property
    def predict(self) -> int | None:
        """Most tokens of an answer; None where nobody said."""
        value: int | None = self._values["predict"]
        return value

    @property
    def reasoning(self) -> str:
        """What becomes of thoughts: "show", "hide", "off"."""
        return str(self._values["reasoning"])

    def use_in(self, llm: Llama) -> None:
        """Let a model sample by them."""
        llm.more_samplers = self._more_samplers
        llm.last_n_tokens_size = self._values["repeat_last_n"]
        if self._new_seed is not None:  # another sequence of answers begins
            llm.set_seed(self._new_seed)
            self._new_seed = None

    def set(self, key: str, text: str) -> None:
        """Give an option another value, or its default for "". Raises as the constructor, and ConversationError."""
        option = _OPTIONS.get(key.lstrip("-"))
        if option is None or option.name is None:
            raise ConversationError(f"no option {key}: /set lists them")
        name, context = option.name, _set.make_context("/set", [])
        value = context.params[name]
        if text:
            value = option.process_value(context, option.type.split_envvar_value(text) if option.multiple else text)
        source = self._context.get_parameter_source(name)
        # Of options that exclude each other, this one is as near as one that was typed.
        self._context.set_parameter_source(name, ParameterSource.COMMANDLINE if text else ParameterSource.DEFAULT)
        try:
            self._take(self._values | {name: value})
        except BaseException:
            self._context.set_parameter_source(name, source or ParameterSource.DEFAULT)
            raise
        if name == "seed":
            self._new_seed = value
        elif name == "reasoning":
            switch_thinking(self._info, value)

    def __str__(self) -> str:
        """Each option with its value, if it has one."""
        values = {key: self._values[_OPTIONS[key].name or key] for key in KEYS}
        return ", ".join(f"{key} {_shown(value)}".rstrip() for key, value in values.items())


def _shown(value: Any) -> str:
    if value is None or value is False:
        return ""
    return " ".join(value) if isinstance(value, tuple) else str(value)
