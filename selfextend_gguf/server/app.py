"""The application: llama-cpp-python's endpoints, their requests checked and their errors in OpenAI's form."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from llama_cpp.server import app as theirs
from llama_cpp.server.settings import ServerSettings
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfextend_gguf.errors import (
    ConfigError,
    ContextFullError,
    GrammarError,
    RequestStoppedError,
    SelfExtendError,
    TextError,
    UnknownModelError,
)
from selfextend_gguf.server.models import OneModelAtATime
from selfextend_gguf.server.requests import ChatRequest, CompletionRequest, check_request
from selfextend_gguf.server.work import DisconnectWatcher, Work, current_work

log = logging.getLogger("uvicorn.error")

# What the request is to blame for: HTTP status and OpenAI's code. Anything else is an internal error.
_REQUEST_ERRORS: dict[type[Exception], tuple[int, str | None]] = {
    UnknownModelError: (404, "model_not_found"),
    ContextFullError: (400, "context_length_exceeded"),
    GrammarError: (400, None),
    ConfigError: (400, None),
    TextError: (400, None),
    RequestStoppedError: (503, None),
}
_CODES = {401: "invalid_api_key"}


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI reports it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of an error."""
    if isinstance(error, HTTPException):
        return error.status_code, error_body(error.status_code, str(error.detail), code=_CODES.get(error.status_code))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] in ("value_error", "json_invalid"):
            place = []
        message = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            message = f"the body is not JSON: {first['ctx']['error']}"
        elif first["type"] == "extra_forbidden":
            message = "unknown parameter"
        return 400, error_body(400, ": ".join([*place[:1], message]), param=".".join(place) or None)
    for kind, (status, code) in _REQUEST_ERRORS.items():
        if isinstance(error, kind):
            return status, error_body(status, str(error), code=code)
    message = str(error) if isinstance(error, SelfExtendError) else f"{type(error).__name__}: {error}"
    return 500, error_body(500, message)


class ErrorReporter:
    """ASGI middleware that turns every exception into an answer, also in the middle of a stream."""

    def __init__(self, app: ASGIApp, verbose: bool) -> None:
        self.app = app
        self.verbose = verbose

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = False
        last: Message | None = None  # held back: a stream whose generation fails ends before the failure is known

        async def watched_send(message: Message) -> None:
            nonlocal began, last
            began = True
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                last = message
            else:
                await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except Exception as error:
            status, body = describe_error(error)
            if status == 500:
                log.error("%s", body["error"]["message"], exc_info=error if self.verbose else None)
            if not began:
                await JSONResponse(body, status)(scope, receive, send)
                return
            last = {"type": "http.response.body", "body": f"data: {json.dumps(body)}\n\n".encode()}
        if last is not None:
            await send(last)


async def with_usage(events: AsyncIterable[Any], n_prompt: int, work: Work) -> AsyncIterator[Any]:
    """A stream's events, with the numbers of tokens before its end."""
    chunk: dict[str, Any] = {}
    async for event in events:
        if event["data"] == "[DONE]":
            usage = {
                "prompt_tokens": n_prompt,
                "completion_tokens": work.n_generated,
                "total_tokens": n_prompt + work.n_generated,
            }
            yield {"data": json.dumps(chunk | {"choices": [], "usage": usage})}
        else:
            chunk = json.loads(event["data"])
        yield event


def create_app(models: OneModelAtATime, settings: ServerSettings, *, verbose: bool = False) -> FastAPI:
    """The application that serves `models`.

    Of llama-cpp-python's server it takes the endpoints of OpenAI's API with their queue, streaming and authentication.
    Its router is left out: that answers 500 to whatever it cannot read, with a traceback.
    """
    theirs.set_server_settings(settings)
    names = vars(theirs)  # where no type is declared: these are not what llama-cpp-python means to stand there
    names["_llama_proxy"] = models  # `set_llama_proxy` would load llama_cpp.Llama
    if not verbose:
        names["print"] = lambda *_: None  # it prints a line for each client that leaves
    app = FastAPI(title="selfextend_gguf", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(DisconnectWatcher)
    with_key = [Depends(theirs.authenticate)]

    async def report(_: Request, error: Exception) -> JSONResponse:
        status, body = describe_error(error)
        return JSONResponse(body, status)

    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, report)
    app.add_middleware(ErrorReporter, verbose=verbose)

    async def complete(endpoint: Callable[..., Any], request: Request, body: CompletionRequest | ChatRequest) -> Any:
        model = models.find(body.model)
        body.model = model.alias
        n_prompt = await run_in_threadpool(check_request, body, model)
        response = await endpoint(request, body)
        if body.stream and body.wants_usage:
            response.body_iterator = with_usage(response.body_iterator, n_prompt, current_work())
        return response

    @app.post("/v1/completions", dependencies=with_key, response_model=None)
    async def completions(request: Request, body: CompletionRequest) -> Any:
        return await complete(theirs.create_completion, request, body)

    @app.post("/v1/chat/completions", dependencies=with_key, response_model=None)
    async def chat_completions(request: Request, body: ChatRequest) -> Any:
        return await complete(theirs.create_chat_completion, request, body)

    @app.get("/v1/models", dependencies=with_key)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model.describe() for model in models]}

    @app.get("/v1/models/{name:path}", dependencies=with_key)
    async def one_model(name: str) -> dict[str, Any]:
        return models.find(name).describe()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "busy": theirs.llama_inner_lock.locked()}

    return app
