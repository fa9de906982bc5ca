"""For programs that construct `llama_cpp.Llama` by themselves, such as LangChain and LlamaIndex."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import llama_cpp

from selfextend_gguf.llama import Llama

_PLAIN = llama_cpp.Llama


@contextmanager
def in_place_of_llama_cpp() -> Iterator[None]:
    """Inside, `llama_cpp.Llama` means our `Llama`, also to modules that have imported it by name.

    Process-wide, so construct models by one thread meanwhile; objects stay what they are. A module that is imported for
    the first time inside, and imports the class by name, keeps ours.

    >>> from selfextend_gguf.integrations import in_place_of_llama_cpp
    >>> with in_place_of_llama_cpp():
    ...     import llama_cpp
    ...     llama_cpp.Llama.__module__
    'selfextend_gguf.llama'
    >>> llama_cpp.Llama.__module__
    'llama_cpp.llama'
    """
    holders = [
        module
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType) and not _is_ours(module) and vars(module).get("Llama") is _PLAIN
    ]
    _let_mean(holders, Llama)
    try:
        yield
    finally:
        _let_mean(holders, _PLAIN)


def _is_ours(module: ModuleType) -> bool:
    return module.__name__.partition(".")[0] == __name__.partition(".")[0]


def _let_mean(modules: list[ModuleType], kind: type) -> None:
    for module in modules:
        module.Llama = kind  # type: ignore[attr-defined]
