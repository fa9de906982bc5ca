"""Requests as llama-cpp-python's server takes them, checked so that what it would ignore or fail on is refused."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from llama_cpp.llama_types import ChatCompletionRequestMessage
from llama_cpp.server.types import CreateChatCompletionRequest, CreateCompletionRequest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from selfextend_gguf.chat_schemas import called_tool, json_format, wanted_schemas
from selfextend_gguf.checks import check_all
from selfextend_gguf.errors import ConfigError, ContextFullError, GrammarError
from selfextend_gguf.grammar import check_grammar
from selfextend_gguf.json_schema.forms import form
from selfextend_gguf.sampling import COMPLETION
from selfextend_gguf.server.models import ServedModel

# What pydantic lets through in any size.
_NUMBERS = {"seed", "temperature", "top_k", "repeat_penalty", "presence_penalty", "frequency_penalty"}

Text = Annotated[str, StringConstraints(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(BaseModel):
    """What a stream contains beside the answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class Request(BaseModel):
    """What completion and chat requests have in common. Raises pydantic's ValidationError."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.8, ge=0)
    repeat_penalty: float = Field(1.0, gt=0, le=10)  # theirs is 1.1, which keeps models from copying numbers
    stop: Text | list[Text] | None = None
    logit_bias: dict[str, Bias] | None = None
    seed: int | None = Field(default_factory=lambda: secrets.randbits(32))  # theirs would be the same in every process
    stream_options: StreamOptions | None = Field(None, exclude=True)
    # Without an effect on the answer.
    metadata: Any = Field(None, exclude=True)
    store: Any = Field(None, exclude=True)
    service_tier: Any = Field(None, exclude=True)
    safety_identifier: Any = Field(None, exclude=True)
    prompt_cache_key: Any = Field(None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise ValueError("the body must be a JSON object, sent with Content-Type: application/json")
        json.dumps(values, ensure_ascii=False).encode()  # a ValueError for halves of characters (surrogates)
        return {name: value for name, value in values.items() if value is not None}

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Request, CreateCompletionRequest):
    """A body of /v1/completions."""

    prompt: str
    max_tokens: int = Field(16, ge=1)
    n: Literal[1] = 1
    best_of: Literal[1] = 1

    @model_validator(mode="before")
    @classmethod
    def _one_prompt(cls, values: Any) -> Any:
        prompt = values.get("prompt") if isinstance(values, dict) else None
        if isinstance(prompt, list):
            if len(prompt) != 1 or not isinstance(prompt[0], str):
                raise ValueError("prompt must be one string: lists of prompts and of tokens are not supported")
            return {**values, "prompt": prompt[0]}
        return values

    @model_validator(mode="after")
    def _refuse_what_would_be_ignored(self) -> CompletionRequest:
        _refuse_what_both_would_ignore(self)
        if self.suffix is not None:
            raise ValueError("suffix is not supported")
        if self.echo and self.stream:
            raise ValueError("echo and stream cannot be combined")
        return self

    def tokens(self, model: ServedModel) -> list[int]:
        """The prompt's tokens; special ones are recognised, since whoever needs a template writes it here."""
        return model.info.tokenizer.tokens(self.prompt, special=True)

    def schemas(self) -> list[Any]:
        """The JSON schemas that the answer has to fit."""
        return []


