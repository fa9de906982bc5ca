"""Errors as OpenAI reports them, or Anthropic, at any time of an answer."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfextend_gguf.errors import (
    ConfigError,
    ContextFullError,
    DocumentError,
    GrammarError,
    QueueFullError,
    RequestStoppedError,
    SelfExtendError,
    TextError,
    UnknownModelError,
)

log = logging.getLogger("uvicorn.error")

# What the request is to blame for: HTTP status and OpenAI's code. Anything else is an internal error.
_REQUEST_ERRORS: dict[type[Exception], tuple[int, str | None]] = {
    UnknownModelError: (404, "model_not_found"),
    ContextFullError: (400, "context_length_exceeded"),
    GrammarError: (400, None),
    ConfigError: (400, None),
    TextError: (400, None),
    DocumentError: (400, None),
    RequestStoppedError: (503, None),
    QueueFullError: (503, None),
}
_RETRY_AFTER = 10  # seconds after which a server that is full may have room
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
        return _describe_invalid(error)
    for kind, (status, code) in _REQUEST_ERRORS.items():
        if isinstance(error, kind):
            return status, error_body(status, str(error), code=code)
    message = str(error) if isinstance(error, SelfExtendError) else f"{type(error).__name__}: {error}"
    return 500, error_body(500, message)


_ANTHROPIC = "/v1/messages"  # where its endpoints are
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
}


def shaped(status: int, body: dict[str, Any], path: str) -> dict[str, Any]:
    """The body of an error as the API of an endpoint has it."""
    if not path.startswith(_ANTHROPIC):
        return body
    kind = _ANTHROPIC_KINDS.get(status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": body["error"]["message"]}}


def error_event(status: int, body: dict[str, Any], path: str) -> str:
    """An error in the middle of a stream."""
    if path == "/v1/responses":
        body = {"type": "error", "sequence_number": 0, **body["error"], **body}
    named = "event: error\n" if path == "/v1/responses" or path.startswith(_ANTHROPIC) else ""
    return f"{named}data: {json.dumps(shaped(status, body, path))}\n\n"


def error_response(error: Exception, path: str) -> JSONResponse:
    """An error as an answer of an endpoint; who comes too early is told when to come again."""
    status, body = describe_error(error)
    body = shaped(status, body, path)
    headers = dict((isinstance(error, HTTPException) and error.headers) or {})
    return JSONResponse(body, status, {**headers, **({"Retry-After": str(_RETRY_AFTER)} if status == 503 else {})})


def _describe_invalid(error: RequestValidationError) -> tuple[int, dict[str, Any]]:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in ("value_error", "json_invalid"):
        place = []
    if first["type"] == "json_invalid":
        message = f"the body is not JSON: {first['ctx']['error']}"
    return 400, error_body(400, ": ".join([*place[:1], message]), param=".".join(place) or None)


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
                await error_response(error, scope["path"])(scope, receive, send)
                return
            last = {"type": "http.response.body", "body": error_event(status, body, scope["path"]).encode()}
        if last is not None:
            await send(last)
