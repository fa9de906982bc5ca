"""Endpoints around texts and tokens, as llama.cpp's, vLLM's and llama-cpp-python's servers have them."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, model_validator
from starlette.concurrency import run_in_threadpool

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.handles import check_tokens
from selfextend_gguf.server.jobs import chat_text
from selfextend_gguf.server.models import OneModelAtATime, ServedModel
from selfextend_gguf.server.requests import ChatRequest
from selfextend_gguf.tokenizer import encode


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None


class Content(_Body):
    """A text for llama.cpp's /tokenize."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False

    @model_validator(mode="before")
    @classmethod
    def _of_vllm(cls, values: Any) -> Any:
        """The same as vLLM's clients send it."""
        if isinstance(values, dict) and "prompt" in values and "content" not in values:
            values = {**values, "content": values["prompt"], "add_special": values.get("add_special_tokens", True)}
        return values


class Input(_Body):
    """A text for llama-cpp-python's endpoints."""

    input: str


class Tokens(_Body):
    """Tokens to spell."""

    tokens: list[int]


def tokens_of(model: ServedModel, text: str, *, bos: bool, special: bool) -> list[int]:
    """Tokens of a text, after BOS if the vocabulary wants one and `bos`. Raises TextError."""
    tokenizer = model.info.tokenizer
    if bos:
        return tokenizer.tokens(text, special=special)
    return tokenizer.tokenize(encode(text), add_bos=False, special=special)


def spell(model: ServedModel, tokens: list[int]) -> str:
    """The text of tokens. Raises TextError."""
    return model.text_of(check_tokens(tokens, model.info.model.n_vocab()))


def piece(model: ServedModel, token: int) -> str | list[int]:
    """What a token spells; its bytes, if these are no text."""
    spelled = model.info.tokenizer.detokenize([token], special=True)
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return list(spelled)


def text_router(models: OneModelAtATime) -> APIRouter:
    """The endpoints, for `models`. None of them needs a model to be loaded."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: Content) -> dict[str, Any]:
        model = models.find(body.model)
        tokens = await run_in_threadpool(
            tokens_of, model, body.content, bos=body.add_special, special=body.parse_special
        )
        if body.with_pieces:
            return {"tokens": [{"id": token, "piece": piece(model, token)} for token in tokens]}
        return {"tokens": tokens}

    @router.post("/detokenize")
    async def detokenize(body: Tokens) -> dict[str, Any]:
        text = await run_in_threadpool(spell, models.find(body.model), body.tokens)
        return {"content": text, "prompt": text}  # the latter as vLLM's clients expect it

    @router.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> dict[str, Any]:
        found = properties(models.find(model))
        return {name: found[name] or None for name in ("bos_token", "eos_token", "chat_template")}

    @router.post("/apply-template")
    async def apply_template(body: ChatRequest) -> dict[str, Any]:
        return {"prompt": await run_in_threadpool(chat_text, body, models.find(body.model))}

    @router.post("/extras/tokenize")
    async def extra_tokenize(body: Input) -> dict[str, Any]:
        tokens = await run_in_threadpool(tokens_of, models.find(body.model), body.input, bos=True, special=True)
        return {"tokens": tokens}

    @router.post("/extras/tokenize/count")
    async def extra_count(body: Input) -> dict[str, Any]:
        return {"count": len((await extra_tokenize(body))["tokens"])}

    @router.post("/extras/detokenize")
    async def extra_detokenize(body: Tokens) -> dict[str, Any]:
        return {"text": await run_in_threadpool(spell, models.find(body.model), body.tokens)}

    @router.post("/v1/embeddings")
    async def embeddings() -> None:
        raise ConfigError("this server gives no embeddings: its models generate texts")

    @router.get("/props")
    async def props(model: str | None = None) -> dict[str, Any]:
        return properties(models.find(model))

    return router


def properties(model: ServedModel) -> dict[str, Any]:
    """What llama.cpp's server tells of itself, as far as there is the like."""
    info = model.info.model

    def text(token: int) -> str:
        return info.token_get_text(token) if token != -1 else ""

    return {
        "model_alias": model.alias,
        "model_path": model.info.path.name,  # clients need not know where
        "default_generation_settings": {"n_ctx": model.n_ctx},
        "n_ctx_train": model.info.n_ctx_train,
        "self_extend": None if model.self_extend is None else asdict(model.self_extend),
        "total_slots": 1,
        "chat_template": model.info.chat_template or "",
        "bos_token": text(info.token_bos()),
        "eos_token": text(info.token_eos()),
        "modalities": {"vision": False, "audio": False},
        "build_info": f"selfextend-gguf {version('selfextend-gguf')}",
    }
