"""The models that a server offers, of which one is loaded at a time."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from selfextend_gguf.errors import UnknownModelError
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.planning import PARAMETERS, default_context, plan_if_beyond, whole_cells
from selfextend_gguf.prompt import Prompt, chat_formatter
from selfextend_gguf.schedule import SelfExtendConfig
from selfextend_gguf.server.kept_prompts import KeptPrompts
from selfextend_gguf.server.logprobs import Chosen, PromptNotes
from selfextend_gguf.server.messages import Message, render
from selfextend_gguf.server.sharing import Share, Shared, SharingLlama
from selfextend_gguf.server.turns import Ticket, Turns
from selfextend_gguf.server.work import stop_if_unwanted
from selfextend_gguf.templates import ChatTemplate
from selfextend_gguf.tool_calls.choosing import format_of
from selfextend_gguf.tool_calls.formats import Format


@dataclass(frozen=True)
class ServedModel:
    """What is known of a model without loading it, and how it is loaded."""

    alias: str
    info: ModelInfo
    n_ctx: int  #: extended context in tokens
    self_extend: SelfExtendConfig | None  #: None = the context is within the trained one
    template: ChatTemplate | None  #: the model's chat template, if it has one
    arguments: dict[str, Any]  #: of `Llama`, besides path and context
    keep: Callable[[], KeptPrompts]  #: where its prompts are kept while it is loaded

    @classmethod
    def from_file(
        cls,
        path: Path,
        alias: str,
        ctx: int | None,
        arguments: dict[str, Any],
        keep: Callable[[], KeptPrompts],
        **templates: Any,
    ) -> ServedModel:
        """`templates` are arguments of `ModelInfo`. Raises ModelFileError, ConfigError when the context cannot be
        reached, and TemplateError."""
        info = ModelInfo(path, verbose=arguments["verbose"], **templates)
        parameters = {name: arguments[name] for name in PARAMETERS}
        n_ctx = whole_cells(ctx or default_context(info.n_ctx_train, **parameters))
        self_extend = plan_if_beyond(info.n_ctx_train, n_ctx, **parameters)
        template = None
        if info.chat_template:
            template = chat_formatter(info)
            template.check()  # rather now than with each request
        return cls(alias, info, n_ctx, self_extend, template, arguments, keep)

    def load(self) -> ServedLlama:
        """Load the model. Raises what `Llama` raises."""
        llm = ServedLlama(str(self.info.path), n_ctx=self.n_ctx, model_info=self.info, **self.arguments)
        llm.kept_prompts = self.keep()
        return llm

    @functools.cached_property
    def call_format(self) -> Format | None:
        """How the model writes calls of tools; None if that is not known."""
        template = self.template
        if template is None:
            return None
        return format_of(
            lambda messages, tools: render(
                [Message.model_validate(message) for message in messages],
                lambda plain: template(messages=plain, tools=tools).prompt,
            )
        )

    def text_of(self, prompt: str | Sequence[int], *, special: bool = False) -> str:
        """The text of a prompt that may be tokens, control tokens left out unless `special`. Raises TextError."""
        if isinstance(prompt, str):
            return prompt
        return self.info.tokenizer.detokenize(prompt, special=special).decode("utf-8", "replace")

    def describe(self) -> dict[str, Any]:
        """The model as an entry of /v1/models."""
        created = int(self.info.path.stat().st_mtime)
        return {
            "id": self.alias,
            "object": "model",
            "created": created,
            "owned_by": "selfextend-gguf",
            "n_ctx_train": self.info.n_ctx_train,
            "n_ctx": self.n_ctx,
        }


class ServedLlama(SharingLlama):
    """Notes the tokens of an answer."""

    #: The tokens of the last answer, without the one that ended it.
    answer: list[Chosen]
    #: Likeliest tokens to note beside each of them; None = none, nor how likely it was itself.
    n_top: int | None = None

    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """Tokens, as the parent generates them."""
        self.answer = []
        for token in super().generate(*args, **kwargs):
            if not llama_cpp.llama_vocab_is_eog(self._model.vocab, token):
                self.answer.append(self._noted(token))
            yield token

    @contextlib.contextmanager
    def noting_prompt(self, prompt: Prompt, begin: int) -> Iterator[list[Chosen]]:
        """Inside, a prompt is read from its beginning; its tokens from `begin` on come into the list meanwhile."""
        notes = PromptNotes(prompt.tokens, begin, self.n_top or 0, functools.partial(self.detokenize, special=True))
        self.on_logits, self.reads_anew = notes.note, True
        try:
            yield notes.tokens
        finally:
            self.on_logits, self.reads_anew = None, False

    def _noted(self, token: int) -> Chosen:
        if self.n_top is None:
            return Chosen(token, self.detokenize([token]))
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.ctx, -1), (self._n_vocab,))
        return Chosen.among(logits, token, self.n_top, self.detokenize)


class OneModelAtATime:
    """The models, of which one is loaded. Whoever has the turn works with it."""

    def __init__(self, models: list[ServedModel], *, any_name: bool = True) -> None:
        """`any_name`: whether a single model answers to other names too, as many clients have one built in."""
        self.has_loaded = False  #: whether a model was ever loaded
        self.turns = Turns()
        self._models = {model.alias: model for model in models}
        self._default = models[0].alias
        self._any_name = any_name and len(models) == 1
        self._alias: str | None = None
        self._loaded: ServedLlama | None = None
        self._shared: Shared[ServedLlama] | None = None
        self._loading = threading.Event()

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    @contextlib.contextmanager
    def turn(self, ticket: Ticket) -> Iterator[ServedLlama]:
        """The model that a request needs, for its text, loaded once it is its turn; others may have theirs between any
        two steps of the model. Loading closes the model before. Raises RequestStoppedError."""
        try:
            self.turns.take(ticket, stop_if_unwanted)
            stop_if_unwanted()  # the client may have left while it waited
            shared = self._shared_of(self.find(ticket.alias))
            shared.llm = shared.llm.beside(Share(shared, ticket, stop_if_unwanted))
            yield shared.llm
        finally:
            self.turns.leave(ticket)

    @property
    def is_busy(self) -> bool:
        """Whether a request is worked on, or a model is loaded."""
        return self.status == "loading" or any(ticket.has_begun for ticket in self.turns)

    @property
    def n_waiting(self) -> int:
        """Requests that wait for their first turn."""
        return sum(not ticket.has_begun for ticket in self.turns)

    @property
    def status(self) -> str:
        """What a health check is told: "loading" while a model is loaded, else "ok"."""
        return "loading" if self._shared is None or self._loading.is_set() else "ok"

    def find(self, name: str | None) -> ServedModel:
        """The model for requests that name it so, the first one for None. Raises UnknownModelError."""
        return self.named(self._default if name is None or self._any_name else name)

    def named(self, name: str) -> ServedModel:
        """The model of that name. Raises UnknownModelError."""
        try:
            return self._models[name]
        except KeyError:
            raise UnknownModelError(f"the model {name!r} does not exist; there is {', '.join(self._models)}") from None

    def load_first(self) -> None:
        """Load the first model, unless one is loaded."""
        ticket = self.turns.enter(self._default)
        try:
            self.turns.take(ticket)
            if self._shared is None:
                self._shared_of(self.find(None))
        finally:
            self.turns.leave(ticket)

    def _shared_of(self, model: ServedModel) -> Shared[ServedLlama]:
        if self._shared is not None and self._alias == model.alias:
            return self._shared
        self._loading.set()
        try:
            self.close()
            self._loaded = model.load()
            self._shared = Shared(self._loaded, self.turns)
            self._alias = model.alias
            self.has_loaded = True
            return self._shared
        finally:
            self._loading.clear()

    def close(self) -> None:
        """Free the loaded model."""
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = self._shared = None
