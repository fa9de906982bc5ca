"""The application: OpenAI's endpoints, and Anthropic's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from selfextend_gguf.server.access import Cors, KeyChecker, LocalGuard
from selfextend_gguf.server.answering import Read, Said, begin
from selfextend_gguf.server.anthropic import MessagesForm, MessagesRequest
from selfextend_gguf.server.errors import ErrorReporter, error_response
from selfextend_gguf.server.fields import FieldChecker
from selfextend_gguf.server.forms import ChatForm, CompletionForm, Form
from selfextend_gguf.server.jobs import Job, chat_job, chat_prompt, completion_job
from selfextend_gguf.server.limits import RequestLimits
from selfextend_gguf.server.metrics import Metrics
from selfextend_gguf.server.models import OneModelAtATime
from selfextend_gguf.server.native import NativeForm, NativeRequest
from selfextend_gguf.server.page import document_router, page_router
from selfextend_gguf.server.requests import ChatRequest, CompletionRequest
from selfextend_gguf.server.requests import Request as Body
from selfextend_gguf.server.responses import ResponsesForm, ResponsesRequest
from selfextend_gguf.server.texts import text_router
from selfextend_gguf.server.work import DisconnectWatcher

Asked = TypeVar("Asked", bound=ChatRequest)


@dataclass(frozen=True)
class Settings:
    """How requests are taken."""

    keys: Sequence[str] = ()  #: of which requests carry one; none = anyone may ask
    origins: Sequence[str] = ()  #: of web pages that may ask, beside this machine's
    is_local: bool = False  #: whether requests in other names than this machine's, or by other pages, are refused
    strict: bool = False  #: whether unknown fields are refused
    reasoning_format: Literal["auto", "none"] = "auto"  #: whether thoughts are kept apart from answers


async def as_events(form: Form, happened: AsyncIterator[Read | Said | None]) -> AsyncIterator[str]:
    """What happens, as server-sent events."""
    for event in form.begin():
        yield event
    async for what in happened:
        if what is None:
            yield ": still here\n\n"  # a comment, for proxies and clients that take silence for an end
        else:
            for event in form.tell(what) if isinstance(what, Said) else form.progress(what):
                yield event
    for event in form.end():
        yield event


def create_app(models: OneModelAtATime, settings: Settings, *, verbose: bool = False) -> FastAPI:
    """The application that serves `models`."""
    app = FastAPI(title="selfextend_gguf", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(DisconnectWatcher)
    app.add_middleware(RequestLimits)

    async def report(request: Request, error: Exception) -> JSONResponse:
        return error_response(error, request.url.path)

    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, report)
    app.add_middleware(ErrorReporter, verbose=verbose)
    if settings.is_local:
        app.add_middleware(LocalGuard, origins=settings.origins)
    app.add_middleware(Cors, origins=settings.origins)
    with_key = [Depends(KeyChecker(settings.keys))]
    metrics = Metrics(models)
    check_fields = FieldChecker(settings.strict)

    async def complete(body: Body, job: Job, form: Form) -> Any:
        happened = metrics.counted(begin(models, job))
        if body.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(as_events(form, happened), media_type="text/event-stream", headers=headers)
        async for event in happened:
            if isinstance(event, Said):
                form.take(event)
        return form.whole()

    async def chat(body: Asked, make: Callable[[Job, Asked, bool], Form]) -> Any:
        check_fields(body)
        job = await run_in_threadpool(chat_job, body, models.find(body.model))
        return await complete(
            body, job, make(job, body, (body.reasoning_format or settings.reasoning_format) != "none")
        )

    async def count_tokens(body: ChatRequest) -> dict[str, int]:
        check_fields(body)
        prompt = await run_in_threadpool(chat_prompt, body, models.find(body.model))
        return {"input_tokens": len(prompt.tokens)}

    @app.post("/v1/completions", dependencies=with_key, response_model=None)
    async def completions(body: CompletionRequest) -> Any:
        check_fields(body)
        model = models.find(body.model)
        job = await run_in_threadpool(completion_job, body, model)
        echoed = [model.text_of(prompt, special=True) for prompt in body.prompts] if body.echo else None
        return await complete(body, job, CompletionForm(job, body, echoed))

    @app.post("/completion", dependencies=with_key, response_model=None)
    @app.post("/completions", dependencies=with_key, response_model=None)
    async def native_completion(body: NativeRequest) -> Any:
        check_fields(body)
        model = models.find(body.model)
        job = await run_in_threadpool(completion_job, body, model)
        prompts = [model.text_of(prompt.tokens, special=True) for prompt in job.prompts]
        return await complete(body, job, NativeForm(job, body, prompts))

    @app.post("/chat/completions", dependencies=with_key, response_model=None)
    @app.post("/v1/chat/completions", dependencies=with_key, response_model=None)
    async def chat_completions(body: ChatRequest) -> Any:
        return await chat(body, ChatForm)

    @app.post("/responses", dependencies=with_key, response_model=None)
    @app.post("/v1/responses", dependencies=with_key, response_model=None)
    async def responses(body: ResponsesRequest) -> Any:
        return await chat(body, ResponsesForm)

    @app.post("/v1/messages", dependencies=with_key, response_model=None)
    async def messages(body: MessagesRequest) -> Any:
        return await chat(body, MessagesForm)

    @app.post("/v1/messages/count_tokens", dependencies=with_key)
    async def count_of_messages(body: MessagesRequest) -> dict[str, int]:
        return await count_tokens(body)

    @app.post("/v1/responses/input_tokens", dependencies=with_key)
    async def count_of_responses(body: ResponsesRequest) -> dict[str, Any]:
        return {"object": "response.input_tokens", **await count_tokens(body)}

    @app.post("/chat/completions/input_tokens", dependencies=with_key)
    @app.post("/v1/chat/completions/input_tokens", dependencies=with_key)
    async def count_of_chat(body: ChatRequest) -> dict[str, int]:
        return await count_tokens(body)

    @app.get("/models", dependencies=with_key)
    @app.get("/v1/models", dependencies=with_key)
    @app.get("/v1/models/", dependencies=with_key)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model.describe() for model in models]}

    @app.get("/v1/models/{name:path}", dependencies=with_key)
    async def one_model(name: str) -> dict[str, Any]:
        return models.named(name).describe()

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        # Another model than the first is loaded for who asks for it; the server is there for all the others.
        status = 200 if models.has_loaded else 503
        return JSONResponse({"status": models.status, "busy": models.is_busy}, status)

    @app.get("/metrics", dependencies=with_key)
    async def metrics_text() -> Response:
        return metrics.response()

    app.include_router(text_router(models), dependencies=with_key)
    app.include_router(document_router(), dependencies=with_key)
    app.include_router(page_router())

    return app
