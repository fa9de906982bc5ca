"""Fields of requests that the server does not know: left out with a line in the log, or refused."""

from __future__ import annotations

import logging

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.server.requests import Request

log = logging.getLogger(__name__)


class FieldChecker:
    """Called with each request. Logs each unknown field once, not with every request of a client that sends it."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._logged: set[str] = set()

    def __call__(self, body: Request) -> None:
        """Raise ConfigError for an unknown field, if the server is strict."""
        unknown = sorted(body.unknown)
        if unknown and self._strict:
            raise ConfigError(f"{unknown[0]}: unknown parameter")
        new = [name for name in unknown if name not in self._logged]
        if new and len(self._logged) < 1000:
            self._logged.update(new)
            log.warning("Ignored what is not known in requests: %s", ", ".join(name[:100] for name in new))
