"""Questions about facts of a long document, asked as `sx-gguf run` asks them. Writes docs/answers.md.

    python -m selfextend_gguf.studies.answers MODEL.gguf --document policy.txt --kept kept.jsonl

The questions and the words that a right answer must hold are in tests/data/answers.json. A document is read once by
each method; for every question the cache goes back to its end. With --around a question is asked about so many tokens
of the document, for models that find nothing in more. Results are kept as they come: a second call goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.kept import Kept
from selfextend_gguf.evaluation.readers import open_reader, pretended
from selfextend_gguf.evaluation.retrieval import wilson_interval
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.prompt import make_prompt

QUESTIONS = Path(__file__).parents[2] / "tests" / "data" / "answers.json"
ANSWER_TOKENS = 48
ROOM = 160  # tokens of the longest question, what the chat template puts around it, and the answer
PAGE = 1000  # characters of the page that holds an answer, on either side of it, up to the end of the paragraph
THIRDS = ("first", "middle", "last")
PAGE_ALONE, TRUNCATED = "page alone", "truncated"
METHODS = (PAGE_ALONE, "selfextend", "dca", "restart", "yarn", TRUNCATED, "plain")


@dataclass(frozen=True)
class Question:
    """A question about a fact of a text."""

    text: str
    words: tuple[str, ...]  # all of them are in a right answer
    page: str  # the paragraphs around the fact
    place: float  # of the fact in the text, 0 to 1

    @property
    def third(self) -> str:
        return THIRDS[min(2, int(self.place * 3))]


def load(questions: Path, document: Path) -> tuple[str, list[Question]]:
    """The part of the document that is asked about, and the questions, in the order of its text.

    Raises ConfigError if the document does not hold a fact asked for: then it is another edition.
    """
    asked = json.loads(questions.read_text(encoding="utf-8"))
    whole = document.read_text(encoding="utf-8")

    def find(text: str, quote: str) -> int:
        at = text.find(quote)
        if at < 0:
            raise ConfigError(f"{document} does not hold {quote!r}: the questions are about {asked['document']}")
        return at

    begin = find(whole, asked["begin"])
    text = whole[begin : begin + find(whole[begin:], asked["end"])].rstrip()
    result = []
    for entry in asked["questions"]:
        at = find(text, entry["fact"])
        left, right = text.rfind("\n\n", 0, max(0, at - PAGE)), text.find("\n\n", at + PAGE)
        page = text[max(0, left) : len(text) if right < 0 else right].strip()
        result.append(Question(entry["question"], tuple(entry["words"]), page, at / len(text)))
    return text, sorted(result, key=lambda question: question.place)


def holds(answer: str, words: Sequence[str]) -> bool:
    """Whether an answer holds all the words, as words."""
    return all(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in words)


def latest(info: ModelInfo, text: str, n_tokens: int) -> str:
    """The end of a text, in at most `n_tokens`."""
    tokens = info.tokenizer.tokens(text, begins=False)
    return info.tokenizer.detokenize(tokens[-n_tokens:]).decode("utf-8", "ignore")


def around(
    info: ModelInfo, text: str, questions: Sequence[Question], n_tokens: int
) -> tuple[list[str], list[Question]]:
    """For each question `n_tokens` of the text that hold the fact, and where in them it stands: evenly from their
    beginning to their end, one question after the other."""
    tokens = info.tokenizer.tokens(text, begins=False)
    n_tokens = min(n_tokens, len(tokens))
    parts, placed = [], []
    for number, question in enumerate(questions):
        at = len(info.tokenizer.tokens(text[: int(question.place * len(text))], begins=False))
        begin = at - int((number + 0.5) / len(questions) * n_tokens)
        begin = max(0, min(begin, len(tokens) - n_tokens))
        parts.append(info.tokenizer.detokenize(tokens[begin : begin + n_tokens]).decode("utf-8", "ignore"))
        placed.append(replace(question, place=(at - begin) / n_tokens))
    return parts, placed


def ask(
    model: Path,
    method: str,
    texts: Sequence[str],
    questions: Sequence[Question],
    pretend: int | None,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """The answers by a method of METHODS to one question about each text, as JSON can hold them."""
    overrides = pretended(model, pretend)
    with ModelInfo(model, **overrides) as info:
        if method == TRUNCATED:
            texts = [latest(info, text, info.n_ctx_train - ROOM) for text in texts]
        prompts = [
            make_prompt(info, f"{shown.rstrip()}\n\n{question.text}").tokens
            for shown, question in zip(texts, questions, strict=True)
        ]
        began = time.monotonic()
        reader = open_reader(
            "plain" if method in (PAGE_ALONE, TRUNCATED) else method,
            str(model),
            max(map(len, prompts)) + ANSWER_TOKENS,
            **overrides,
            **arguments,
        )
        try:
            answers = [*_answers(reader, prompts)]
        finally:
            reader.close()
        return {
            "answers": [_spell(info, answer) for answer in answers],
            "n_tokens": max(map(len, prompts)),
            "seconds": round(time.monotonic() - began, 1),
        }


def _answers(reader: Any, prompts: Sequence[list[int]]) -> Iterator[list[int]]:
    """What the prompts have in common is read once."""
    shared = next((i for i, column in enumerate(zip(*prompts, strict=False)) if len({*column}) > 1), 0)
    for prompt in prompts:
        begin = shared or len(prompt) - 1
        yield from reader.answers(prompt[:begin], [prompt[begin:]], ANSWER_TOKENS)


def _spell(info: ModelInfo, answer: list[int]) -> str:
    """The text of an answer up to the token that ends it."""
    ends = (i for i, token in enumerate(answer) if llama_cpp.llama_vocab_is_eog(info.model.vocab, token))
    return info.tokenizer.detokenize(answer[: next(ends, len(answer))]).decode("utf-8", "replace").strip()


# ---- the document ----------------------------------------------------------------------------------------------

HEAD = """# Questions about a long document

