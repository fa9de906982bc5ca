"""Who may use the server: keys, and web pages.

A page of any site can send requests to this machine through its visitor's browser (CSRF), and read the answers once its
own name leads to this machine (DNS rebinding). The browser says which page asks (`Origin`) and which name it asks
(`Host`); without a key nothing else tells such a request from the user's own.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable, Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.server.errors import error_body, shaped

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s]+", re.IGNORECASE)
_LOCAL_ORIGIN = r"https?://(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?"


class KeyChecker:
    """A dependency of endpoints: raises HTTPException 401 for a request without one of the keys, if there are any."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def __call__(self, request: Request) -> None:
        """Check a request, which carries a key as OpenAI's clients send it or as `X-Api-Key`."""
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = request.headers.get("X-Api-Key", "")
        # Headers are latin-1 on the wire; no comparison ends early, so that its time tells nothing.
        wrong = [not hmac.compare_digest(key, given.strip().encode("latin-1")) for key in self._keys]
        if wrong and all(wrong):
            raise HTTPException(401, "Invalid API key")


def check_keys(keys: Iterable[str]) -> list[str]:
    """Keys that can be sent in a header. Raises ConfigError."""
    keys = list(keys)
    for number, key in enumerate(keys, 1):
        if not re.fullmatch("[!-~]+", key):
            raise ConfigError(f"API key {number} is empty, or has blanks or characters beyond ASCII")
    return keys


def check_origins(origins: Iterable[str]) -> list[str]:
    """Origins as browsers send them, without "localhost", whose pages are let in anyway. Raises ConfigError."""
    origins = [origin.strip() for origin in origins if origin.strip() != "localhost"]
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(f"{origin!r} is no origin: give scheme://host or scheme://host:port, or * for all")
    return origins


def is_loopback(host: str) -> bool:
    """Whether a name or an address, as it stands in a URL or not, is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


class Cors(CORSMiddleware):
    """Lets browsers show the answers to pages of this machine, and of `origins`."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        methods = ("GET", "POST")
        super().__init__(app, origins, methods, ("*",), allow_origin_regex=_LOCAL_ORIGIN)


class LocalGuard:
    """ASGI middleware that refuses what is not asked in this machine's name, or by pages of elsewhere."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        """`origins`: of pages that may ask nevertheless."""
        self.app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        why = self._why_not(Headers(scope=scope)) if scope["type"] == "http" else None
        if why is None:
            await self.app(scope, receive, send)
        else:
            await JSONResponse(shaped(403, error_body(403, why), scope["path"]), 403)(scope, receive, send)

    def _why_not(self, headers: Headers) -> str | None:
        host = re.sub(r":\d*$", "", headers.get("Host", "localhost"))
        if not is_loopback(host):
            return f"this server is localhost's, not {host!r}: start it with --api-key to serve under other names"
        origin = headers.get("Origin")
        if origin is None or origin in self._origins or "*" in self._origins or re.fullmatch(_LOCAL_ORIGIN, origin):
            return None
        return f"pages of {origin!r} may not use this server: start it with --cors-origins {origin} to let them"
