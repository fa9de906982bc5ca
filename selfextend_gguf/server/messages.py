"""Messages and tools as clients send them, in the one form that chat templates take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from selfextend_gguf.errors import TemplateError

T = TypeVar("T")
Text = Annotated[str, StringConstraints(min_length=1)]

# OpenAI: a function without parameters is one with an empty list of them.
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


class _Lenient(BaseModel):
    """What holds more than is needed: other fields, and nulls, are left out."""

    model_config = ConfigDict(extra="ignore", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if value is not None} if _is_object(values) else values


class CalledFunction(_Lenient):
    """The function of a call that was made."""

    name: Text
    arguments: str | dict[str, Any] = "{}"


class Call(_Lenient):
    """A call of a tool, as an answer had it."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


def _joined(content: Any) -> Any:
    """The text of a message that may come in parts."""
    if not isinstance(content, list):
        return content
    if not all(_is_object(part) and isinstance(part.get("text"), str) for part in content):
        raise ValueError("messages can hold text only")
    return "".join(part["text"] for part in content)


class Message(_Lenient):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant", "tool", "function"]
    content: Annotated[str, BeforeValidator(_joined)] = ""
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    function_call: CalledFunction | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _developers_are_the_system(cls, values: Any) -> Any:
        """OpenAI's newer name for the same; templates know the older one."""
        return {**values, "role": "system"} if _is_object(values) and values.get("role") == "developer" else values

    @property
    def is_begun_answer(self) -> bool:
        """Whether the model can go on with it, if it is the last one."""
        return self.role == "assistant" and not self.tool_calls and not self.function_call

    @model_validator(mode="after")
    def _who_asks_says_something(self) -> Message:
        if self.role in ("system", "user") and "content" not in self.model_fields_set:
            raise ValueError(f"a message of the role {self.role!r} has no content")
        return self

    def for_template(self, arguments: Callable[[Any], Any]) -> dict[str, Any]:
        """As a dictionary; `arguments` gives the arguments of calls another form."""
        message = self.model_dump(exclude_none=True)
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)  # templates ask whether it is there
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = arguments(call["function"]["arguments"])
        return message


class Function(_Lenient):
    """A function that may be called. Its schema is always kept, `strict` or not."""

    name: Text
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_parameters(self) -> Function:
        self.parameters = self.parameters or dict(_NO_PARAMETERS)
        return self


class Tool(_Lenient):
    """A tool that may be called."""

    type: Literal["function"] = "function"
    function: Function


def render(messages: Sequence[Message], template: Callable[[list[dict[str, Any]]], T]) -> T:
    """What a template makes of messages. Raises TemplateError.

    Clients send the arguments of calls as JSON texts. Most templates expect objects, as transformers gives them; those
    that put texts together fail on these, and get texts. Mistral's refuse identifiers of calls that have not nine
    letters, and get such.
    """
    try:
        return template([message.for_template(_as_object) for message in messages])
    except TemplateError:
        if not any(message.tool_calls for message in messages):
            raise
    try:
        return template([message.for_template(_as_text) for message in messages])
    except TemplateError:
        return template([_with_short_ids(message.for_template(_as_object)) for message in messages])


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls are known by nine letters each."""
    for call in (message, *message.get("tool_calls", [])):
        for key in {"id", "tool_call_id"} & call.keys():
            call[key] = hashlib.blake2b(call[key].encode(), digest_size=5).hexdigest()[:9]
    return message


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)