class ChatRequest(Request, CreateChatCompletionRequest):
    """A body of /v1/chat/completions."""

    messages: list[ChatCompletionRequestMessage] = Field(min_length=1)
    n: Literal[1] = 1
    # One call at most is made.
    parallel_tool_calls: bool | None = Field(None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _todays_names(cls, values: Any) -> Any:
        """What OpenAI's clients send, in the form that llama-cpp-python knows."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        longest = values.pop("max_completion_tokens", None)
        if longest is not None:
            values.setdefault("max_tokens", longest)
        messages = values.get("messages")
        if isinstance(messages, list):
            values["messages"] = [_as_plain_text(m) if isinstance(m, dict) else m for m in messages]
        wanted = values.get("response_format")
        if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
            values["response_format"] = json_format(wanted)
        tools = values.get("tools")
        if values.get("tool_choice") == "required" and isinstance(tools, list):
            if len(tools) != 1:
                raise ValueError('tool_choice "required" needs exactly one tool; name the one to call')
            values["tool_choice"] = {"type": "function", "function": {"name": _name(tools[0])}}
        return values

    @model_validator(mode="after")
    def _refuse_what_would_be_ignored(self) -> ChatRequest:
        _refuse_what_both_would_ignore(self)
        if len(self.schemas()) + (self.grammar is not None) > 1:
            raise ValueError("only one of grammar, response_format and a tool to call can give the form of the answer")
        if isinstance(self.tool_choice, str) and self.tool_choice == "required":
            raise ValueError('tool_choice "required" without tools')
        return self

    def schemas(self) -> list[Any]:
        """The JSON schemas that the answer has to fit. Raises GrammarError."""
        return wanted_schemas(
            response_format=self.response_format,
            tools=self.tools,
            tool_choice=self.tool_choice,
            functions=self.functions,
            function_call=self.function_call,
        )

    def tokens(self, model: ServedModel) -> list[int]:
        """The tokens of the messages in the model's chat template. Raises ConfigError."""
        if model.formatter is None:
            raise ConfigError(f"the model {model.alias!r} has no chat template; use /v1/completions")
        called = called_tool(self.tool_choice, self.function_call)
        if (self.tools or self.functions) and called is None and "tools" not in (model.info.chat_template or ""):
            raise ConfigError(
                f"the chat template of {model.alias!r} tells the model nothing of tools; name one in tool_choice"
            )
        rendered = model.formatter(
            messages=self.messages,
            functions=self.functions,
            function_call=self.function_call,
            tools=self.tools,
            tool_choice=self.tool_choice,
        )
        return model.info.tokenizer.tokenize(rendered.prompt.encode())


def _refuse_what_both_would_ignore(body: CompletionRequest | ChatRequest) -> None:
    if body.logprobs is not None and body.logprobs is not False:  # 0 stands for the likeliest token's
        raise ValueError("logprobs are not supported: the server does not keep the logits of all tokens")
    if body.logit_bias and body.min_tokens:
        raise ValueError("logit_bias and min_tokens cannot be combined")


def _as_plain_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its text parts joined, as templates expect it."""
    content = message.get("content")
    if content is None and message.get("role") == "assistant":
        return {name: value for name, value in message.items() if value is not None}
    if not isinstance(content, list):
        return message
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        raise ValueError("messages can hold text only")
    return {**message, "content": "".join(part["text"] for part in content)}


def _name(tool: Any) -> Any:
    return tool.get("function", {}).get("name") if isinstance(tool, dict) else None


def check_request(body: CompletionRequest | ChatRequest, model: ServedModel) -> int:
    """Check what depends on the model, before the request waits for its turn; the number of tokens of the prompt.

    Raises ContextFullError, GrammarError or ConfigError.
    """
    check_all(COMPLETION, body.model_dump(include=_NUMBERS))
    n_vocab = model.info.model.n_vocab()
    if body.logit_bias and body.logit_bias_type != "tokens":
        for token in body.logit_bias:
            if not (token.isascii() and token.isdigit() and int(token) < n_vocab):
                raise ConfigError(f"logit_bias has {token!r}, which is no token of the model (0 to {n_vocab - 1})")
    schemas = body.schemas()
    for schema in schemas:
        form(schema)
    if body.grammar is not None:
        check_grammar(model.info.model.vocab, body.grammar)
    if body.min_tokens and (schemas or body.grammar is not None):
        raise GrammarError("min_tokens cannot be combined with a grammar, which alone says where an answer may end")
    n_prompt = len(body.tokens(model))
    if n_prompt == 0:
        raise ConfigError("the prompt is empty")
    n_answer = body.max_tokens or 1
    if n_prompt + n_answer > model.n_ctx:
        raise ContextFullError(
            f"this model's maximum context length is {model.n_ctx} tokens, however you requested {n_prompt + n_answer} "
            f"({n_prompt} in the prompt, {n_answer} for the completion); reduce the prompt or max_tokens"
        )
    return n_prompt
