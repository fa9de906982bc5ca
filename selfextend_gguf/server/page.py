"""The page at `/`: one file, which talks with the server through its public endpoints."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse

from selfextend_gguf.documents import read_stream
from selfextend_gguf.errors import DocumentError

_PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _digest(tag: str) -> str:
    """Of the page's own script or style, by which a browser tells it from what something else has put there."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", _PAGE, re.DOTALL)
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"


_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_digest('script')}; style-src {_digest('style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_router() -> APIRouter:
    """The page, which holds nothing that needs a key."""
    router = APIRouter()

    @router.api_route("/", methods=["GET", "HEAD"], response_model=None)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE, headers=_HEADERS)

    return router


def document_router() -> APIRouter:
    """The text of documents: PDF, EPUB, DOCX, HTML, and texts in any encoding."""
    router = APIRouter()

    @router.post("/extras/document")
    async def document(request: Request, name: str) -> dict[str, Any]:
        """A file as the body, and its name."""
        content = io.BytesIO(await request.body())
        read = await run_in_threadpool(read_stream, content, name)
        if not read.text:
            raise DocumentError(f"{name} is empty")
        return {"name": name, "text": read.text}

    return router
