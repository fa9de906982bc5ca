"""Numbers for Prometheus."""

from __future__ import annotations

from collections.abc import AsyncIterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from starlette.responses import Response

from selfextend_gguf.server.answering import Read, Said
from selfextend_gguf.server.models import OneModelAtATime


class Metrics:
    """What the server has done since it began."""

    def __init__(self, models: OneModelAtATime) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"sx_gguf_{name}", what, labels, registry=self._registry)

        self._read = counter("prompt_tokens", "Tokens of prompts that were read")
        self._cached = counter("cached_tokens", "Tokens of prompts that were in the cache")
        self._reading = counter("prompt_seconds", "Seconds of reading prompts")
        self._generated = counter("generated_tokens", "Tokens of answers")
        self._generating = counter("generate_seconds", "Seconds of generating answers")
        self._answers = counter("answers", "Answers that came to their end", "finish_reason")
        waiting = Gauge("sx_gguf_waiting_requests", "Requests that wait for their turn", registry=self._registry)
        waiting.set_function(lambda: models.n_waiting)
        busy = Gauge("sx_gguf_busy", "1 while a request has its turn", registry=self._registry)
        busy.set_function(lambda: models.is_busy)

    async def counted(self, happened: AsyncIterator[Read | Said | None]) -> AsyncIterator[Read | Said | None]:
        """What happens, counted at the end of each answer."""
        async for event in happened:
            if isinstance(event, Said) and event.finish_reason is not None:
                timings = event.timings
                self._read.inc(timings.prompt_tokens - timings.cached_tokens)
                self._cached.inc(timings.cached_tokens)
                self._reading.inc(timings.prompt_seconds)
                self._generated.inc(event.n_answer)
                self._generating.inc(timings.generate_seconds)
                self._answers.labels(event.finish_reason).inc()
            yield event

    def response(self) -> Response:
        """All numbers as text."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)
