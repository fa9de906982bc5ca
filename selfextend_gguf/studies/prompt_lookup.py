"""What `--draft lookup` is worth where an answer repeats its prompt: docs/sampling.md.

    python -m selfextend_gguf.studies.prompt_lookup model.gguf --text book.txt --tokens 2000 12000

Passages of a text are read, and summaries of them and copies of their beginnings asked for, greedily; with and without
drafts, one after the other. Only generating is timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding

from selfextend_gguf.drafting import PromptLookup
from selfextend_gguf.generate import Piece, stream_completion
from selfextend_gguf.llama import Llama
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.prompt import Prompt, make_prompt

TASKS = {
    "summary": "Summarise the following text in a few sentences.\n\n{}",
    "copy": "{}\n\nRepeat the first paragraph of the text above, word for word.",
}


DRAFTS: tuple[Callable[[], LlamaDraftModel | None], ...] = (lambda: None, PromptLookup, LlamaPromptLookupDecoding)


@dataclass(frozen=True)
class Answer:
    text: str
    n_tokens: int
    seconds: float  # of generating

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.n_tokens / self.seconds


def passages(info: ModelInfo, text: str, n_tokens: int, n: int) -> list[str]:
    """`n` stretches of `text`, spread evenly, of about so many tokens."""
    per_character = len(info.tokenizer.tokens(text[:20000])) / len(text[:20000])
    length = int(n_tokens / per_character)
    return [text[begin : begin + length] for begin in range(0, len(text) - length, max(1, (len(text) - length) // n))][
        :n
    ]


def answer(llm: Llama, prompt: Prompt, max_tokens: int) -> Answer:
    pieces: list[Piece] = list(stream_completion(llm, prompt, max_tokens=max_tokens, temperature=0))
    timings = pieces[-1].timings
    return Answer("".join(piece.text for piece in pieces), timings.generated_tokens, timings.generate_seconds)


def row(task: str, n_tokens: int, answers: Sequence[Sequence[Answer]]) -> str:
    """A line of the table; `answers` to each prompt by each of DRAFTS."""
    plain = [a[0] for a in answers]
    cells = [f"{statistics.median(a.rate for a in plain):.1f}"]
    for i in range(1, len(DRAFTS)):
        ratios = [a[i].rate / a[0].rate for a in answers]
        same = sum(a[i].text == a[0].text for a in answers)
        cells.append(
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {same} of {len(plain)}"
        )
    return f"| {task} | {n_tokens} | {' | '.join(cells)} |"


HEADING = """\
| task | tokens read | without, tokens/s | `PromptLookup`, ratio (range) | same answer | llama_cpp's, ratio (range) \
| same answer |
|---|---:|---:|---:|---:|---:|---:|"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000], help="of a passage")
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("-n", "--predict", type=int, default=200, help="longest answer in tokens")
    parser.add_argument("-t", "--threads", type=int)
    args = parser.parse_args(argv)
    text = args.text.read_text("utf-8")
    print(HEADING, flush=True)
    with ModelInfo(args.model) as info:
        for n_tokens in args.tokens:
            common = {"n_ctx": n_tokens * 5 // 4 + args.predict + 256, "n_threads": args.threads, "verbose": False}
            common |= {"n_threads_batch": args.threads, "model_info": info}
            readers = [Llama(str(args.model), draft_model=draft(), **common) for draft in DRAFTS]
            for task, words in TASKS.items():
                prompts = [
                    make_prompt(info, words.format(passage))
                    for passage in passages(info, text, n_tokens, args.passages)
                ]
                answers = [[answer(llm, prompt, args.predict) for llm in readers] for prompt in prompts]
                print(row(task, n_tokens, answers), flush=True)
            for llm in readers:
                llm.close()


if __name__ == "__main__":
    main()