Written{machine} by

```sh
python -m selfextend_gguf.studies.answers {command}
```

{n_questions} questions about facts in {document},
from "{begin}" up to "{end}", are asked as
`sx-gguf run MODEL -f FILE QUESTION --temp 0` asks them: document and question as one message in the model's chat
template. An answer counts as right if it holds the words that a right answer must hold; both are in
`tests/data/answers.json`. Of the questions that were tried, most of those were chosen that the model answers with the
page alone, and none that it answers without it.

* *page alone*: the paragraphs around the fact are the whole prompt. It is what the model can do at best.
* *truncated*: the end of the text that fits into the trained context, as programs do that cut what is too long.
* *plain*: the whole text, llama.cpp as it is. For a model that is read as if it were trained on fewer tokens than it
  was, this is what the others should equal.
* The others are schedules of this project (`selfextend` is the default) and llama.cpp's YaRN.

Intervals hold 95 %.
"""


def table(right: dict[str, list[bool]], questions: Sequence[Question]) -> str:
    rows = [f"| method | {' | '.join(f'{third} third' for third in THIRDS)} | all |", "|---|---:|---:|---:|---:|"]
    for method, flags in right.items():
        thirds = [[f for f, q in zip(flags, questions, strict=True) if q.third == third] for third in THIRDS]
        low, high = wilson_interval(sum(flags) / len(flags), len(flags))
        counts = " | ".join(f"{sum(third)} of {len(third)}" for third in thirds)
        rows.append(f"| {method} | {counts} | {sum(flags)} of {len(flags)} ({low:.2f} to {high:.2f}) |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--document", required=True, type=Path, help="UTF-8 text")
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--pretend", nargs="+", type=int, default=[0], help="trained contexts to pretend; 0 = its own")
    parser.add_argument("--around", nargs="+", type=int, default=[0], help="tokens around a fact; 0 = all the document")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--kept", type=Path, required=True, help="file that keeps results; those in it are not repeated"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("-ngl", "--n-gpu-layers", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of answers.md")
    parser.add_argument("--machine", default="", help="what it was measured on, for the document")
    parser.add_argument("--write-only", action="store_true", help="measure nothing, write what is kept")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)  # now, and not after hours
    whole, questions = load(args.questions, args.document)
    kept = Kept(args.kept)
    arguments = {"n_threads": args.threads, "n_threads_batch": args.threads, "n_gpu_layers": args.n_gpu_layers}
    parts = []
    for wish, n_tokens in itertools.product(args.pretend, args.around):
        pretend = wish or None
        with ModelInfo(args.model, **pretended(args.model, pretend)) as info:
            about = f"{n_tokens} tokens around each fact" if n_tokens else f"{len(info.tokenizer.tokens(whole))} tokens"
            texts, placed = [whole] * len(questions), questions
            if n_tokens:
                texts, placed = around(info, whole, questions, n_tokens)
            as_if = "as if trained" if pretend else "trained"
            heading = f"\n## {args.model.stem}, {as_if} on {info.n_ctx_train}: {about}\n"
        right = {}
        for method in args.methods:
            is_alone = method == PAGE_ALONE  # which is the same whatever is pretended, and however long the texts are
            shown, its_pretend = ([q.page for q in questions], None) if is_alone else (texts, pretend)
            what = {
                "model": args.model.name,
                "bytes": args.model.stat().st_size,
                "pretend": its_pretend,
                "texts": zlib.crc32("\0".join(shown).encode()),
                "questions": [question.text for question in questions],
                "method": method,
            }
            if args.write_only and not kept.has(what):
                continue
            is_new = not kept.has(what)
            measure = partial(ask, args.model, method, shown, questions, its_pretend, arguments)
            result = kept.measured(what, measure)
            right[method] = [holds(a, q.words) for a, q in zip(result["answers"], questions, strict=True)]
            if is_new:
                print(about, method, f"{sum(right[method])} of {len(questions)}, {result['seconds']} s")
                sys.stdout.flush()
        if set(right) - {PAGE_ALONE}:
            parts += [heading, table(right, placed), ""]
    asked = json.loads(args.questions.read_text(encoding="utf-8"))
    pretending, lengths = (" ".join(map(str, values)) for values in (args.pretend, args.around))
    command = f"{args.model.name} --document {args.document.name} --pretend {pretending} --around {lengths}"
    head = HEAD.format(
        machine=f" on {args.machine}" if args.machine else "",
        command=f"{command} --kept {args.kept.name}",
        n_questions=len(questions),
        **{name: asked[name].splitlines()[0] for name in ("document", "begin", "end")},
    )
    (args.out / "answers.md").write_text(head + "\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
