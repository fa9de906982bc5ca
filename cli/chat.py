"""`sx-gguf chat`: a conversation on the terminal or in a pipe."""

from __future__ import annotations

import errno
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import click
import psutil

from selfextend_gguf.conversation import Conversation
from selfextend_gguf.documents import Document, Pages, parse_pages
from selfextend_gguf.errors import (
    ContextFullError,
    ConversationError,
    PromptCacheError,
    SelfExtendError,
    UnsupportedModelError,
)
from selfextend_gguf.generate import Piece, Timings
from selfextend_gguf.kv_cache import KV_TYPES, SAFE_REWRITES
from selfextend_gguf.llama import Llama
from selfextend_gguf.machine_memory import memory
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.planning import PARAMETERS, default_context
from selfextend_gguf.server.kept_prompts import KeptPrompts, RememberingLlama
from selfextend_gguf.stores import name_of

from .answer_options import KEYS, NAMES, AnswerOptions
from .colours import coloured
from .interrupts import deferred_interrupts
from .last_chat import LastChat
from .line_input import piped_messages
from .options import (
    LIMIT,
    UNLIMITED,
    context_option,
    device_options,
    llama_arguments,
    loading_options,
    model_argument,
    predict_option,
    prompt_cache_options,
    sampling_options,
    self_extend_options,
    take_loading,
    take_system,
    template_options,
    text_options,
    verbose_option,
)
from .progress import reading_bar
from .prompt_cache import PromptCacheFile, prompt_cache_file
from .texts import (
    STANDARD_INPUT,
    before_question,
    describe,
    files_option,
    pages_option,
    pages_that_fit,
    read_documents,
)
from .thoughts import answer_printer, open_model, reasoning_option

_MAKE_ROOM = "/undo, /clear or a larger --ctx make room"


@click.command()
@model_argument
@files_option("to put before the first message")
@pages_option
@context_option
@predict_option(None, f", the default; without a chat template {LIMIT}")
@text_options
@template_options
@reasoning_option
@self_extend_options
@sampling_options
@device_options
@loading_options
@prompt_cache_options
@click.option("--no-history", is_flag=True, help="Leave the file alone that keeps what was typed for the next chat.")
@verbose_option
def chat(
    model: Path,
    files: tuple[Path, ...],
    pages: Pages | None,
    ctx: int | None,
    batch_size: int,
    raw: bool,
    special: bool,
    system: str | None,
    reasoning: str,
    seed: int,
    prompt_cache: Path | None,
    prompt_cache_ro: Path | None,
    no_history: bool,
    **options: Any,
) -> None:
    """Talk with a model; /help lists the commands.

    Answers go to standard output, all else to standard error. From a pipe, each line is a message or a command.

    \b
    Examples:
        sx-gguf chat model.gguf
        sx-gguf chat model.gguf -f book.txt --system "Answer in one sentence."
        printf 'Hello!\\n/save hello.json\\n' | sx-gguf chat model.gguf
    """
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    system = take_system(options, system)
    loading = take_loading(options)
    cache = prompt_cache_file(prompt_cache, prompt_cache_ro)
    if STANDARD_INPUT in files:
        raise click.UsageError("standard input is the conversation: give a file with -f, or use run")
    documents = read_documents(files, pages)
    with open_model(model, options, reasoning) as info:
        answers = AnswerOptions(click.get_current_context(), info)
        arguments = llama_arguments(**{name: value for name, value in options.items() if name not in NAMES})
        # The seed is that of a sequence of answers; given to each answer, it would make /regen repeat itself.
        llm = open_llama(info, ctx, cache, n_batch=batch_size, seed=seed, **loading, **arguments)
        try:
            cache.load(llm)
            conversation = Conversation(llm, info, system=system, raw=raw, special=special)
            last = open_last_chat(keeps=is_terminal and not no_history)
            dialogue = Dialogue(conversation, llm, info, answers, last)
            if is_terminal:
                note(
                    f"{name_of(model)}, context {llm.n_ctx()} tokens (trained on {info.n_ctx_train}), "
                    f"{llm.placement}. /help for help."
                )
            if conversation.raw and not raw:
                note("The model has no chat template: texts are continued as they are.")
            for document in documents:
                dialogue.put_before(document)
            read = terminal_messages(keeps_history=not no_history) if is_terminal else piped_messages()
            if is_terminal and not no_history and last.before.exists():
                note("/load takes up the last conversation.")
            hold(dialogue, read, is_terminal, verbose=options["verbose"])
        finally:
            cache.save(llm)
            llm.close()


