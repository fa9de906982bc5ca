"""The models that a server offers, of which one is loaded at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp

from selfextend_gguf.errors import UnknownModelError
from selfextend_gguf.llama import Llama
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.planning import PARAMETERS, default_context, plan_if_beyond, whole_cells
from selfextend_gguf.prompt import chat_formatter
from selfextend_gguf.server.kept_prompts import KeptPrompts, RememberingLlama
from selfextend_gguf.server.work import current_work, stop_if_unwanted
from selfextend_gguf.tokenizer import TextFormatter


@dataclass(frozen=True)
class ServedModel:
    """What is known of a model without loading it, and how it is loaded."""

    alias: str
    info: ModelInfo
    n_ctx: int  #: extended context in tokens
    formatter: TextFormatter | None  #: the model's chat template, if it has one
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
        **template: Any,
    ) -> ServedModel:
        """`template` are arguments of `ModelInfo`. Raises ModelFileError, ConfigError when the context cannot be
        reached, and TemplateError."""
        info = ModelInfo(path, verbose=arguments["verbose"], **template)
        parameters = {name: arguments[name] for name in PARAMETERS}
        n_ctx = whole_cells(ctx or default_context(info.n_ctx_train, **parameters))
        plan_if_beyond(info.n_ctx_train, n_ctx, **parameters)
        formatter = None
        if info.chat_template:
            renderer = chat_formatter(info)
            renderer.check()  # rather now than with each request
            formatter = TextFormatter(renderer, info.tokenizer)
        return cls(alias, info, n_ctx, formatter, arguments, keep)

    def load(self) -> Llama:
        """Load the model. Raises what `Llama` raises."""
        handler = self.formatter.to_chat_handler() if self.formatter else None
        llm = ServedLlama(
            str(self.info.path), n_ctx=self.n_ctx, model_info=self.info, chat_handler=handler, **self.arguments
        )
        llm.progress = stop_if_unwanted
        llm.kept_prompts = self.keep()
        return llm

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


class ServedLlama(RememberingLlama):
    """Counts the tokens of an answer, which streams do not tell."""

    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """Tokens, as the parent generates them."""
        for token in super().generate(*args, **kwargs):
            current_work().n_generated += not llama_cpp.llama_vocab_is_eog(self._model.vocab, token)
            yield token


class OneModelAtATime:
    """What llama-cpp-python's server asks for its model, in place of its `LlamaProxy`.

    That one answers in the name of any unknown model with the first one. Called under the server's lock only.
    """

    def __init__(self, models: list[ServedModel]) -> None:
        """Loads the first of `models`."""
        self._models = {model.alias: model for model in models}
        self._default = models[0].alias
        self._alias: str | None = None
        self._llm: Llama | None = None
        self._load(models[0])

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def find(self, name: str | None) -> ServedModel:
        """The model of that name, the first one for None. Raises UnknownModelError."""
        try:
            return self._models[self._default if name is None else name]
        except KeyError:
            raise UnknownModelError(f"the model {name!r} does not exist; there is {', '.join(self._models)}") from None

    def __call__(self, name: str | None = None) -> Llama:
        """The loaded model of that name; loading it closes the one before."""
        stop_if_unwanted()  # the client may have left while it waited
        model = self.find(name)
        if self._llm is None or self._alias != model.alias:
            return self._load(model)
        return self._llm

    def _load(self, model: ServedModel) -> Llama:
        self.close()
        llm = self._llm = model.load()
        self._alias = model.alias
        return llm

    def close(self) -> None:
        """Free the loaded model."""
        if self._llm is not None:
            self._llm.close()
            self._llm = None
