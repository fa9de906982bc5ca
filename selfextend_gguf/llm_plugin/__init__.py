"""Models of ours in the program `llm` (https://llm.datasette.io): an entry point, found when both are installed.

    llm -m sx-hf:USER/REPO/FILE.gguf -f book.txt "Who is the narrator?"
    llm -m sx -o model ~/models/model.gguf -f sx:report.pdf "What was decided?"

`llm` imports this whenever it starts, so llama.cpp is imported where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llm
from pydantic import Field

from selfextend_gguf.documents import read_document
from selfextend_gguf.errors import ModelFileError, SelfExtendError
from selfextend_gguf.stores import STORES, is_name, names

if TYPE_CHECKING:
    from selfextend_gguf.llm_plugin.opened import OpenedModel


class _Options(llm.Options):
    ctx: int | None = Field(default=None, ge=1, description="context in tokens [what prompt and answer need]")
    max_tokens: int = Field(default=-1, ge=-1, description="longest answer in tokens; -1 = until the model ends it")
    temperature: float = Field(default=0.8, ge=0, description="0 = the likeliest token each time")
    top_p: float = Field(default=0.95, ge=0, le=1, description="fraction of the probability to choose from")
    seed: int | None = Field(default=None, ge=0, description="of the random numbers")
    reasoning: bool = Field(default=True, description="whether the model may think before it answers")


class _OptionsWithModel(_Options):
    model: str | None = Field(default=None, description="path of a GGUF file, or a name such as hf:USER/REPO")


class SelfExtendModel(llm.Model):
    """A model that `sx-gguf models` lists; or, without a name, the one that the option `model` names."""

    can_stream = True
    supports_schema = True

    def __init__(self, name: str | None) -> None:
        self.model_id = "sx" if name is None else f"sx-{name}"
        self.Options = _OptionsWithModel if name is None else _Options  # type: ignore[assignment]
        self._name = name
        self._opened: OpenedModel | None = None

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[Any]:
        """Stream the answer. What the model has read of the messages before is not read again."""
        from selfextend_gguf.llm_plugin.opened import OpenedModel

        options: Any = prompt.options
        name = self._name or options.model
        if name is None:
            raise llm.ModelError("which model? give one: -o model PATH, or a name such as hf:USER/REPO")
        name = name if is_name(name) else str(Path(name).expanduser())
        if self._opened is None or self._opened.made_of != (name, options.reasoning):
            if self._opened is not None:
                self._opened.close()
                self._opened = None
            self._opened = OpenedModel(name, reasoning=options.reasoning)
        yield from self._opened.answer(prompt, response)


@llm.hookimpl
def register_models(register: Callable[[llm.Model], None]) -> None:
    register(SelfExtendModel(None))
    for path in sorted(Path().glob("*.gguf")):
        register(SelfExtendModel(path.name))
    for store in STORES:
        with suppress(ModelFileError, OSError):  # `sx-gguf models` says what is wrong
            for name in names(store):
                register(SelfExtendModel(name))


@llm.hookimpl
def register_fragment_loaders(register: Callable[[str, Callable[[str], llm.Fragment]], None]) -> None:
    register("sx", _document)


def _document(path: str) -> llm.Fragment:
    """Text of a PDF, EPUB, DOCX or HTML file, or of a text in any encoding: `-f sx:report.pdf`."""
    try:
        return llm.Fragment(read_document(Path(path).expanduser()).text, path)  # type: ignore[no-untyped-call]
    except SelfExtendError as error:
        raise ValueError(str(error)) from error
