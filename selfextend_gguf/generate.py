"""Completing a prompt piece by piece, with timings."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from llama_cpp.llama_types import CreateCompletionStreamResponse

from selfextend_gguf.llama import Llama
from selfextend_gguf.planning import check_room
from selfextend_gguf.prompt import Prompt
from selfextend_gguf.reasoning import FAMILIES, Kind, Splitter, Whole
from selfextend_gguf.tokenizer import Tokenizer


@dataclass(frozen=True)
class Timings:
    """Tokens and seconds of a completion so far."""

    prompt_tokens: int
    cached_tokens: int = 0  # of the prompt's, those that were in the cache and not read
    prompt_seconds: float = 0.0
    generated_tokens: int = 0  # with the token that ended the answer, if one did
    generate_seconds: float = 0.0
    rewrite_seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """All numbers, and the two speeds in tokens per second."""
        return asdict(self) | {
            "prompt_tokens_per_second": _rate(self.prompt_tokens - self.cached_tokens, self.prompt_seconds),
            "generated_tokens_per_second": _rate(self.generated_tokens - 1, self.generate_seconds),
        }


def _rate(tokens: int, seconds: float) -> float:
    return round(tokens / seconds, 2) if seconds > 0 and tokens > 0 else 0.0


@dataclass(frozen=True)
class Piece:
    """A piece of what the model says; `finish_reason` is "stop" or "length" in the last one."""

    kind: Kind
    text: str
    finish_reason: str | None
    timings: Timings

    def fills(self, n_ctx: int) -> bool:
        """Whether the answer was cut because a context of so many tokens is full."""
        n_tokens = self.timings.prompt_tokens + self.timings.generated_tokens
        return self.finish_reason == "length" and n_tokens >= n_ctx


def spelled_tags(tokenizer: object) -> list[str]:
    """The tags around thoughts that are control tokens of a model, and would not be seen in what it says."""
    if not isinstance(tokenizer, Tokenizer):
        return []
    families = [tags for tags in FAMILIES if tokenizer.spelled_in([tags.begin])]
    return [text for tags in families for text in (tags.begin, tags.end, *tags.others)]


def stream_completion(
    llm: Llama,
    prompt: Prompt,
    *,
    max_tokens: int,
    on_read: Callable[[int, int], None] = lambda done, total: None,
    tells_thoughts: bool = True,
    spelled: Sequence[str] = (),
    clock: Callable[[], float] = time.perf_counter,
    **sampling: Any,
) -> Generator[Piece, None, None]:
    """Complete `prompt`; `sampling` goes to `Llama.create_completion`. `max_tokens` -1 = while the context has room.

    `on_read(done, total)` is called before and while that part of the prompt is read that the cache does not hold; what
    it raises leaves the cache with the tokens read so far. Without `tells_thoughts` all pieces are of the answer, in
    which control tokens are left out, but for those in `spelled`. Timings are those of `clock`, in seconds. Raises
    ContextFullError when the prompt does not fit.
    """
    n_prompt = len(prompt.tokens)
    check_room(n_prompt, llm.n_ctx(), n_answer=1)
    # The last token is read in any case, for its logits.
    n_cached = max(
        0, min(n_prompt - 1, llm.longest_token_prefix(llm.input_ids[: llm.n_tokens].tolist(), prompt.tokens))
    )
    timings = Timings(n_prompt, n_cached)
    on_read(0, n_prompt - n_cached)
    rewritten_before = llm.rewrite_stats.seconds
    last_answer = llm.answer_tokens
    began = clock()

    def n_generated() -> int:
        return 0 if llm.answer_tokens is last_answer else len(llm.answer_tokens)

    def progress(done: int, total: int) -> None:
        nonlocal began, timings
        now = clock()
        if timings.prompt_seconds == 0:  # the cache may have been given more of the prompt meanwhile
            timings = replace(timings, cached_tokens=llm.n_tokens - done)
        if n_generated() == 0:
            timings = replace(timings, prompt_seconds=now - began)
            on_read(llm.n_tokens - timings.cached_tokens, n_prompt - timings.cached_tokens)
            began += clock() - now  # what the caller does meanwhile is neither reading nor generating
            now = began + timings.prompt_seconds
        timings = replace(
            timings,
            generate_seconds=now - began - timings.prompt_seconds,
            rewrite_seconds=llm.rewrite_stats.seconds - rewritten_before,
        )

    splitter = Splitter(prompt.thought_end) if tells_thoughts else Whole()
    llm.progress = progress
    llm.spelled = [*(spelled_tags(llm.tokenizer_) if tells_thoughts else ()), *spelled]
    try:
        chunks = llm.create_completion(prompt.tokens, max_tokens=max_tokens, stop=prompt.stop, stream=True, **sampling)
        for chunk in cast("Iterator[CreateCompletionStreamResponse]", chunks):  # as always with `stream`
            choice = chunk["choices"][0]
            timings = replace(timings, generated_tokens=n_generated())
            for kind, text in splitter.feed(choice["text"]):
                yield Piece(kind, text, None, timings)
            if choice["finish_reason"] is not None:
                for kind, text in splitter.finish():
                    yield Piece(kind, text, None, timings)
                yield Piece(splitter.kind, "", choice["finish_reason"], timings)
    finally:
        llm.spelled = ()
        if llm.progress is progress:  # not another completion's
            llm.progress = None
