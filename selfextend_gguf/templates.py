"""Chat templates: programs that come with a model file, rendered within limits.

A template can compute without end and fill the memory, in one expression as well as in a loop (`10**10**10`, strings
that are doubled, macros that call themselves), and already while it is compiled. Nothing in this process could stop it,
so it is rendered in another one, which lives as long as this one and takes 0.1 ms for a usual prompt.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import llama_cpp._internals as internals
from llama_cpp.llama_chat_format import (
    ChatFormatter,
    ChatFormatterResponse,
    LlamaChatCompletionHandler,
    LlamaChatCompletionHandlerNotFoundException,
    LlamaChatCompletionHandlerRegistry,
    chat_formatter_to_chat_completion_handler,
    get_chat_completion_handler,
)

from selfextend_gguf.checks import shown
from selfextend_gguf.errors import ConfigError, TemplateError
from selfextend_gguf.programs import command_of

SECONDS = 5.0  #: of processor time that a template may take
_KEY = "tokenizer.chat_template"
DEFAULT_TEMPLATE = "chat_template.default"  #: name of a model's only or usual template
_NO_TOOLS = dict.fromkeys(("functions", "function_call", "tools", "tool_choice"))
_NONE_OF_THEM: dict[str, Any] = {"tools": [], "functions": ""}  # as templates take them that use them unasked


class _Worker:
    """The process that renders, started when it is needed; one request at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        """Its answer, or as "error" what the template does instead."""
        try:
            line = json.dumps(request)
        except (TypeError, ValueError, RecursionError) as error:
            return {"error": f"is given what JSON cannot express: {error}"}
        with self._lock:
            answer = ""
            try:
                self._process = self._process or self._start()
                answer = self._exchange(self._process, line)
            except OSError as error:
                if self._process is None:
                    return {"error": f"needs a Python process, which cannot be started: {error}"}
            finally:
                if not answer.endswith("\n"):  # else, after Ctrl-C, it would be taken for that of the next request
                    ended = self._stop()
        if not answer.endswith("\n"):
            return {"error": _why(ended, request["seconds"])}
        found: dict[str, str] = json.loads(answer)
        return found

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command_of("template_worker.py"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
        )

    @staticmethod
    def _exchange(process: subprocess.Popen[str], line: str) -> str:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return process.stdout.readline()

    def _stop(self) -> int:
        """How the process ended: by itself, or now."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            process.communicate(timeout=0.5)  # it ends when its input does, unless it computes
        process.kill()
        return process.wait()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """Leave the process to the program that this one was forked from."""
        self._process, self._lock = None, threading.Lock()


_worker = _Worker()
atexit.register(_worker.close)
os.register_at_fork(after_in_child=_worker.forget)


def _why(ended: int, seconds: float) -> str:
    """What the end of the process says of a template."""
    if ended == -signal.SIGPROF:
        return f"takes more than {seconds:g} s of processor time"
    how = signal.Signals(-ended).name if ended < 0 else f"exit code {ended}"
    return f"ended the process that renders it ({how})"


class ChatTemplate(ChatFormatter):
    """A model's chat template (Jinja). Nothing of it is looked at before it is used."""

    def __init__(
        self, template: str, *, bos_token: str = "", eos_token: str = "", variables: Mapping[str, Any] | None = None
    ) -> None:
        """`variables` are what it is always given, unless a call gives others."""
        self.template = template
        self._variables = {**_NO_TOOLS, **(variables or {})}
        self._bos_token = bos_token
        self._eos_token = eos_token

    def check(self) -> None:
        """Raise TemplateError if it is no template."""
        self._ask(None)

    def __call__(self, **variables: Any) -> ChatFormatterResponse:
        """The text of `messages`, up to where an answer begins. Raises TemplateError.

        A template that fails without tools is given an empty list of them, and one that refuses a system message finds
        it at the beginning of the user's first message.
        """
        given = {name: value for name, value in variables.items() if value is not None}
        tokens = {"bos_token": self._bos_token, "eos_token": self._eos_token}
        all_variables = {**_usual_variables(), **self._variables, **given, **tokens}
        try:
            text = self._ask(all_variables)["text"]
        except TemplateError as error:
            text = self._ask_otherwise(all_variables, error)
        return ChatFormatterResponse(text, stop=[self._eos_token] if self._eos_token else [], added_special=True)

    def _ask_otherwise(self, variables: dict[str, Any], error: TemplateError) -> str:
        """The text of what a template takes instead of the variables at which it failed. Raises `error`."""
        messages = without_system(variables.get("messages"))
        others: dict[str, Any] = {}
        if "refuses the messages" in str(error) and messages is not None:
            others = {"messages": messages}
        elif "NoneType" in str(error):
            others = {name: empty for name, empty in _NONE_OF_THEM.items() if variables[name] is None}
        if not others:
            raise error
        try:
            return self._ask({**variables, **others})["text"]
        except TemplateError:
            raise error from None

    def to_chat_handler(self) -> LlamaChatCompletionHandler:
        """For `Llama.create_chat_completion`."""
        return chat_formatter_to_chat_completion_handler(self)

    def _ask(self, variables: dict[str, Any] | None) -> dict[str, str]:
        answer = _worker.ask({"template": self.template, "variables": variables, "seconds": SECONDS})
        if "error" in answer:
            raise TemplateError(f"the model's chat template {answer['error']}")
        return answer