def note(text: str) -> None:
    """Tell something beside the conversation."""
    word, colon, rest = text.partition(":")
    colour = {"Error": "red", "Warning": "yellow"}.get(word)
    click.echo(coloured(word + colon, fg=colour) + rest if colour else coloured(text, dim=True), err=True)


def open_llama(info: ModelInfo, ctx: int | None, cache: PromptCacheFile, **arguments: Any) -> Llama:
    """Load the model; without `ctx`, for as long a text as makes sense, and as the prompt cache needs."""
    parameters = {name: arguments[name] for name in PARAMETERS}
    n_ctx = ctx or cache.context_for(default_context(info.n_ctx_train, **parameters), [])
    is_rounded = arguments["type_k"] in {KV_TYPES[name] for name in SAFE_REWRITES}
    kind = RememberingLlama if is_rounded else Llama
    try:
        llm = kind(str(info.path), n_ctx=n_ctx, model_info=info, **arguments)
    except UnsupportedModelError as error:
        if ctx is not None:
            raise
        note(f"The context is the trained one, {info.n_ctx_train} tokens: {error}")
        llm = kind(str(info.path), n_ctx=info.n_ctx_train, model_info=info, **arguments)
    if isinstance(llm, RememberingLlama):  # /regen and /undo go back to copies: moving keys back would round them again
        llm.kept_prompts, llm.comes_again = KeptPrompts(memory().available // 4), True
    return llm


def terminal_messages(*, keeps_history: bool) -> Callable[[], str]:
    """Reads what is typed."""
    from prompt_toolkit.completion import Completer, WordCompleter

    from .terminal_input import PATHS, CommandCompleter, history_file, open_history, typed_messages

    arguments: dict[str, Completer] = dict.fromkeys(("file", "save", "load"), PATHS)
    arguments["set"] = WordCompleter([f"{key} " for key in KEYS], sentence=True)
    completer = CommandCompleter(COMMANDS, arguments)
    try:
        history = open_history(history_file() if keeps_history else None)
    except OSError as error:
        note(f"Warning: what is typed is not kept for the next chat: {error}")
        history = open_history(None)
    return typed_messages(completer, history)


def open_last_chat(*, keeps: bool) -> LastChat:
    """Where the conversation is kept."""
    try:
        return LastChat(keeps=keeps)
    except OSError as error:
        note(f"Warning: the conversation is not kept beyond the end of the program: {error}")
        return LastChat(keeps=False)


def hold(dialogue: Dialogue, read: Callable[[], str], is_terminal: bool, *, verbose: bool) -> None:
    """Read messages and commands and do what they ask for, to the end of input."""
    while True:
        try:
            try:
                dialogue.handle(read())
            finally:
                dialogue.keep()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
        except (SelfExtendError, OSError, MemoryError, click.ClickException) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise
            if verbose:
                traceback.print_exception(error)
            note(f"Error: {explain(error)}")


def explain(error: Exception) -> str:
    """An expected error in a line."""
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, ContextFullError):
        return f"{error}: {_MAKE_ROOM}"
    return str(error) or type(error).__name__


