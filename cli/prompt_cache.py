"""--prompt-cache: never in the way. Whatever is wrong with the file is one warning line, and the prompt is read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from selfextend_gguf.errors import ForeignPromptCacheError, PromptCacheError
from selfextend_gguf.llama import Llama
from selfextend_gguf.prompt_cache import SavedPrompt, read_prompt_header

from .options import at_most_one


def prompt_cache_file(path: Path | None, read_only_path: Path | None) -> PromptCacheFile:
    """The file that --prompt-cache or --prompt-cache-ro names."""
    values = {"--prompt-cache": path, "--prompt-cache-ro": read_only_path}
    path, read_only_path = at_most_one(values).values()
    return PromptCacheFile(path or read_only_path, read_only=read_only_path is not None)


class PromptCacheFile:
    """The file of one command; None as path: nothing is loaded or saved."""

    def __init__(self, path: Path | None, *, read_only: bool = False) -> None:
        self._path = path if path is not None and (read_only or not _is_empty(path)) else None
        self._target = None if read_only else path
        self._saved: SavedPrompt | None = None
        self._is_useful = True

    def context_for(self, n_ctx: int, tokens: Sequence[int]) -> int:
        """`n_ctx` for a prompt that begins with `tokens`, or the context the file was made in, so that it can be
        restored; a file that has less than half of them is not worth it."""
        if self._path is None:
            return n_ctx
        try:
            saved = read_prompt_header(self._path)
        except (PromptCacheError, OSError):
            return n_ctx  # `load` will say why
        self._is_useful = 2 * saved.common_prefix(tokens) >= len(tokens)
        return max(n_ctx, saved.n_ctx) if self._is_useful else n_ctx

    def load(self, llm: Llama) -> None:
        """Restore the file, if it exists and can be used."""
        if self._path is None:
            return
        try:
            llm.load_prompt(self._path)
            self._saved = read_prompt_header(self._path)
        except FileNotFoundError:
            if self._target is None:
                warnings.warn(f"the prompt cache {self._path} does not exist; the prompt is read", stacklevel=2)
        except (ForeignPromptCacheError, IsADirectoryError) as error:
            self._target = None
            warnings.warn(f"{error}; it is left as it is, and the prompt is read", stacklevel=2)
        except (PromptCacheError, OSError) as error:
            if self._is_useful:
                warnings.warn(f"{error}; the prompt is read", stacklevel=2)

    def save(self, llm: Llama) -> None:
        """Write what was read, unless the file has it already."""
        if self._target is None or llm.n_tokens == 0:
            return
        tokens = llm.input_ids[: llm.n_tokens]
        if self._saved is not None and self._saved.common_prefix(tokens) == len(tokens):
            return
        try:
            llm.save_prompt(self._target)
            self._saved = read_prompt_header(self._target)
        except (PromptCacheError, OSError) as error:
            self._target = None  # it will not become better
            warnings.warn(f"the prompt cache was not saved: {error}", stacklevel=2)


def _is_empty(path: Path) -> bool:
    """Made beforehand, as by mktemp."""
    return path.is_file() and path.stat().st_size == 0
