"""Who may use the server: keys."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.requests import Request


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