class Dialogue:
    """What messages and commands do."""

    def __init__(
        self,
        conversation: Conversation,
        llm: Llama,
        info: ModelInfo,
        answers: AnswerOptions,
        last: LastChat,
    ) -> None:
        self._conversation = conversation
        self._last = last
        self._llm = llm
        self._info = info
        self._answers = answers
        self._attached: list[str] = []  # texts to put before the next message
        self._timings: Timings | None = None  # of the last answer
        answers.use_in(llm)

    def handle(self, text: str) -> None:
        """Answer a message or carry out a command. Raises EOFError for the command that ends the conversation."""
        if text.startswith("/") and not text.startswith("//"):
            name, *rest = re.split(r"\s+", text[1:].rstrip(), maxsplit=1)
            argument = "".join(rest)
            if name not in COMMANDS:
                raise ConversationError(f"no command /{name}: see /help, or begin a message with // for a slash")
            command = COMMANDS[name]
            if not command.takes(argument):
                raise ConversationError(f"usage: /{name} {command.argument}".rstrip())
            command.action(self, argument)
        elif text.strip():
            self.say(text.removeprefix("/"))

    def keep(self) -> None:
        """Keep the conversation beyond the end of the program, as well as can be."""
        try:
            self._last.keep(self._conversation)
        except OSError as error:
            note(f"Warning: the conversation is not kept beyond the end of the program: {error}")
            self._last = LastChat(keeps=False)

    @property
    def _limit(self) -> int:
        """Most tokens of an answer."""
        if self._answers.predict is not None:
            return self._answers.predict
        return LIMIT if self._conversation.raw else UNLIMITED  # without a template no answer ends by itself

    # ---- messages ------------------------------------------------------------------------------------------------

    def say(self, message: str) -> None:
        """Answer a message, after the texts attached to it."""
        for text in reversed(self._attached):
            message = before_question(text, message)
        n_before = len(self._conversation.messages)
        try:
            self._answer(self._conversation.ask, message)
        finally:
            if len(self._conversation.messages) > n_before:  # else it was taken back, and may be sent again
                self._attached.clear()

    def say_again(self, _: str) -> None:
        """Answer the last message anew."""
        self._answer(self._conversation.ask_again)

    def _answer(self, ask: Callable[..., Generator[Piece, None, None]], *message: str) -> None:
        """Show an answer as it comes. Raises KeyboardInterrupt when Ctrl-C stopped it."""
        n_read, n_to_read, last = 0, 0, None
        with deferred_interrupts(self._llm) as check:

            def on_read(done: int, total: int) -> None:
                nonlocal n_read, n_to_read
                n_read, n_to_read = done, total
                show(done, total)
                check()

            answer = ask(*message, max_tokens=self._limit, on_read=on_read, **self._answers.sampling)
            with closing(answer) as pieces:
                try:
                    with reading_bar(erase=True) as show:
                        first = next(pieces, None)
                    with answer_printer(self._answers.reasoning) as print_piece:
                        for last in chain([first] if first else [], pieces):
                            print_piece(last)
                            check()
                except KeyboardInterrupt:
                    if last is None:
                        left = "the message is taken back" if message else "the answer stays"
                        note(f"Interrupted after reading {n_read} of {n_to_read} tokens; {left}.")
                    raise
                finally:
                    if last is not None:
                        click.echo()
                        self._timings = last.timings
        if last is not None and last.fills(self._llm.n_ctx()):
            note(f"The context is full: {_MAKE_ROOM}.")
        elif last is not None and last.finish_reason == "length" and not self._conversation.raw:
            note(f"The answer was cut after {self._limit} tokens (-n).")  # without a template every answer ends so

    # ---- commands ------------------------------------------------------------------------------------------------

    def help(self, _: str) -> None:
        for name, command in COMMANDS.items():
            note(f"{f'/{name} {command.argument}':<24}{command.help}")
        note("A message that begins with a slash: //... A line that ends with a backslash goes on in the next.")

    def clear(self, _: str) -> None:
        self._conversation.clear()
        self._attached.clear()
        note("A new conversation begins.")

    def undo(self, _: str) -> None:
        note(f"Taken back: {textwrap.shorten(self._conversation.undo(), 60, placeholder=' ...')}")

    def attach(self, argument: str) -> None:
        pages = re.match(r"--pages[\s=]\s*(\S+)\s+", argument)
        path = argument[pages.end() :] if pages else argument
        (document,) = read_documents([_path(path)], parse_pages(pages[1]) if pages else None)
        self.put_before(document)

    def put_before(self, document: Document) -> None:
        """Put a document before the next message. Raises ContextFullError for one that will not fit."""

        def count(texts: Iterable[str]) -> int:
            return sum(len(self._info.tokenizer.tokens(text, begins=False)) for text in texts)

        n_ctx, n_tokens = self._llm.n_ctx(), count([document.text])
        n_taken = count([m["content"] for m in self._conversation.messages]) + count(self._attached)
        if n_taken + n_tokens > n_ctx:
            room = n_ctx - n_taken - max(self._limit, 0)
            fitting = pages_that_fit([document], lambda documents: count(d.text for d in documents), room)
            raise ContextFullError(
                f"{document.name} has {n_tokens} tokens, {n_taken + n_tokens - n_ctx} too many for the context of "
                f"{n_ctx}, {n_taken} of which are taken{fitting}",
                n_ctx,
            )
        self._attached.append(document.text)
        note(f"{describe(document, n_tokens, n_ctx)}, to be read before the next message.")

    def set_system(self, text: str) -> None:
        self._conversation.system = text or None
        note("The system message is set." if text else "There is no system message.")

    def set_option(self, argument: str) -> None:
        if not argument:
            note(textwrap.fill(str(self._answers), 100, break_on_hyphens=False, break_long_words=False))
            return
        key, *text = argument.split(maxsplit=1)
        self._answers.set(key, "".join(text))
        self._answers.use_in(self._llm)
        note(f"{key}: {text[0] if text else 'the default'}, from the next answer on.")

    def copy(self, _: str) -> None:
        from .clipboard import copy

        if not self._conversation.messages:
            raise ConversationError("there is no answer to copy")
        answer = self._conversation.messages[-1]["content"].strip()
        note(f"{len(answer)} characters copied to {copy(answer)}.")

    def save(self, path: str) -> None:
        file = _path(path)
        self._conversation.save(file)
        note(f"{path}: {len(self._conversation.messages)} messages saved.")
        self._conversation.save_cache(_cache_of(file))

    def load(self, path: str) -> None:
        if not path and not self._last.before.exists():
            raise ConversationError("there is no earlier conversation: usage: /load FILE")
        file = _path(path) if path else self._last.before
        self._conversation.load(file)
        self._attached.clear()
        note(f"{path or 'The last conversation'}: {len(self._conversation.messages)} messages loaded.")
        if not path:
            return  # it has no cache
        try:
            self._conversation.load_cache(_cache_of(file))
        except (PromptCacheError, OSError) as error:
            note(f"Warning: {explain(error)}: the text is read again at the next message.")

    def stats(self, _: str) -> None:
        llm = self._llm
        note(f"Cache        {llm.n_tokens} of {llm.n_ctx()} tokens, trained on {self._info.n_ctx_train}")
        config = llm.self_extend
        note(
            f"Self-Extend  group size {config.group_size}, neighbor window {config.neighbor_window}"
            if config
            else "Self-Extend  not needed"
        )
        note(f"Model        {llm.placement}")
        if self._timings is not None:
            t = self._timings.as_dict()
            note(
                f"Last answer  read {t['prompt_tokens'] - t['cached_tokens']} tokens "
                f"({t['prompt_tokens_per_second']:.1f} tokens/s), {t['cached_tokens']} were cached; "
                f"generated {t['generated_tokens']} ({t['generated_tokens_per_second']:.1f} tokens/s)"
            )
        note(f"Memory       {psutil.Process().memory_info().rss / 2**20:.0f} MiB")

    def end(self, _: str) -> None:
        raise EOFError


