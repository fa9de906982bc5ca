"""A model that `llm` talks to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import llm
from llm.parts import StreamEvent, TextPart

from selfextend_gguf.chat_schemas import SchemaGrammar
from selfextend_gguf.cores import fast_cores
from selfextend_gguf.generate import stream_completion
from selfextend_gguf.llama import Llama
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.planning import whole_cells
from selfextend_gguf.prompt import Message, conversation_prompt
from selfextend_gguf.stores import model_path

ROOM = 4096  # tokens for answers and further messages, where no context is given


class OpenedModel:
    """A model file, and what has been read of a conversation."""

    def __init__(self, name: str, *, reasoning: bool) -> None:
        self.made_of = name, reasoning
        self._path = model_path(name)
        self._info = ModelInfo(self._path)
        self._info.may_think = reasoning
        self._llama: Llama | None = None

    def answer(self, prompt: llm.Prompt, response: llm.Response) -> Iterator[str | StreamEvent]:
        options: Any = prompt.options
        asked = conversation_prompt(self._info, _messages(prompt.messages))
        llama = self._llama_for(len(asked.tokens) + max(1, options.max_tokens), options.ctx)
        pieces = stream_completion(
            llama,
            asked,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            grammar=None if prompt.schema is None else SchemaGrammar(json.dumps(prompt.schema)),
        )
        for piece in pieces:
            if piece.kind == "answer":
                yield piece.text
            elif piece.kind == "thought":
                yield StreamEvent(type="reasoning", chunk=piece.text)
            timings = piece.timings
        response.set_usage(
            input=timings.prompt_tokens,
            output=timings.generated_tokens,
            details={"cached_tokens": timings.cached_tokens},
        )

    def close(self) -> None:
        self._close_llama()
        self._info.close()

    def _llama_for(self, n_tokens: int, ctx: int | None) -> Llama:
        """With a context of `ctx` tokens, or else with room for `n_tokens`."""
        llama = self._llama
        if llama is None or (llama.n_ctx() < n_tokens if ctx is None else llama.n_ctx() != whole_cells(ctx)):
            self._close_llama()
            n_ctx = n_tokens + ROOM if ctx is None else ctx
            self._llama = llama = Llama(
                str(self._path), n_ctx=n_ctx, model_info=self._info, n_threads=fast_cores(), verbose=False
            )
        return llama

    def _close_llama(self) -> None:
        if self._llama is not None:
            self._llama.close()
            self._llama = None


def _messages(messages: Sequence[llm.Message]) -> list[Message]:
    """As templates take them; what a model has thought is no part of them."""
    return [
        {"role": message.role, "content": "".join(part.text for part in message.parts if isinstance(part, TextPart))}
        for message in messages
    ]
