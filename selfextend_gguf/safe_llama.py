"""`SafeLlama`: `llama_cpp.Llama` that survives wrong calls, wrong files, threads, and its own end.

What is checked here is what llama_cpp hands to C as it is, or loses on the way. Nothing here knows Self-Extend.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import llama_cpp
import llama_cpp._internals as internals
import numpy as np
import numpy.typing as npt
from llama_cpp.llama_cache import BaseLlamaCache
from llama_cpp.llama_chat_format import get_chat_completion_handler, guess_chat_format_from_gguf_metadata
from llama_cpp.llama_grammar import LlamaGrammar
from llama_cpp.llama_tokenizer import LlamaTokenizer

from selfextend_gguf._native import (
    last_error,
    note_log_errors,
    raise_interrupt,
)
from selfextend_gguf.adapters import adapters_of, load_adapter, set_adapters
from selfextend_gguf.chat_schemas import SchemaGrammar, json_format, wanted_schemas
from selfextend_gguf.checks import check_all, shown, whole_number
from selfextend_gguf.checks import seed as check_seed
from selfextend_gguf.checks import text as check_text
from selfextend_gguf.devices import placement, pointers
from selfextend_gguf.drafting import StepLimitedDraft
from selfextend_gguf.errors import (
    ConfigError,
    ContextFullError,
    EngineError,
    GrammarError,
    ModelFileError,
    NotEnoughMemoryError,
    SelfExtendError,
    UnknownArgumentError,
    UnsupportedModelError,
)
from selfextend_gguf.grammar import GrammarSampler, SchemaSampler, check_grammar
from selfextend_gguf.handles import ask_for_logits, check_tokens, make_safe
from selfextend_gguf.json_schema.forms import form, matcher, vocabulary
from selfextend_gguf.logprobs import Scored
from selfextend_gguf.model_info import model_file_error, set_log_level
from selfextend_gguf.more_samplers import MoreSamplers
from selfextend_gguf.planning import check_room, whole_cells
from selfextend_gguf.sampling import COMPLETION, ProcessedSampler, Processors, Sampler, as_processors, check_sampling
from selfextend_gguf.templates import (
    DEFAULT_TEMPLATE,
    chat_template,
    check_messages,
    template_names,
)
from selfextend_gguf.tokenizer import Tokenizer, encode, text_handler
from selfextend_gguf.turns import TakesTurns, takes_turn

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_OUT_OF_MEMORY = re.compile("alloc|memory", re.IGNORECASE)  # in what llama.cpp says of a device that refuses
_MOST_LOGITS = 64 << 20  # bytes of one decode's that are computed for `on_logits`
_COMPLETION = inspect.signature(llama_cpp.Llama.create_completion)


@contextlib.contextmanager
def _errors_of_ours() -> Iterator[None]:
    """What llama_cpp says of a prompt that is too long, as `eval` says it."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, SelfExtendError) or "exceed context window" not in str(error):
            raise
        raise ContextFullError(str(error)) from error


@dataclass
class _Run:
    """A generation: its prompt and what came of it."""

    prompt: list[int]
    answer: list[int] = field(default_factory=list)


