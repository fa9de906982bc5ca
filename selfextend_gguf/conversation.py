"""A conversation with a model: its messages, and their tokens as the cache holds them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from selfextend_gguf.atomic_file import new_file
from selfextend_gguf.errors import ConversationError
from selfextend_gguf.generate import Piece, stream_completion
from selfextend_gguf.llama import Llama
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.prompt import Message, Prompt, render, uses_template, with_system
from selfextend_gguf.reasoning import end_of_open_thought

_KEYS = ("role", "content", "reasoning_content")  # of a message


class Conversation:
    """Messages of a user and answers of a model, in turns.

    Each turn reads only what the cache lacks, also after `undo`, another answer or a loaded cache. The model's chat
    template is used if there is one; else, and with `raw`, the texts simply go on from each other. With `special`,
    special tokens are recognised in the texts. What the model thinks before an answer is no part of its message, but
    for texts that simply go on: the template gets it as "reasoning_content".
    """

    def __init__(
        self, llm: Llama, info: ModelInfo, *, system: str | None = None, raw: bool = False, special: bool = False
    ) -> None:
        self.system = system  #: system message; another one is used from the next turn on
        self.messages: list[Message] = []  #: a user's, an answer, a user's, an answer ...
        self.raw = not uses_template(info, raw=raw)
        self._special = special
        self._llm = llm
        self._info = info
        self._transcript = _Transcript()

    def ask(self, text: str, *, max_tokens: int, **generation: Any) -> Generator[Piece, None, None]:
        """Stream the answer to a message; `generation` goes to `stream_completion`.

        The turn is added when the answer ends, by itself or because the iterator is closed or Ctrl-C stops it; not if
        there was nothing of an answer yet. Raises ContextFullError when the message does not fit.
        """
        return self._answer([*self.messages, {"role": "user", "content": text}], max_tokens, generation)

    def ask_again(self, *, max_tokens: int, **generation: Any) -> Generator[Piece, None, None]:
        """Stream another answer to the last message, as `ask` does; the old one stays until this one begins."""
        if not self.messages:
            raise ConversationError("there is no message to answer")
        return self._answer(self.messages[:-1], max_tokens, generation)

    def undo(self) -> str:
        """Take back the last message and its answer; the message."""
        if not self.messages:
            raise ConversationError("there is nothing to take back")
        message = self.messages[-2]
        self.messages = self.messages[:-2]
        return message["content"]

    def clear(self) -> None:
        """Take back all messages; the system message stays."""
        self.messages = []

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the messages as JSON; the file is replaced at once or, on an error, stays as it was."""
        content = json.dumps({"system": self.system, "messages": self.messages}, ensure_ascii=False, indent=2) + "\n"
        with new_file(path) as (file, _):
            file.write(content.encode())

    def load(self, path: Path) -> None:
        """Go on with the messages of a file; on an error (ConversationError, OSError) the present ones stay."""
        try:
            saved = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ConversationError(f"{path} is no saved conversation: {error}") from error
        fault = _fault_of(saved)
        if fault:
            raise ConversationError(f"{path} is no saved conversation: {fault}")
        self.system = saved.get("system")
        self.messages = [{key: m[key] for key in _KEYS if key in m} for m in saved["messages"]]

    def save_cache(self, path: Path) -> None:
        """Write what the cache holds, so that `load_cache` spares reading the messages again."""
        self._llm.save_prompt(path)

    def load_cache(self, path: Path) -> int:
        """Restore the cache of the present messages; how many tokens it holds. Raises PromptCacheError or OSError."""
        n_tokens = self._llm.load_prompt(path)
        for n in range(1, len(self.messages), 2):
            prompt = self._prompt(self.messages[:n])
            if self._llm.input_ids[: len(prompt.tokens)].tolist() != prompt.tokens:
                break
            self._note_answer(prompt, self.messages[n]["content"])
        return n_tokens

    # ---- turns -----------------------------------------------------------------------------------------------------

    def _answer(
        self, messages: list[Message], max_tokens: int, generation: dict[str, Any]
    ) -> Generator[Piece, None, None]:
        prompt = self._prompt(messages)
        if not prompt.tokens:
            raise ConversationError("the message is empty")
        said, ended = dict.fromkeys(("answer", "thought", "tag"), ""), False
        whole = ""
        with contextlib.closing(stream_completion(self._llm, prompt, max_tokens=max_tokens, **generation)) as pieces:
            try:
                for piece in pieces:
                    whole += piece.text
                    said[piece.kind] += piece.text
                    ended = piece.finish_reason is not None
                    yield piece
            finally:
                if whole or ended:
                    message = {"role": "assistant", "content": whole if self.raw else said["answer"]}
                    if said["thought"].strip() and not self.raw:
                        message["reasoning_content"] = said["thought"].strip()
                    self.messages = [*messages, message]
                    self._note_answer(prompt, whole)

    def _prompt(self, messages: list[Message]) -> Prompt:
        """Tokens for the answer to `messages`; they begin with known ones as far as the text does."""
        messages = with_system(self.system, messages)
        rendering = render(self._info, messages, raw=self.raw, special=self._special)
        known = self._transcript
        known.cut_to(rendering.text)
        rest = rendering.text[len(known.text) :]
        if rest:
            more = self._info.tokenizer.tokens(
                rest, special=rendering.special, marks=rendering.marks, begins=not known.text
            )
            known.append(rest, more)
        return Prompt(list(known.tokens), rendering.stop, end_of_open_thought(rendering.text))

    def _note_answer(self, prompt: Prompt, answer: str) -> None:
        """Append the answer to the transcript, as far as the tokens cached after the prompt spell it.

        The last token may be missing (it was never read), or spell more than the answer (a stop string). What special
        tokens spell is no part of an answer.
        """
        wanted, spelled = answer.encode(), b""
        n_tokens = n_bytes = 0
        cached = self._llm.input_ids[len(prompt.tokens) : self._llm.n_tokens].tolist()
        for n, token in enumerate(cached, 1):
            spelled += self._llm.detokenize([token])
            if not wanted.startswith(spelled):
                break
            between_characters = len(spelled) == len(wanted) or wanted[len(spelled)] & 0xC0 != 0x80
            if between_characters and len(spelled) > n_bytes:
                n_tokens, n_bytes = n, len(spelled)
        if n_tokens:
            # As the template will be given it: in marked texts one character stands for one.
            given = answer if self.raw or self._special else self._info.tokenizer.mark(answer)[0]
            self._transcript.append(given[: len(wanted[:n_bytes].decode())], cached[:n_tokens])


