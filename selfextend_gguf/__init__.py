"""Self-Extend (arXiv 2401.01325) for llama.cpp: read texts longer than a GGUF model's trained context."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfextend_gguf._native import RewriteStats, schedule_positions
    from selfextend_gguf.errors import SelfExtendError
    from selfextend_gguf.llama import Llama
    from selfextend_gguf.planning import plan
    from selfextend_gguf.schedule import SelfExtendConfig

__version__ = "0.1.0"
__all__ = ["Llama", "RewriteStats", "SelfExtendConfig", "SelfExtendError", "plan", "schedule_positions"]

# Imported when they are asked for: llama.cpp takes a tenth of a second, which `sx-gguf --help` can do without.
_HOMES = {
    "Llama": "llama",
    "RewriteStats": "_native",
    "SelfExtendConfig": "schedule",
    "SelfExtendError": "errors",
    "plan": "planning",
    "schedule_positions": "_native",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