class SafeLlama(llama_cpp.Llama, TakesTurns):
    """`llama_cpp.Llama` with checked calls, one at a time. See `Llama` for what it promises."""

    _n_tokens = 0  # of the text
    _n_held = 0  # tokens in the cache: more than those of the text between a rollback and the next evaluation
    _n_logits = 0  # how many of the latest tokens have logits to sample from
    _n_unscored = 0  # how many of the first tokens were restored, and have no rows in `scores`

    def __init__(self, **arguments: Any) -> None:
        """Of `llama_cpp.Llama`, checked. Raises ModelFileError, EngineError."""
        TakesTurns.__init__(self)
        self._stack = contextlib.ExitStack()  # the parent's destructor closes it, however early we fail
        self._keeps_logits = bool(arguments.get("logits_all"))
        self._run = _Run([])
        #: Called after every decode with (tokens done, tokens asked for) of the running `eval`.
        self.progress: Callable[[int, int], None] | None = None
        #: Called after every decode with the position of its first token and the logits of all its tokens (n, n_vocab),
        #: which are computed then; None = those of its last token alone are.
        self.on_logits: Callable[[int, npt.NDArray[np.single]], None] | None = None
        #: Texts whose control tokens are spelled in completions; those of stop strings always are.
        self.spelled: Sequence[str] = ()
        #: Samplers beside those of `create_completion`, for all completions.
        self.more_samplers = MoreSamplers()
        self._load(**arguments)
        if self.draft_model is not None:
            self.draft_model = StepLimitedDraft(self.draft_model, self._longest_step)
            self._logits_all = self._keeps_logits  # not also while a prompt is read

    def _load(
        self,
        *,
        model_path: str,
        n_ctx: int,
        n_batch: int,
        flash_attn: bool | None,
        lora_path: str | None = None,
        lora_scale: float = 1.0,
        adapters: Mapping[str, float] | None = None,
        devices: Sequence[str] | None = None,
        **arguments: Any,
    ) -> None:
        """Load weights, make a context and adapt it."""
        self.devices = devices
        note_log_errors(True)
        try:
            super().__init__(
                model_path,
                n_ctx=whole_cells(n_ctx),  # llama_cpp.Llama would size its token array without rounding
                n_batch=min(n_ctx, n_batch) if n_ctx else n_batch,
                flash_attn=bool(flash_attn),
                **arguments,
            )
        except SelfExtendError:
            raise
        except UnicodeDecodeError as error:  # llama_cpp looks at some tokens
            raise ModelFileError(f"{model_path} is damaged: its vocabulary is no UTF-8") from error
        except ValueError as error:
            if hasattr(self, "_ctx"):
                raise
            if self.placement != "CPU" and _OUT_OF_MEMORY.search(last_error()):
                raise NotEnoughMemoryError(
                    f"{self.placement} and {n_ctx} tokens do not fit the memory there: {last_error()}; fewer layers "
                    "(n_gpu_layers, -ngl) or a smaller context would"
                ) from error
            if not hasattr(self, "_model"):
                raise model_file_error(model_path, last_error()) from error
            raise EngineError(
                f"llama.cpp could not create a context of {n_ctx} tokens for {model_path}: {last_error()}"
            ) from error
        finally:
            note_log_errors(False)
        for owner in (self._model, self._ctx, self._batch):
            make_safe(owner)
        self._take_templates(arguments.get("chat_format"), arguments.get("chat_handler"))
        self._take_texts_as_texts()
        self.lora_path, self.lora_scale, self.adapters = lora_path, lora_scale, adapters
        loaded = []
        for path, scale in adapters_of(lora_path, lora_scale, adapters).items():
            loaded.append((load_adapter(self._model, path), scale))
            self._stack.callback(llama_cpp.llama_adapter_lora_free, loaded[-1][0])
        if loaded:
            set_adapters(self._ctx, loaded)

    @property
    def placement(self) -> str:
        """Where the layers are, in words: "CPU", "all layers on CUDA0"."""
        n_layers = (llama_cpp.llama_model_n_layer(self._model.model),) if hasattr(self, "_model") else ()
        return placement(self.model_params.n_gpu_layers, self.devices, *n_layers)

    # llama_cpp.Llama.__init__ has no argument for devices. The assignment of `model_params` is when they can be set.
    @property
    def model_params(self) -> Any:
        return self.__dict__["model_params"]

    @model_params.setter
    def model_params(self, params: Any) -> None:
        self.__dict__["model_params"] = params
        if self.devices is not None:
            self._device_pointers = pointers(self.devices)  # as long as the parameters
            params.devices = ctypes.cast(self._device_pointers, ctypes.c_void_p)

    # llama_cpp.Llama.__init__ loads the model, then creates the context from `context_params` in one go. The
    # assignment of `_model` is the moment between the two: the callback can be set.
    @property
    def _model(self) -> Any:
        try:
            return self.__dict__["_model"]
        except KeyError:
            raise AttributeError("_model") from None

    @_model.setter
    def _model(self, model: Any) -> None:
        self.__dict__["_model"] = model
        self._prepare_context(model)

    def _prepare_context(self, model: Any) -> None:
        """Change the parameters of the context that is about to be made."""
        set_log_level(self.verbose)
        note_log_errors(False)
        note_log_errors(True)  # forget what loading said: from here on it is about the context
        params = self.context_params
        if params.embeddings or not self._is_causal(model.metadata()):
            params.n_ubatch = params.n_batch  # tokens that see each other must be computed at once

    def _is_causal(self, metadata: Mapping[str, str]) -> bool:
        """Whether a token sees those before it only."""
        if self.context_params.attention_type != llama_cpp.LLAMA_ATTENTION_TYPE_UNSPECIFIED:
            return bool(self.context_params.attention_type == llama_cpp.LLAMA_ATTENTION_TYPE_CAUSAL)
        return metadata.get(f"{metadata.get('general.architecture')}.attention.causal") != "false"

    # ---- chat ------------------------------------------------------------------------------------------------

    # llama_cpp.Llama.__init__ compiles all templates of the metadata, whatever that takes. It is shown none.
    @property
    def metadata(self) -> dict[str, str]:
        """What the model file says of itself."""
        if hasattr(self, "_sampler"):  # set when there are no more templates to compile
            return self._metadata
        hidden = template_names(self._metadata).values()
        return {key: value for key, value in self._metadata.items() if key not in hidden}

    @metadata.setter
    def metadata(self, metadata: dict[str, str]) -> None:
        self._metadata = metadata

    def _take_templates(self, chat_format: str | None, chat_handler: Any) -> None:
        """Let `create_chat_completion` know the model's templates, and which one to use if none was asked for."""
        templates = {
            name: chat_template(self._model, self.metadata[key]) for name, key in template_names(self.metadata).items()
        }
        self._chat_handlers.update({name: template.to_chat_handler() for name, template in templates.items()})
        if chat_format is None and chat_handler is None and DEFAULT_TEMPLATE in templates:
            self.chat_format = guess_chat_format_from_gguf_metadata(self.metadata) or DEFAULT_TEMPLATE

    def create_chat_completion(self, messages: list[Any], *args: Any, **kwargs: Any) -> Any:
        """As `llama_cpp.Llama.create_chat_completion`; an answer that has to fit a JSON schema does.

        `response_format` may have type "json_schema", as in OpenAI's API. Raises GrammarError for schemas that cannot
        be kept, TemplateError when the model's chat template fails or takes too long, ConfigError for what are no
        messages, and what `create_completion` raises.
        """
        check_messages(messages)
        # Arguments by name, however they were given.
        kwargs = inspect.signature(super().create_chat_completion).bind(messages, *args, **kwargs).arguments
        if kwargs.get("logprobs") and kwargs.get("top_logprobs") is None:
            kwargs["top_logprobs"] = 0  # theirs would leave out those of the answer's own tokens too
        if "response_format" in kwargs:
            kwargs["response_format"] = json_format(kwargs["response_format"])
        asked = ("response_format", "tools", "tool_choice", "functions", "function_call")
        for schema in wanted_schemas(**{name: kwargs.get(name) for name in asked}):
            form(schema)  # before anything is read
        return super().create_chat_completion(**kwargs)

    @takes_turn
    def close(self) -> None:
        """Free the model. What needs it raises ClosedError from then on."""
        super().close()

    def __del__(self) -> None:
        if "_stack" in self.__dict__:  # else the arguments were no arguments
            self.close()

    # ---- texts -----------------------------------------------------------------------------------------------

    def _take_texts_as_texts(self) -> None:
        """Put our tokenizer in place of the parent's, and let chat formats find special tokens in their own words only.

        A tokenizer or chat handler that was given stays.
        """
        if type(self.tokenizer_) is not LlamaTokenizer:
            return
        tokenizer = self.tokenizer_ = Tokenizer(self._model)
        handlers = self._chat_handlers
        if self.chat_format is not None and self.chat_format not in handlers:
            handlers[self.chat_format] = get_chat_completion_handler(self.chat_format)
        self._chat_handlers = {name: text_handler(handler, tokenizer) for name, handler in handlers.items()}

    def tokenizer(self) -> Any:
        """The tokenizer of this model."""
        return self.tokenizer_

    def _create_completion(self, prompt: str | list[int], *args: Any, **kwargs: Any) -> Generator[Any, None, None]:
        """As the parent's, which never stops at control tokens, since they spell nothing, and puts BOS before a prompt
        that begins with it."""
        tokenizer, stop = self.tokenizer_, kwargs.get("stop") or []
        if not isinstance(tokenizer, Tokenizer):
            yield from super()._create_completion(prompt, *args, **kwargs)
            return
        spelled = tokenizer.spelled_in([*([stop] if isinstance(stop, str) else stop), *self.spelled])
        if isinstance(prompt, str):
            encode(prompt)  # where it fails, it fails with an error of ours
            prompt = prompt if kwargs.get("suffix") is not None else tokenizer.without_bos(prompt)
        chunks = cast("Generator[Any, None, None]", super()._create_completion(prompt, *args, **kwargs))
        with contextlib.closing(chunks):
            while True:
                with tokenizer.spelling(spelled):
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                yield chunk

    # ---- reading -------------------------------------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        """Tokens of the text. Less can be set, to go on from there."""
        return self._n_tokens

    @n_tokens.setter
    def n_tokens(self, n_tokens: int) -> None:
        n_tokens = whole_number("n_tokens", n_tokens, 0, self._n_held, ", the number of cached tokens")
        if n_tokens != self._n_tokens:
            self._n_tokens = n_tokens
            self._requires_eval = True
            self.note_change()

    @takes_turn
    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after the `n_tokens` cached ones.

        Raises ContextFullError when they do not fit, TextError for what are no tokens; nothing is evaluated then.
        """
        tokens = check_tokens(tokens, self._n_vocab)
        n_new = len(tokens)
        check_room(self.n_tokens + n_new, self._n_ctx)
        self._remove_the_rest()
        done = 0
        while done < n_new:
            step = min(n_new - done, self._longest_step(self.n_tokens))
            self._eval_step(tokens[done : done + step])
            done += step
            if self.progress is not None:
                self.progress(done, n_new)

    def _longest_step(self, n_cached: int) -> int:
        """How many tokens one decode can take after `n_cached`."""
        longest = max(1, min(self.n_batch, self._n_ctx - n_cached))
        if self.on_logits is None:
            return longest
        return min(longest, max(1, _MOST_LOGITS // (4 * self._n_vocab)))

    def _remove_the_rest(self) -> None:
        """Remove what the cache holds beyond `n_tokens`, which is where a rollback shows at last."""
        if self._ctx.memory is None:
            why = "was loaded with vocab_only=True" if self.model_params.vocab_only else "computes embeddings only"
            raise UnsupportedModelError(f"the model {why}: it cannot read a text")
        if not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):
            raise EngineError(
                f"with swa_full=False the sliding-window layers no longer hold what came before token {self.n_tokens}: "
                "call reset() and evaluate the text again"
            )
        self._n_held = self.n_tokens

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
        """Generate tokens after a prompt, as `llama_cpp.Llama.generate` does.

        Raises TextChangedError when another call has changed the text between two tokens.
        """
        yield from self.in_turns(self._generate(tokens, *args, **kwargs))

    def _generate(
        self, tokens: Sequence[int], *args: Any, reset: bool = True, **kwargs: Any
    ) -> Generator[int, Any, None]:
        tokens = check_tokens(tokens, self._n_vocab)
        if not tokens and (reset or self.n_tokens == 0):
            begins_with_bos = self._model.add_bos_token()
            raise ConfigError(
                "the prompt is empty" + ("" if begins_with_bos else ", and the model has no BOS token to begin with")
            )
        run = self._run = _Run(tokens)
        steps: Any = super().generate(tokens, *args, **{"reset": reset, **kwargs})
        sent: Any = None
        try:
            while True:
                token = steps.send(sent)
                run.answer.append(token)
                sent = yield token
        except StopIteration:
            return
        except ContextFullError:
            # llama_cpp counts the tokens of an answer, but not where it waits for the rest of a character.
            if self.n_tokens < self._n_ctx:
                raise
        finally:
            if self._run is run:
                self._sampler = None  # theirs would stay, and choose for others

    @property
    def answer_tokens(self) -> list[int]:
        """Tokens of the latest completion so far, with the one that ended it."""
        return self._run.answer

    def _eval_step(self, tokens: Sequence[int]) -> None:
        begin, end = self.n_tokens, self.n_tokens + len(tokens)
        self._requires_eval = True  # until it is done
        all_logits = self._logits_all or self.on_logits is not None
        n_logits = len(tokens) if all_logits else min(len(tokens), 1 + self._n_guessed())
        self._batch.set_batch(batch=tokens, n_past=begin, logits_all=False)
        ask_for_logits(self._batch, n_logits)
        try:
            self._ctx.decode(self._batch)
        except RuntimeError as error:
            self._ctx.kv_cache_seq_rm(-1, begin, -1)  # a failed decode may have kept some micro-batches
            if isinstance(error, SelfExtendError):
                raise
            if str(error) == "llama_decode returned 2":  # llama_cpp's own context, aborted by Ctrl-C
                raise_interrupt()
            raise EngineError(str(error)) from error
        self.note_change()
        self.input_ids[begin:end] = tokens
        if all_logits:
            logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(end - begin, self._n_vocab))
            if self._keeps_logits:
                self.scores[begin:end] = logits
                self._n_unscored = min(self._n_unscored, begin)
            if self.on_logits is not None:
                self.on_logits(begin, logits)
        self._n_held = self._n_tokens = end
        self._n_logits = n_logits
        self._requires_eval = False

    def _n_guessed(self) -> int:
        """Tokens at the end of what is to be evaluated that a draft model has guessed, and that need logits as well."""
        return self.draft_model.n_guessed if isinstance(self.draft_model, StepLimitedDraft) else 0

    def set_seed(self, seed: int) -> None:
        """Seed of the next completions."""
        super().set_seed(check_seed("seed", seed))

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        """Cache that completions look into and add to; None = none."""
        if not isinstance(cache, BaseLlamaCache | None):
            raise ConfigError(f"cache must be one of llama_cpp's caches, not {shown(cache)}")
        super().set_cache(cache)

    @takes_turn
    def sample(self, /, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        """Sample the next token, as `llama_cpp.Llama.sample` does.

        Raises ConfigError where there are no logits: before anything was evaluated, after a rollback, and at tokens
        whose logits were not asked for.
        """
        if self._requires_eval:
            raise ConfigError("there are no logits to sample from: evaluate a token first")
        if idx is not None:
            idx = whole_number("idx", idx, self.n_tokens - self._n_logits, self.n_tokens - 1)
        sampler = self._sampler
        try:
            return int(super().sample(*args, **{"idx": idx, **kwargs}))
        finally:
            self._sampler = sampler

    @takes_turn
    def reset(self) -> None:
        """Forget the text."""
        _ = self.ctx  # raises ClosedError, where it would be too late later
        super().reset()  # type: ignore[no-untyped-call]
        self._n_held = 0
        self.note_change()

    @takes_turn
    def embed(self, input: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """Embeddings of texts, as `llama_cpp.Llama.embed` does. What was evaluated is forgotten."""
        texts = [input] if isinstance(input, str) else input
        if not isinstance(texts, list | tuple) or not texts:
            raise ConfigError(f"input must be a text or a list of texts, not {shown(input)}")
        for one in texts:
            check_text("input", one)
        if not self.context_params.embeddings or self.model_params.vocab_only:
            raise ConfigError("the model was not loaded for embeddings: give embedding=True to Llama")
        if int(self.pooling_type()) == llama_cpp.LLAMA_POOLING_TYPE_RANK:
            raise UnsupportedModelError("the model ranks texts (pooling type 4): it has no embeddings")
        try:
            return super().embed(input, *args, **kwargs)
        except RuntimeError as error:
            raise EngineError(f"llama.cpp could not compute the embeddings: {error}") from error
        finally:
            self._clear()

    @takes_turn
    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Tokens of UTF-8 text, as `llama_cpp.Llama.tokenize` gives them."""
        if not isinstance(text, bytes):
            raise ConfigError(f"the text must be bytes, not {shown(text)}")
        return list(super().tokenize(text, add_bos, special))

    @takes_turn
    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """Text of tokens, as `llama_cpp.Llama.detokenize` gives it."""
        return bytes(super().detokenize(tokens, prev_tokens, special))

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        """Raises GrammarError for a schema that cannot be kept and for a grammar that would end the process, and
        ConfigError for numbers without a meaning."""
        sampling = inspect.signature(super()._init_sampler).bind(*args, **kwargs).arguments
        grammar, logits_processor = sampling.pop("grammar", None), sampling.pop("logits_processor", None)
        sampling = check_sampling(sampling)
        processors = None if logits_processor is None else Processors(logits_processor)
        if processors is not None:
            sampling["logits_processor"] = llama_cpp.LogitsProcessorList([processors])
        sampler: Sampler
        if grammar is None:
            sampler = self._chain(sampling)
        elif isinstance(grammar, SchemaGrammar):
            following = matcher(form(json.loads(grammar.schema)), self._spelling)
            sampler = SchemaSampler(self._chain(sampling), following, self._n_vocab)
        elif isinstance(grammar, LlamaGrammar):
            check_grammar(self._model.vocab, check_text("the grammar", grammar._grammar), grammar._root)
            sampler = GrammarSampler(self._chain(sampling | {"grammar": grammar}), self._n_vocab)
        else:
            raise GrammarError(f"grammar must be made by LlamaGrammar.from_string, not {shown(grammar)}")
        return sampler if processors is None else ProcessedSampler(sampler, processors)

    def _chain(self, sampling: dict[str, Any]) -> internals.LlamaSampler:
        chain: internals.LlamaSampler = super()._init_sampler(**sampling)
        temp = sampling.get("temp", 0.8)  # theirs
        self.more_samplers.add_to(chain, self._model, temp=temp, n_ctx=self.n_ctx(), seed=self._seed)
        return chain

    # ---- completions -----------------------------------------------------------------------------------------

    def create_completion(self, prompt: str | list[int], *args: Any, **kwargs: Any) -> Any:
        """Complete a prompt, as `llama_cpp.Llama.create_completion` does.

        Without a seed the answers of an object are the same in every process. `logprobs` are plain numbers; with
        `echo` those of the prompt's tokens come first, in a stream as the first chunk.

        Raises ContextFullError, GrammarError, and ConfigError for arguments that make no sense.
        """
        arguments = self._check_completion(prompt, *args, **kwargs)
        if arguments["stream"]:
            return self.in_turns(self._stream_completion(**arguments))
        return self._whole_completion(**arguments)

    def _check_completion(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All arguments of `create_completion`, by name."""
        try:
            bound = _COMPLETION.bind(self, *args, **kwargs)
        except TypeError as error:
            raise UnknownArgumentError(f"create_completion: {error}") from error
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        arguments = check_all(COMPLETION, given)
        if not isinstance(prompt := arguments["prompt"], str):
            arguments["prompt"] = check_tokens(prompt, self._n_vocab)
        if arguments["logprobs"] is not None and not self._keeps_logits:
            raise ConfigError("logprobs need the logits of all tokens: give logits_all=True to Llama")
        bias = arguments.pop("logit_bias")
        arguments["logits_processor"] = as_processors(arguments["logits_processor"], bias, self._n_vocab)
        return arguments

    @takes_turn
    def _whole_completion(self, /, *, echo: bool, logprobs: int | None, **arguments: Any) -> Any:
        self._prepare_echo(echo, logprobs)
        with _errors_of_ours():
            completion: Any = super().create_completion(**arguments)
        choice, run = completion["choices"][0], self._run
        prompt = self._prompt_text(arguments["prompt"])
        if logprobs is not None:
            choice["logprobs"] = self._scored([*run.prompt, *self._without_end(run.answer)]).logprobs(
                self._first_of_text(run.prompt) if echo else len(run.prompt),
                n_top=logprobs,
                text_offset=0 if echo else len(prompt),
                first_is_known=not echo,
            )
        if echo:
            choice["text"] = prompt + choice["text"]
        return completion

    def _stream_completion(
        self, *, echo: bool, logprobs: int | None, **arguments: Any
    ) -> Generator[dict[str, Any], None, None]:
        self._prepare_echo(echo, logprobs)
        has_echoed = not echo
        with _errors_of_ours():
            chunks: Any = super().create_completion(**arguments, logprobs=logprobs)
            for chunk in chunks:
                if not has_echoed:  # not before the prompt has been read
                    has_echoed = True
                    yield self._echo(chunk, arguments["prompt"], logprobs)
                yield chunk

    def _echo(self, chunk: dict[str, Any], prompt: str | list[int], logprobs: int | None) -> dict[str, Any]:
        """The prompt as a chunk of the stream that `chunk` comes from."""
        choice = {**chunk["choices"][0], "text": self._prompt_text(prompt), "logprobs": None, "finish_reason": None}
        if logprobs is not None:
            tokens = self._run.prompt
            choice["logprobs"] = self._scored(tokens).logprobs(
                self._first_of_text(tokens), n_top=logprobs, text_offset=0, first_is_known=False
            )
        return {**chunk, "choices": [choice]}

    def _prepare_echo(self, echo: bool, logprobs: int | None) -> None:
        """Have all of the prompt read again if it was restored without its logits, and they are asked for."""
        if echo and logprobs is not None and self._n_unscored > 0:
            self.reset()

    def _prompt_text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return self.detokenize(prompt[self._first_of_text(prompt) :]).decode("utf-8", "ignore")

    def _first_of_text(self, tokens: list[int]) -> int:
        """Where a text begins in its tokens: after BOS."""
        return int(tokens[:1] == [self.token_bos()])

    def _without_end(self, answer: list[int]) -> list[int]:
        """An answer without the token that ended it."""
        ended = answer and llama_cpp.llama_vocab_is_eog(self._model.vocab, answer[-1])
        return answer[:-1] if ended else answer

    def _scored(self, tokens: list[int]) -> Scored:
        return Scored(tokens, self.scores, self.detokenize)

    @functools.cached_property
    def _spelling(self) -> LLTokenizer:
        """What the tokens spell, for texts that fit a JSON schema."""
        tokenizer, tokens = self.tokenizer_, range(self._n_vocab)
        ends = [token for token in tokens if llama_cpp.llama_vocab_is_eog(self._model.vocab, token)]
        # Strings that end an answer may spell control tokens, which are no part of it all the same.
        with tokenizer.spelling(frozenset()) if isinstance(tokenizer, Tokenizer) else contextlib.nullcontext():
            return vocabulary([self.detokenize([token]) for token in tokens], ends)

    def _clear(self) -> None:
        self._ctx.kv_cache_clear()
        self.n_tokens = self._n_held = 0
        self._requires_eval = True
        self.note_change()