def _usual_variables() -> dict[str, Any]:
    """What llama.cpp gives every template. Without the first, some end a thought before it begins; without the date,
    others name one of 2024."""
    now = datetime.now(timezone.utc)
    return {
        "enable_thinking": True,
        "date_string": now.strftime("%d %b %Y"),
        "datetime": now.strftime("%b %d %Y %H:%M:%S GMT"),
    }


def chat_template(
    model: internals.LlamaModel, template: str, variables: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """A template of a model, with the texts of the model's tokens."""

    def text(token: int) -> str:
        return model.token_get_text(token) if token != -1 else ""

    bos_token, eos_token = text(model.token_bos()), text(model.token_eos())
    return ChatTemplate(template, bos_token=bos_token, eos_token=eos_token, variables=variables)


def template_names(metadata: Mapping[str, str]) -> dict[str, str]:
    """Keys of the templates in a model's metadata, by the names that `Llama` takes as `chat_format`."""
    named = {key.removeprefix("tokenizer."): key for key in metadata if key.startswith(f"{_KEY}.")}
    return named | ({DEFAULT_TEMPLATE: _KEY} if _KEY in metadata else {})


def check_chat_format(name: str | None, metadata: Mapping[str, str]) -> None:
    """Raise ConfigError for a chat format that neither llama_cpp nor a model's metadata has."""
    if name is None or name in template_names(metadata):
        return
    try:
        get_chat_completion_handler(name)
    except LlamaChatCompletionHandlerNotFoundException:
        known = ", ".join([*template_names(metadata), *LlamaChatCompletionHandlerRegistry()._chat_handlers])
        raise ConfigError(f"unknown chat_format {name!r}; choose from {known}") from None


def without_system(messages: Any) -> list[dict[str, Any]] | None:
    """The messages with the system message before the text of the first user's; None if they do not begin so."""
    if len(messages or []) < 2 or [m["role"] for m in messages[:2]] != ["system", "user"]:
        return None
    texts = [m.get("content") for m in messages[:2]]
    if not all(isinstance(text, str) for text in texts):
        return None
    return [{**messages[1], "content": "\n".join(texts)}, *messages[2:]]


def check_variables(variables: Any) -> dict[str, Any]:
    """More variables for a chat template. Raises ConfigError for what are none."""
    if not isinstance(variables, Mapping):
        raise ConfigError(f"the variables of a chat template must be a JSON object, not {shown(variables)}")
    taken = sorted({"messages", "bos_token", "eos_token", "add_generation_prompt"} & set(variables))
    if taken:
        raise ConfigError(f"the chat template gets {taken[0]} from the conversation and the model")
    return dict(variables)


def check_messages(messages: Any) -> None:
    """Raise ConfigError for what is no list of messages."""
    if not isinstance(messages, list | tuple):
        raise ConfigError(f"messages must be a list, not {shown(messages)}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(f"message {number} must be a dictionary with a role, not {shown(message)}")
        if "content" not in message and message["role"] != "assistant":
            raise ConfigError(f"message {number} has no content")