def _path(text: str) -> Path:
    """A path as typed, "~" being the home folder."""
    try:
        return Path(text.replace("\0", "")).expanduser()
    except RuntimeError:  # "~name", and nobody has that name
        return Path(text)


def _cache_of(path: Path) -> Path:
    """Where the cache of a saved conversation lies."""
    return path.with_name(f"{path.name}.kv")


@dataclass(frozen=True)
class Command:
    """A command of the conversation; an `argument` in brackets may be left out."""

    argument: str
    help: str
    action: Callable[[Dialogue, str], None]

    def takes(self, argument: str) -> bool:
        """Whether it can be called with `argument`, "" being none."""
        return bool(argument) == bool(self.argument) or (not argument and self.argument.startswith("["))


COMMANDS = {
    "help": Command("", "Show this.", Dialogue.help),
    "clear": Command("", "Begin a new conversation; the system message stays.", Dialogue.clear),
    "undo": Command("", "Take back the last message and its answer.", Dialogue.undo),
    "regen": Command("", "Answer the last message anew.", Dialogue.say_again),
    "file": Command("PATH", "Put a document, or --pages 3,10-30 of it, before the next message.", Dialogue.attach),
    "system": Command("[TEXT]", "Set the system message, or remove it.", Dialogue.set_system),
    "set": Command(
        "[OPTION [VALUE]]",
        "Change an option of answers, such as temp; without VALUE: to its default.",
        Dialogue.set_option,
    ),
    "copy": Command("", "Copy the last answer to the clipboard.", Dialogue.copy),
    "save": Command("FILE", "Save the conversation, and its cache in FILE.kv.", Dialogue.save),
    "load": Command("[FILE]", "Go on with a saved conversation, or with that of the last chat.", Dialogue.load),
    "stats": Command("", "Show the cache, the last speeds and the memory.", Dialogue.stats),
    "exit": Command("", "End; so does Ctrl-D.", Dialogue.end),
}