class _Transcript:
    """A text, marked as templates get it, with its tokens.

    Tokenising it anew would not always give these: answers are sampled token by token.
    """

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self._ends: list[tuple[int, int]] = []  # (characters, tokens) up to where a prompt or an answer ends

    def append(self, text: str, tokens: list[int]) -> None:
        self.text += text
        self.tokens += tokens
        self._ends.append((len(self.text), len(self.tokens)))

    def cut_to(self, text: str) -> None:
        """Keep the prompts and answers with which `text` begins."""
        while self._ends and not text.startswith(self.text[: self._ends[-1][0]]):
            self._ends.pop()
        n_characters, n_tokens = self._ends[-1] if self._ends else (0, 0)
        self.text = self.text[:n_characters]
        del self.tokens[n_tokens:]


def _fault_of(saved: Any) -> str | None:
    """What is wrong with the content of a file, None if nothing is."""
    if not isinstance(saved, dict) or not isinstance(saved.get("messages"), list):
        return "there is no list of messages"
    if saved.get("system") is not None and not _is_text(saved["system"]):
        return "the system message is no text"
    for n, message in enumerate(saved["messages"]):
        role = ("user", "assistant")[n % 2]
        texts = [message.get("content"), message.get("reasoning_content", "")] if isinstance(message, dict) else [None]
        if not all(map(_is_text, texts)) or message.get("role") != role:
            return f"message {n + 1} is no text of role {role}"
    if len(saved["messages"]) % 2:
        return "the last message has no answer"
    return None


def _is_text(value: Any) -> bool:
    """Half a surrogate pair, which JSON can express, is none."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)
