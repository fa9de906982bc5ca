"""Copies of what was read, for programs that ask about the same texts again and again.

Rolling back from a long text rotates cached keys back, and rounds them once more. One reader does not notice; a server
that rolls back a thousand times would. So here keys only ever move forward: a prompt goes on from the running text, or
from a copy, whose keys stand where a fresh reading would have them, and its logits are those of a fresh reading.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from selfextend_gguf._native import schedule_positions, schedule_step
from selfextend_gguf.atomic_file import remove_abandoned
from selfextend_gguf.errors import NotEnoughMemoryError, PromptCacheError
from selfextend_gguf.llama import Llama
from selfextend_gguf.machine_memory import memory
from selfextend_gguf.prompt_cache import CopiedPrompt, SavedPrompt, read_prompt_header
from selfextend_gguf.schedule import SelfExtendConfig

_LEAST = 64  # tokens that are worth a copy


@dataclass(eq=False)
class Kept:
    """A text that was read, and where its cache contents are: in memory or in a file."""

    saved: SavedPrompt
    content: CopiedPrompt | Path
    is_needed: bool = False  #: by who goes on from it: it is not dropped
    is_set_aside: bool = False  #: for that alone: it is dropped then

    @property
    def n_bytes(self) -> int:
        """In memory."""
        return self.content.n_bytes if isinstance(self.content, CopiedPrompt) else 0


class KeptPrompts:
    """Copies of texts that were read by one `Llama`, the least recently used ones dropped."""

    def __init__(self, capacity_bytes: int, folder: Path | None = None, *, read_only: bool = False) -> None:
        """`capacity_bytes`: of all copies in memory, and once more of the files in `folder`, which outlive the program.
        `read_only`: files in the folder are used, none is written or removed."""
        self._capacity = capacity_bytes
        self._folder = folder
        self._read_only = read_only
        self._kept: list[Kept] = []  # the least recently used first
        if folder is not None:
            for path in sorted(folder.glob("*.kv"), key=_last_use):
                with contextlib.suppress(PromptCacheError, OSError):
                    self._kept.append(Kept(read_prompt_header(path), path))

    @property
    def n_bytes(self) -> int:
        """Size of the copies in memory."""
        return sum(kept.n_bytes for kept in self._kept)

    def prepare(self, llm: Llama, prompt: Sequence[int], *, comes_again: bool = False) -> None:
        """Let `llm` hold what is known of `prompt`, and keep copies of it where later prompts may branch off: at its
        end too, if the same prompt comes again."""
        tokens = np.asarray(prompt, np.int32)
        known = self._recall(llm, tokens)
        points = set()
        if known > max(llm.n_tokens, _LEAST):
            points.add(known)  # two prompts parted here: there may be more
        if llm.n_tokens < len(tokens) // 2:
            points.add(_before_the_end(llm, len(tokens)))  # of a new text, whose last lines may be a question
        if comes_again:
            points.add(len(tokens) - 1)  # the last one is read in any case, for its logits
        for point in sorted(points):
            if llm.n_tokens < point < len(tokens):
                llm.eval(prompt[llm.n_tokens : point])
                self.keep(llm)

    def _recall(self, llm: Llama, tokens: npt.NDArray[np.int32]) -> int:
        """Go back to, or restore, the longest usable beginning of `tokens`; the longest that was ever read."""
        config = llm.self_extend
        live = llm.saved_prompt()
        ours = [kept for kept in self._kept if kept.saved.made_by == live.made_by]  # a folder may serve several models
        known = max(kept.common_prefix(tokens) for kept in (live, *(kept.saved for kept in ours)))
        best, usable = None, _usable(config, live, tokens)
        for kept in ours:
            n = _usable(config, kept.saved, tokens)
            if n > usable:
                best, usable = kept, n
        if best is not None:
            self._kept.remove(best)  # what comes next must not drop it
        if live.common_prefix(tokens) < len(live.tokens) // 2:
            self.keep(llm)  # another text comes; this one may come back
        if best is not None and not self._restore(llm, best):
            usable = 0
        if usable < min(_LEAST, len(tokens) // 2):
            usable = 0  # not worth another cut: it is where kernels for quantised weights round otherwise
        llm.n_tokens = usable  # whatever reads next goes on from there
        return known

    def _restore(self, llm: Llama, kept: Kept) -> bool:
        """Restore a copy and take it back as the latest used one; False, and it is gone, if it is damaged."""
        try:
            if isinstance(kept.content, Path):
                llm.load_prompt(kept.content)
                if not self._read_only:
                    os.utime(kept.content)
            else:
                llm.restore_prompt(kept.content)
        except (PromptCacheError, OSError) as error:
            warnings.warn(f"{error}; the prompt is read", stacklevel=2)
            return False
        self._add(kept)
        return True

    def _add(self, kept: Kept) -> None:
        """Keep a copy as the latest used one; the least recently used ones in memory go where there is no room."""
        self._kept.append(kept)
        self._make_room(0)

    def _make_room(self, n_bytes: int) -> bool:
        """Drop the least recently used copies in memory until there is room for another; False if there is none."""
        in_memory = [kept for kept in self._kept if isinstance(kept.content, CopiedPrompt) and not kept.is_needed]
        if n_bytes + self.n_bytes - sum(kept.n_bytes for kept in in_memory) > self._capacity:
            return False  # whatever is dropped
        while not self._has_room(n_bytes):
            if not in_memory:
                return False
            self._kept.remove(in_memory.pop(0))
        return True

    def _has_room(self, n_bytes: int) -> bool:
        # The capacity is a wish: whoever else takes memory meanwhile does not ask us.
        return self.n_bytes + n_bytes <= self._capacity and n_bytes <= memory().available // 2

    def set_aside(self, llm: Llama) -> Kept | None:
        """A copy of the running text, whose place another one takes; None where there is no room for it."""
        saved = llm.saved_prompt()
        for kept in self._kept:
            if isinstance(kept.content, CopiedPrompt) and np.array_equal(kept.saved.tokens, saved.tokens):
                kept.is_needed = True
                return kept
        if not self._make_room(llama_cpp.llama_state_seq_get_size(llm.ctx, 0)):
            return None
        with contextlib.suppress(NotEnoughMemoryError):
            kept = Kept(saved, llm.copy_prompt(), is_needed=True, is_set_aside=True)
            self._kept.append(kept)
            return kept
        return None

    def take_up(self, llm: Llama, kept: Kept) -> None:
        """Let `llm` hold a text again that was set aside. Raises PromptCacheError."""
        kept.is_needed = False
        if kept.is_set_aside:
            self._kept = [other for other in self._kept if other is not kept]
        assert isinstance(kept.content, CopiedPrompt)
        llm.restore_prompt(kept.content)

    def keep(self, llm: Llama) -> None:
        """Copy the running text, to memory and to the folder."""
        saved = llm.saved_prompt()
        if len(saved.tokens) < _LEAST:
            return
        same = [kept for kept in self._kept if np.array_equal(kept.saved.tokens, saved.tokens)]
        if any(not kept.is_set_aside for kept in same):
            return
        for kept in same:
            kept.is_set_aside = False
        if not same:
            n_bytes = llama_cpp.llama_state_seq_get_size(llm.ctx, 0)
            if not self._make_room(n_bytes):
                return
            self._add(Kept(saved, llm.copy_prompt()))
        if self._folder is not None and not self._read_only:
            name = hashlib.blake2b(saved.tokens.tobytes(), digest_size=16).hexdigest()
            self._write(llm, self._folder / f"{name}.kv")

    def _write(self, llm: Llama, path: Path) -> None:
        try:
            remove_abandoned(path.parent, ".*.kv.")  # of servers that were killed
            llm.save_prompt(path)
            files = sorted(path.parent.glob("*.kv"), key=_last_use)
            while sum(file.stat().st_size for file in files) > self._capacity and len(files) > 1:
                oldest = files.pop(0)
                oldest.unlink()
                self._kept = [kept for kept in self._kept if kept.content != oldest]
        except (PromptCacheError, OSError) as error:
            warnings.warn(f"a prompt was not saved: {error}", stacklevel=2)


class RememberingLlama(Llama):
    """A `Llama` that goes on from prompts it has read before."""

    #: Copies of what was read, for prompts that come again; None = the running text alone is reused.
    kept_prompts: KeptPrompts | None = None
    #: Whether the prompt of the next `generate` comes again.
    comes_again = False
    #: Whether the next `generate` reads all of its prompt, whatever is known of it.
    reads_anew = False

    def generate(
        self, tokens: Sequence[int], *args: Any, reset: bool = True, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """Generate tokens after a prompt, as the parent does."""
        if self.reads_anew:
            if self.kept_prompts is not None:
                self.kept_prompts.keep(self)  # the text that goes may come back
            self.reset()
        elif reset and self.kept_prompts is not None:
            self.kept_prompts.prepare(self, tokens, comes_again=self.comes_again)
        yield from super().generate(tokens, *args, reset=reset, **kwargs)


def _usable(config: SelfExtendConfig | None, saved: SavedPrompt, tokens: npt.NDArray[np.int32]) -> int:
    """How many of `tokens` a text can give without moving keys back; at most all but the last, whose logits are wanted.

    All that are common, or none: the keys of a text that has moved on are in another frame.
    """
    n = min(saved.common_prefix(tokens), len(tokens) - 1)
    if n == 0:
        return 0
    held = saved.key_positions[:n]
    if config is None:
        return n if np.array_equal(held, np.arange(n)) else 0
    as_last_read = np.append(schedule_positions(config, n - 1, n), n - 1)
    to_go_on = schedule_positions(config, n, n + 1)
    return n if np.array_equal(held, as_last_read) or np.array_equal(held, to_go_on) else 0


def _before_the_end(llm: Llama, n_tokens: int) -> int:
    """Where keys move for the last time but one in a text, so that what follows is more than a few lines."""
    if llm.self_extend is None:
        return 0
    begins = [0, 0]
    while begins[-1] < n_tokens:
        begins.append(begins[-1] + schedule_step(llm.self_extend, begins[-1], n_tokens - begins[-1]))
    return begins[-3]


def _last_use(path: Path) -> float:
    """Time of the last use of a file; 0 if another program has removed it."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
