"""`sx-gguf run`: complete a prompt of any length."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import click

from selfextend_gguf._native import watch_interrupts
from selfextend_gguf.documents import Document, Pages
from selfextend_gguf.generate import Piece, Timings, stream_completion
from selfextend_gguf.llama import Llama
from selfextend_gguf.planning import check_room, whole_cells
from selfextend_gguf.prompt import Prompt, make_prompt

from .errors import EXIT_INTERRUPTED
from .options import (
    LIMIT,
    UNLIMITED,
    at_most_one,
    device_options,
    llama_arguments,
    loading_options,
    model_argument,
    predict_option,
    prompt_cache_options,
    sampling_options,
    self_extend_options,
    take_loading,
    take_more_samplers,
    take_sampling,
    take_system,
    template_options,
    text_options,
    verbose_option,
)
from .progress import note_on_terminal, reading_bar
from .prompt_cache import PromptCacheFile, prompt_cache_file
from .settings import key_of, precedence, settable
from .texts import STANDARD_INPUT, advice_on_length, combine, describe, files_option, pages_option, read_documents
from .thoughts import answer_printer, open_model, reasoning_option

UNLIMITED_ROOM = 4096  # tokens for an answer of -n -1, where no context is given


@click.command()
@model_argument
@click.argument("prompt", required=False)
@click.option("-p", "--prompt", "prompt_option", help="The prompt, or the question about the text of -f.")
@files_option("to read first; - = standard input")
@pages_option
@click.option("-c", "--ctx", type=click.IntRange(1), help="Context in tokens [what prompt and answer need].")
@predict_option(LIMIT)
@text_options
@template_options
@reasoning_option
@self_extend_options
@sampling_options
@device_options
@loading_options
@prompt_cache_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON record instead of streaming the text.")
@click.option("--timings", is_flag=True, help="Print speeds on standard error.")
@verbose_option
def run(
    model: Path,
    prompt: str | None,
    prompt_option: str | None,
    files: tuple[Path, ...],
    pages: Pages | None,
    ctx: int | None,
    predict: int,
    batch_size: int,
    raw: bool,
    special: bool,
    system: str | None,
    reasoning: str,
    seed: int,
    prompt_cache: Path | None,
    prompt_cache_ro: Path | None,
    as_json: bool,
    timings: bool,
    **options: Any,
) -> None:
    """Complete a prompt of any length.

    A text longer than the trained context is extended without asking. The prompt is the argument, -p, -f FILE or
    standard input. With -f and a prompt, the files come first. On a terminal and without any of them, a chat begins.
    Files are text in any encoding, PDF, EPUB, DOCX or HTML.

    \b
    Examples:
        sx-gguf run model.gguf "Once upon a time"
        sx-gguf run model.gguf -f book.txt -p "Who is the narrator?"
        sx-gguf run model.gguf -f report.pdf --pages 3,10-30 -p "What was decided?"
        sx-gguf run model.gguf --ctx 16384 < book.txt
        sx-gguf run model.gguf -f book.txt -p "Who is the narrator?" --prompt-cache book.kv
    """
    cache = prompt_cache_file(prompt_cache, prompt_cache_ro)
    prompt, prompt_option = at_most_one({"the prompt as an argument": prompt, "-p": prompt_option}).values()
    question = prompt_option if prompt is None else prompt
    if question is None and not files and not sys.stdin.isatty():
        files = (STANDARD_INPUT,)
    documents = read_documents(files, pages)
    if question is None and not documents:
        if as_json or timings or not sys.stdout.isatty():
            raise click.UsageError("no prompt: give it as an argument, with -p, with -f FILE, or on standard input")
        talk(click.get_current_context(), model)
        return
    system = take_system(options, system)
    loading = take_loading(options)
    more_samplers = take_more_samplers(options)
    with open_model(model, options, reasoning) as info:
        sampling = take_sampling(options, info) | {"seed": seed}

        def prompt_of(documents: Sequence[Document]) -> Prompt:
            return make_prompt(info, combine(documents, question), system, raw=raw, special=special)

        tokens = prompt_of(documents)
        if not tokens.tokens:
            raise click.UsageError("the prompt is empty")
        n_wanted = (UNLIMITED_ROOM if predict == UNLIMITED else predict) + 1
        n_ctx = ctx or cache.context_for(len(tokens.tokens) + n_wanted, tokens.tokens)
        arguments = loading | llama_arguments(**options)
        n_answer = 1 if ctx else n_wanted
        with advice_on_length(documents, lambda documents: len(prompt_of(documents).tokens), n_answer):
            check_room(len(tokens.tokens), whole_cells(n_ctx), n_answer=1)
            for document in documents:
                n_tokens = len(info.tokenizer.tokens(document.text, begins=False))
                note_on_terminal(describe(document, n_tokens, n_ctx))
            began = time.perf_counter()
            llm = Llama(str(model), n_ctx=n_ctx, n_batch=batch_size, seed=seed, model_info=info, **arguments)
    opening = {"load_seconds": time.perf_counter() - began}
    llm.more_samplers = more_samplers
    watch_interrupts(llm.ctx)
    try:
        began = time.perf_counter()
        cache.load(llm)
        opening["restore_seconds"] = time.perf_counter() - began
        answer = print_answer(llm, tokens, predict, sampling, cache, reasoning, echo=not as_json)
        if as_json:
            click.echo(json.dumps(record(model, llm, answer, reasoning, opening)))
        if timings:
            print_timings(answer[-1].timings, opening, llm.placement)
    finally:
        llm.close()


def talk(context: click.Context, model: Path) -> None:
    """A chat, with what of its options was given to `run`; the others are as `chat` would have them."""
    from .chat import chat  # only here: a completion does not wait for what a chat needs

    with chat.make_context("chat", [str(model)], parent=context.parent) as other:
        for option in settable(chat):
            flag, name = f"--{key_of(option)}", option.name
            shared = name in context.params and name in other.params
            if shared and precedence(flag, context) < precedence(flag, other):
                other.params[name] = context.params[name]
        chat.invoke(other)


def print_answer(
    llm: Llama,
    prompt: Prompt,
    max_tokens: int,
    sampling: dict[str, Any],
    cache: PromptCacheFile,
    reasoning: str,
    *,
    echo: bool,
) -> list[Piece]:
    """Generate, streaming to standard output if `echo`; the pieces of the answer."""
    answer: list[Piece] = []
    is_read = False
    try:
        with reading_bar() as show:

            def on_read(done: int, total: int) -> None:
                nonlocal is_read
                show(done, total)
                is_read = done == total
                if is_read:
                    cache.save(llm)

            pieces = stream_completion(llm, prompt, max_tokens=max_tokens, on_read=on_read, **sampling)
            first = next(pieces, None)
        with answer_printer(reasoning) as print_piece:
            for piece in chain([first] if first else [], pieces):
                answer.append(piece)
                if echo:
                    print_piece(piece)
    except KeyboardInterrupt:
        if is_read:
            click.echo("\nInterrupted while generating.", err=True)
        else:
            click.echo(f"Interrupted after reading {llm.n_tokens} of {len(prompt.tokens)} tokens.", err=True)
            cache.save(llm)
        sys.exit(EXIT_INTERRUPTED)
    if echo:
        click.echo()
    last = answer[-1]
    if last.fills(llm.n_ctx()):
        click.echo(f"The context of {llm.n_ctx()} tokens is full: a larger --ctx makes room.", err=True)
    elif last.finish_reason == "length" and last.kind == "thought" and reasoning != "show":
        click.echo(f"The model was still thinking after {max_tokens} tokens (-n).", err=True)
    return answer


def record(model: Path, llm: Llama, answer: list[Piece], reasoning: str, opening: dict[str, float]) -> dict[str, Any]:
    """Everything about a completion, for --json."""
    timings = answer[-1].timings.as_dict()
    return {
        "model": str(model),
        "text": "".join(piece.text for piece in answer if piece.kind == "answer" or reasoning == "show"),
        "reasoning": "".join(piece.text for piece in answer if piece.kind == "thought").strip() or None,
        "finish_reason": answer[-1].finish_reason,
        "prompt_tokens": timings.pop("prompt_tokens"),
        "cached_tokens": timings.pop("cached_tokens"),
        "generated_tokens": timings.pop("generated_tokens"),
        "n_ctx": llm.n_ctx(),
        "placement": llm.placement,
        "self_extend": asdict(llm.self_extend) if llm.self_extend else None,
        "timings": {**opening, **timings},
    }


def print_timings(timings: Timings, opening: dict[str, float], placement: str) -> None:
    """Speeds on standard error."""
    numbers = timings.as_dict()
    click.echo(
        f"load {sum(opening.values()):.2f} s | prompt {timings.prompt_tokens} tokens, "
        f"{timings.cached_tokens} of them cached, {timings.prompt_seconds:.2f} s, "
        f"{numbers['prompt_tokens_per_second']:.1f} tokens/s | generated {timings.generated_tokens} tokens, "
        f"{timings.generate_seconds:.2f} s, {numbers['generated_tokens_per_second']:.1f} tokens/s | "
        f"rewriting keys {timings.rewrite_seconds:.3f} s | {placement}",
        err=True,
    )
