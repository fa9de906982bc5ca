"""Requests as OpenAI's and llama.cpp's clients send them; what is not known is left out, what matters is refused."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from selfextend_gguf.chat_schemas import json_format
from selfextend_gguf.more_samplers import MoreSamplers
from selfextend_gguf.server.messages import Function, Message, Tool

Text = Annotated[str, StringConstraints(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
UNLIMITED = -1  #: max_tokens: as many as the context has room for

# What other servers know, and what would be missed without a word if it were left out.
_MISSED = {
    "audio": "answers are texts",
    "guided_choice": "use response_format or grammar",
    "guided_grammar": "use grammar",
    "guided_json": "use response_format",
    "guided_regex": "use response_format or grammar",
    "json_schema": "use response_format",
    "length_penalty": "there is no beam search",
    "lora": "adapters cannot be changed while the server runs",
    "n_discard": "the context is not shifted",
    "n_probs": "use logprobs",
    "samplers": "their order is llama.cpp's",
    "stop_token_ids": "use stop",
    "suffix": "no infill",
    "structured_outputs": "use response_format",
    "t_max_predict_ms": "use max_tokens",
    "use_beam_search": "there is no beam search",
    "web_search_options": "there is no search",
}  # fmt: skip


class StreamOptions(BaseModel):
    """What a stream contains beside the answer."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class Request(BaseModel):
    """What completion and chat requests have in common. Raises pydantic's ValidationError."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str | None = None
    max_tokens: int | None = Field(None, ge=UNLIMITED)
    min_tokens: int = Field(0, ge=0)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = None
    stop: Text | list[Text] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    return_progress: bool = False
    logit_bias: dict[str, Bias] = Field(default_factory=dict)
    logit_bias_type: Literal["input_ids", "tokens"] = "input_ids"
    ignore_eos: bool = False
    grammar: str | None = None
    # Numbers for the samplers; what pydantic lets through in any size is checked with the rest of `sampling`.
    temperature: float = Field(0.8, ge=0)
    top_p: float = Field(0.95, ge=0, le=1)
    min_p: float = Field(0.05, ge=0, le=1)
    typical_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(40, ge=0)
    repeat_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    mirostat_mode: int = Field(0, ge=0, le=2)
    mirostat_tau: float = Field(5.0, ge=0, le=10)
    mirostat_eta: float = Field(0.1, ge=0.001, le=1)
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: list[str] | None = None
    # Without an effect on the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prediction: Any = None
    cache_prompt: Any = None
    id_slot: Any = None
    timings_per_token: Any = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise ValueError("the body must be a JSON object, sent with Content-Type: application/json")
        json.dumps(values, ensure_ascii=False).encode()  # a ValueError for halves of characters (surrogates)
        return _renamed({name: value for name, value in values.items() if value is not None})

    @model_validator(mode="after")
    def _refuse_what_would_be_missed(self) -> Request:
        if self.max_tokens == 0 and not self.may_be_empty:
            raise ValueError("max_tokens: Input should be at least 1, or -1 for as many as the context has room for")
        for name in sorted(_MISSED.keys() & self.unknown):
            if self.unknown[name]:  # what is false or empty asks for nothing
                raise ValueError(f"{name} is not supported: {_MISSED[name]}")
        return self

    @property
    def may_be_empty(self) -> bool:
        """Whether an answer of no tokens makes sense."""
        return False

    @property
    def biases_texts(self) -> bool:
        """Whether a key of `logit_bias` that is no number is a text."""
        return self.logit_bias_type == "tokens"

    @property
    def unknown(self) -> Mapping[str, Any]:
        """Fields that are left out."""
        return self.model_extra or {}

    @property
    def longest(self) -> int:
        """Most tokens of an answer."""
        return UNLIMITED if self.max_tokens is None else self.max_tokens

    @property
    def stops(self) -> list[str]:
        """Strings that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def sampling(self) -> dict[str, Any]:
        """Arguments of `Llama.create_completion`."""
        return self.model_dump(include=_SAMPLING)

    def more_samplers(self) -> MoreSamplers:
        """Samplers beside those. Raises ConfigError."""
        given = self.model_dump(include={field.name for field in fields(MoreSamplers)}, exclude_none=True)
        return MoreSamplers(**given)

    def first_seed(self) -> int:
        """The seed of the first answer, drawn if none is given: llama_cpp's is the same in every process."""
        return secrets.randbits(31) if self.seed is None or self.seed == -1 else self.seed


_SAMPLING = {
    "temperature", "top_p", "min_p", "typical_p", "top_k", "repeat_penalty", "presence_penalty", "frequency_penalty",
    "mirostat_mode", "mirostat_tau", "mirostat_eta",
}  # fmt: skip
_NAMES = {"max_completion_tokens": "max_tokens", "n_predict": "max_tokens", "mirostat": "mirostat_mode"}


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Fields by one name each, of those by which clients know them."""
    for other, name in _NAMES.items():
        if other in values:
            values.setdefault(name, values[other])
            del values[other]
    return values


class CompletionRequest(Request):
    """A body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=UNLIMITED)
    best_of: int = 1
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=100)
    json_schema: dict[str, Any] | None = None  # as in llama.cpp's server

    @model_validator(mode="after")
    def _refuse_what_is_not_there(self) -> CompletionRequest:
        if self.best_of > self.n:
            raise ValueError(f"best_of is not supported: ask for n={self.best_of} and choose")
        if self.echo and self.stream:
            raise ValueError("echo and stream cannot be combined")
        return self

    @property
    def may_be_empty(self) -> bool:
        """Whether an answer of no tokens makes sense: beside what is echoed."""
        return self.echo

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts, as texts or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class ChatRequest(Request):
    """A body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Any = None
    functions: list[Function] = Field(default_factory=list)
    function_call: Any = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=100)
    reasoning_effort: Text | None = None
    reasoning_format: Literal["auto", "deepseek", "none"] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_form(cls, values: Any) -> Any:
        """The older form of tools as the newer one, and the one of response formats that llama_cpp knows."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name in ("response_format", "tools", "functions"):
            if values.get(name) is None:
                values.pop(name, None)
        if values.get("json_schema") is not None:  # as in llama.cpp's server
            if "response_format" in values:
                raise ValueError("only one of response_format and json_schema can give the form of the answer")
            values["response_format"] = {"type": "json_object", "schema": values.pop("json_schema")}
        if "response_format" in values:
            values["response_format"] = json_format(values["response_format"])
        if values.get("modalities", ["text"]) not in (None, ["text"]):
            raise ValueError("modalities: answers are texts")
        return values

    @model_validator(mode="after")
    def _continue_what_can_be(self) -> ChatRequest:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        if self.continue_final_message and not self.messages[-1].is_begun_answer:
            raise ValueError("continue_final_message: the last message must be an answer, of role assistant")
        return self

    @property
    def continues(self) -> bool:
        """Whether the last message is an answer to go on with."""
        wants = not self.add_generation_prompt and self.continue_final_message is not False
        return wants and len(self.messages) > 1 and self.messages[-1].is_begun_answer

    @model_validator(mode="after")
    def _know_the_tools(self) -> ChatRequest:
        self.tools = [*self.tools, *(Tool(function=function) for function in self.functions)]
        if self.tool_choice is None:
            self.tool_choice = self.function_call
        if self.tool_choice == "required" and not self.tools:
            raise ValueError('tool_choice "required" without tools')
        return self
