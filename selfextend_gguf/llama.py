"""`Llama`: llama-cpp-python's `Llama` for texts longer than the model's trained context."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, cast

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp._internals import LlamaContext, LlamaSampler
from llama_cpp.llama import LlamaState
from llama_cpp.llama_chat_format import LlamaChatCompletionHandlerNotFoundException, get_chat_completion_handler
from llama_cpp.llama_grammar import LlamaGrammar
from llama_cpp.llama_tokenizer import LlamaTokenizer
from llguidance import LLTokenizer

from selfextend_gguf._native import (
    EVAL_CALLBACK,
    Engine,
    RewriteStats,
    last_error,
    note_log_errors,
    raise_interrupt,
    schedule_step,
)
from selfextend_gguf.chat_schemas import SchemaGrammar, json_format, wanted_schemas
from selfextend_gguf.context import SelfExtendContext
from selfextend_gguf.drafting import StepLimitedDraft
from selfextend_gguf.errors import (
    ConfigError,
    ContextFullError,
    EngineError,
    PromptCacheError,
    SelfExtendError,
    StateError,
    UnknownArgumentError,
    UnsupportedModelError,
)
from selfextend_gguf.grammar import GrammarSampler, SchemaSampler, check_grammar
from selfextend_gguf.json_schema.forms import form, matcher, vocabulary
from selfextend_gguf.kv_cache import flash_attention_type, warn_of_rounding
from selfextend_gguf.memory import can_foresee, check_memory, demand_of
from selfextend_gguf.model_info import ModelInfo, model_file_error, set_log_level
from selfextend_gguf.planning import PARAMETERS, check_room, plan_if_beyond, whole_cells
from selfextend_gguf.prompt_cache import (
    CopiedPrompt,
    SavedPrompt,
    cache_settings,
    copy_sequence,
    load_prompt_into,
    restore_sequence,
    write_prompt,
)
from selfextend_gguf.schedule import SelfExtendConfig
from selfextend_gguf.tokenizer import Tokenizer, encode, text_handler

_PARENT_ARGUMENTS = frozenset(inspect.signature(llama_cpp.Llama.__init__).parameters) - {"self", "kwargs"}


class Llama(llama_cpp.Llama):
    """Drop-in for `llama_cpp.Llama` that reads texts longer than the trained context with Self-Extend.

    With `n_ctx` within the trained context it is plain llama.cpp. Beyond, cached keys are given grouped key
    positions as the text grows (arXiv 2401.01325); `self_extend` holds the resolved parameters. Not thread-safe,
    like its parent.

    >>> from selfextend_gguf import Llama
    >>> from selfextend_gguf.models import DEMO_TEXT, TINY_MODEL
    >>> llm = Llama(str(TINY_MODEL), n_ctx=1024, verbose=False)  # trained on 256 tokens, which are bytes
    >>> llm.self_extend.group_size, llm.self_extend.neighbor_window, llm.self_extend.max_distance
    (17, 48, 192)
    >>> text = "The stone key is 57901.\\n" + DEMO_TEXT.read_text()[:800]
    >>> question = "\\nWhat is the stone key? The stone key is "
    >>> llm(text + question, max_tokens=5, temperature=0)["choices"][0]["text"]
    '57901'
    >>> llm.n_tokens, int(llm.key_positions[-1] - llm.key_positions[0])  # tokens, and the largest distance among them
    (869, 164)
    >>> llm.rewrite_stats.n_rewrites  # how often keys were moved
    10
    >>> llm.close()
    """

    def __init__(
        self,
        model_path: str,
        *,
        n_ctx: int = 512,
        n_batch: int = 512,
        flash_attn: bool | None = None,
        group_size: int | None = None,
        neighbor_window: int | None = None,
        max_distance: int | None = None,
        block_size: int | None = None,
        schedule: str | None = None,
        model_info: ModelInfo | None = None,
        **kwargs: Any,
    ) -> None:
        """Load a model.

        Args:
            model_path: Path of a GGUF file.
            n_ctx: Text context in tokens; beyond the trained context the text is extended. 0 = trained context.
            n_batch: Most tokens decoded at once.
            flash_attn: Flash attention; None = automatic: llama.cpp decides, but not for f32 caches, which it would
                round to f16, nor on the CPU for models with a trained context below 1024, whose small steps it slows.
            group_size: Tokens outside the neighbor window that share one key position.
            neighbor_window: Latest tokens that always keep their exact distance.
            max_distance: No query sees a distance of that many tokens or more; at most the trained context.
            block_size: Steps, in tokens, in which the boundary of the grouped keys moves.
            schedule: One of `schedule.SCHEDULES`: "selfextend", "paper", "adagrope", "rerope", "leaky-rerope".
            model_info: The same file, if it is open already: it is not opened once more.
            kwargs: All other arguments of `llama_cpp.Llama`.

        The five parameters of Self-Extend are chosen by `plan` where None.

        Raises:
            UnknownArgumentError: an unknown argument.
            ConfigError: numbers out of range, or that cannot reach `n_ctx`.
            ModelFileError: a missing or damaged file.
            UnsupportedModelError: `n_ctx` is beyond the trained context of a model that cannot be extended.
            NotEnoughMemoryError: the model and the context do not fit the memory; nothing was loaded.
        """
        self._stack = contextlib.ExitStack()  # the parent's destructor closes it, however early we fail
        unknown = sorted(set(kwargs) - _PARENT_ARGUMENTS)
        if unknown:
            raise UnknownArgumentError(f"unknown argument{'s' * (len(unknown) > 1)}: {', '.join(unknown)}")
        for name, value in (("n_ctx", n_ctx), ("n_batch", n_batch)):
            if value < (name == "n_batch"):
                raise ConfigError(f"{name} must be positive, not {value}")
        self._wanted_n_ctx = n_ctx
        self._flash_attn = flash_attn
        numbers = (group_size, neighbor_window, max_distance, block_size, schedule)
        self._plan_arguments: dict[str, Any] = dict(zip(PARAMETERS, numbers, strict=True))
        self._engine: Engine | None = None
        #: Called after every decode with (tokens done, tokens asked for) of the running `eval`.
        self.progress: Callable[[int, int], None] | None = None
        with contextlib.ExitStack() as opened:
            info = model_info or opened.enter_context(ModelInfo(model_path, kv_overrides=kwargs.get("kv_overrides")))
            #: Resolved parameters; None while `n_ctx` is within the trained context.
            self.self_extend: SelfExtendConfig | None = plan_if_beyond(info.n_ctx_train, n_ctx, **self._plan_arguments)
            if can_foresee(info, kwargs):
                check_memory(demand_of(info, n_ctx, n_batch, flash_attn=flash_attn, **kwargs))
        self._load(model_path, n_ctx, n_batch, kwargs)
        self._take_texts_as_texts()
        if self._engine is not None and self.self_extend is not None:
            self._extend(self._engine, self.self_extend)

    def _load(self, model_path: str, n_ctx: int, n_batch: int, arguments: dict[str, Any]) -> None:
        """Load weights and make a context."""
        note_log_errors(True)
        try:
            super().__init__(
                model_path,
                n_ctx=whole_cells(n_ctx),  # llama_cpp.Llama would size its token array without rounding
                n_batch=min(n_ctx, n_batch) if n_ctx else n_batch,
                flash_attn=bool(self._flash_attn),
                **arguments,
            )
        except SelfExtendError:
            raise
        except ValueError as error:
            if not hasattr(self, "spm_infill"):  # set when all arguments have been taken, before the model is loaded
                raise ConfigError(str(error)) from error
            if not hasattr(self, "_model"):
                raise model_file_error(model_path, last_error()) from error
            if not hasattr(self, "_ctx"):
                raise EngineError(
                    f"llama.cpp could not create a context of {n_ctx} tokens for {model_path}: {last_error()}"
                ) from error
            raise
        finally:
            note_log_errors(False)

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
        set_log_level(self.verbose)
        note_log_errors(False)
        note_log_errors(True)  # forget what loading said: from here on it is about the context
        params = self.context_params
        n_ctx_train = model.n_ctx_train()
        if self.model_params.vocab_only:
            self.self_extend = None
            return
        config = self.self_extend
        params.flash_attn_type = flash_attention_type(
            model.metadata(),
            params.type_k,
            params.type_v,
            self.n_batch if config is None else config.block_size,
            wanted=self._flash_attn,
            on_cpu=self.model_params.n_gpu_layers == 0,
        )
        if config is None:
            return
        if params.embeddings:
            raise UnsupportedModelError(
                f"embeddings are computed within the trained context: n_ctx must be at most {n_ctx_train}, "
                f"not {self._wanted_n_ctx}"
            )
        self._engine = Engine(config.n_ctx)
        self._stack.callback(self._engine.close)  # after the context: the stack unwinds backwards
        params.cb_eval = EVAL_CALLBACK
        params.cb_eval_user_data = self._engine.user_data

    def _extend(self, engine: Engine, config: SelfExtendConfig) -> None:
        """Attach the engine to the new context, and let it stand between the parent and the context."""
        try:
            engine.attach(self._ctx.ctx)
        except SelfExtendError:
            self.close()
            raise
        warn_of_rounding(config, self.context_params.type_k, n_layers=engine.n_layers, has_frame=engine.has_frame)
        self._ctx = cast(LlamaContext, SelfExtendContext(self._ctx, engine, config))
        if self.draft_model is not None:
            n_batch = self.n_batch
            self.draft_model = StepLimitedDraft(self.draft_model, lambda n: schedule_step(config, n, n_batch))

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
            with contextlib.suppress(LlamaChatCompletionHandlerNotFoundException):
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
        spelled = tokenizer.spelled_in([stop] if isinstance(stop, str) else stop)
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

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after the `n_tokens` cached ones.

        Raises ContextFullError when they do not fit; nothing is evaluated then.
        """
        n_new = len(tokens)
        check_room(self.n_tokens + n_new, self._n_ctx)
        self._remove_the_rest()
        done = 0
        while done < n_new:
            step = min(self.n_batch, n_new - done)
            if self.self_extend is not None:
                step = schedule_step(self.self_extend, self.n_tokens, step)
            self._eval_step(tokens[done : done + step])
            done += step
            if self.progress is not None:
                self.progress(done, n_new)

    def _remove_the_rest(self) -> None:
        """Remove what the cache holds beyond `n_tokens`, which is where a rollback shows at last."""
        if not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):
            raise EngineError(
                f"with swa_full=False the sliding-window layers no longer hold what came before token {self.n_tokens}: "
                "call reset() and evaluate the text again"
            )

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """Generate tokens after a prompt, as `llama_cpp.Llama.generate` does."""
        try:
            yield from super().generate(tokens, *args, **kwargs)
        except ContextFullError:
            # llama_cpp counts the tokens of an answer, but not where it waits for the rest of a character.
            if self.n_tokens < self._n_ctx:
                raise

    def _eval_step(self, tokens: Sequence[int]) -> None:
        begin, end = self.n_tokens, self.n_tokens + len(tokens)
        self._batch.set_batch(batch=tokens, n_past=begin, logits_all=self._logits_all)
        try:
            self._ctx.decode(self._batch)
        except RuntimeError as error:
            self._ctx.kv_cache_seq_rm(-1, begin, -1)  # a failed decode may have kept some micro-batches
            if str(error) == "llama_decode returned 2":  # llama_cpp's own context, aborted by Ctrl-C
                raise_interrupt()
            raise
        self.input_ids[begin:end] = tokens
        # With a draft model all logits are computed for sampling, but only `logits_all` has room to keep them.
        if self._logits_all and end <= len(self.scores):
            shape = (end - begin, self._n_vocab)
            self.scores[begin:end] = np.ctypeslib.as_array(self._ctx.get_logits(), shape=shape)
        self.n_tokens = end
        self._requires_eval = False

    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        """As `llama_cpp.Llama.create_chat_completion`; an answer that has to fit a JSON schema does.

        `response_format` may have type "json_schema", as in OpenAI's API. Raises GrammarError for schemas that cannot
        be kept.
        """
        if "response_format" in kwargs:
            kwargs["response_format"] = json_format(kwargs["response_format"])
        asked = ("response_format", "tools", "tool_choice", "functions", "function_call")
        for schema in wanted_schemas(**{name: kwargs.get(name) for name in asked}):
            form(schema)  # before anything is read
        return super().create_chat_completion(*args, **kwargs)

    def _init_sampler(self, *args: Any, **kwargs: Any) -> LlamaSampler | GrammarSampler | SchemaSampler:
        """Raises GrammarError for a schema that cannot be kept, and for a grammar that would end the process."""
        grammar: LlamaGrammar | None = kwargs.pop("grammar", None)
        if isinstance(grammar, SchemaGrammar):
            following = matcher(form(json.loads(grammar.schema)), self._spelling)
            return SchemaSampler(super()._init_sampler(*args, **kwargs), following, self._n_vocab)
        if grammar is not None:
            check_grammar(self._model.vocab, grammar._grammar, grammar._root)
            kwargs["grammar"] = grammar
        sampler: LlamaSampler = super()._init_sampler(*args, **kwargs)
        return sampler if grammar is None else GrammarSampler(sampler, self._n_vocab)

    @functools.cached_property
    def _spelling(self) -> LLTokenizer:
        """What the tokens spell, for texts that fit a JSON schema."""
        tokenizer, tokens = self.tokenizer_, range(self._n_vocab)
        ends = [token for token in tokens if llama_cpp.llama_vocab_is_eog(self._model.vocab, token)]
        # Strings that end an answer may spell control tokens, which are no part of it all the same.
        with tokenizer.spelling(frozenset()) if isinstance(tokenizer, Tokenizer) else contextlib.nullcontext():
            return vocabulary([self.detokenize([token]) for token in tokens], ends)

    # ---- Self-Extend's own -----------------------------------------------------------------------------------

    @property
    def key_positions(self) -> npt.NDArray[np.int32]:
        """Key positions P(0..n_tokens-1): int32, shape (n_tokens,)."""
        if self._engine is None:
            return np.arange(self.n_tokens, dtype=np.int32)
        return self._engine.key_positions[: self.n_tokens]

    @property
    def rewrite_stats(self) -> RewriteStats:
        """Steps, rows and seconds spent on rewriting keys since loading."""
        return RewriteStats(0, 0, 0.0) if self._engine is None else self._engine.stats

    # ---- state -----------------------------------------------------------------------------------------------

    def save_state(self) -> LlamaState:
        """The text, its cache and its key positions, for `load_state` of a model with the same cache types."""
        state = super().save_state()
        vars(state)["key_positions"] = self.key_positions.copy()  # the class declares no such attribute
        return state

    def load_state(self, state: LlamaState) -> None:
        """Restore a state saved by this class or, for text within the trained context, by llama_cpp.Llama.

        Raises StateError for a state that does not fit; the cache is empty then.
        """
        positions: npt.NDArray[np.int32] | None = getattr(state, "key_positions", None)
        try:
            if positions is None:
                positions = np.arange(state.n_tokens, dtype=np.int32)
            self._check_state(state, positions)
            super().load_state(state)
            if isinstance(self._ctx, SelfExtendContext):
                self._ctx.adopt_key_positions(positions)
        except (StateError, RuntimeError, ValueError) as error:
            self._clear()
            raise StateError(f"the saved state cannot be restored: {error}") from error

    def _check_state(self, state: LlamaState, positions: npt.NDArray[np.int32]) -> None:
        if not 0 <= state.n_tokens <= self._n_ctx:
            raise StateError(f"it holds {state.n_tokens} tokens, the context {self._n_ctx}")
        if len(state.llama_state) != state.llama_state_size:
            raise StateError(f"{len(state.llama_state)} bytes instead of {state.llama_state_size}")
        if len(positions) != state.n_tokens:
            raise StateError(f"{len(positions)} key positions for {state.n_tokens} tokens")
        if self._engine is None and not np.array_equal(positions, np.arange(state.n_tokens)):
            raise StateError("it holds grouped keys, and this context is within the trained one")

    # ---- prompt cache ----------------------------------------------------------------------------------------

    def save_prompt(self, path: str | os.PathLike[str]) -> None:
        """Write the evaluated text to a file: its tokens, key positions and the used part of the KV cache.

        The file appears whole or not at all; an older one at `path` stays if anything goes wrong. Raises OSError and
        PromptCacheError.

        >>> from selfextend_gguf import Llama
        >>> from selfextend_gguf.models import DEMO_TEXT, TINY_MODEL
        >>> llm = Llama(str(TINY_MODEL), n_ctx=1024, verbose=False)
        >>> llm.eval(llm.tokenize(DEMO_TEXT.read_bytes()[:600]))
        >>> llm.save_prompt("demo.kv")
        >>> llm.reset()
        >>> llm.load_prompt("demo.kv")  # tokens that need not be read again
        600
        >>> llm.close()
        """
        self._remove_the_rest()
        write_prompt(Path(path), self.ctx, self.saved_prompt())

    def saved_prompt(self) -> SavedPrompt:
        """What `save_prompt` would write, without the cache contents."""
        tokens = np.array(self.input_ids[: self.n_tokens], np.int32)
        return SavedPrompt(tokens, self.key_positions, self._wanted_n_ctx or self._n_ctx, self._cache_settings())

    def load_prompt(self, path: str | os.PathLike[str]) -> int:
        """Restore a text that `save_prompt` wrote, in place of what is cached; returns its number of tokens.

        The schedule may be another than when it was saved: keys are rewritten to the new one before the next decode.
        Then a prompt is read from the first token on that differs from the restored ones.

        Raises OSError (a missing file, ...), PromptCacheError if the file is damaged or does not fit the context, and
        its subclass ForeignPromptCacheError if another model, version or kind of cache made it. The cache is empty
        then.

        >>> from selfextend_gguf import Llama
        >>> from selfextend_gguf.models import DEMO_TEXT, TINY_MODEL
        >>> llm = Llama(str(TINY_MODEL), n_ctx=1024, verbose=False)
        >>> llm.eval(llm.tokenize(DEMO_TEXT.read_bytes()[:600]))
        >>> llm.save_prompt("demo.kv")
        >>> other = Llama(str(TINY_MODEL), n_ctx=2048, schedule="paper", verbose=False)
        >>> other.load_prompt("demo.kv")
        600
        >>> other.eval(other.tokenize(b" And so on.", add_bos=False))  # keys move to the other schedule's positions
        >>> other.n_tokens
        611
        >>> llm.close()
        >>> other.close()
        """
        return self._restore(
            f"the prompt cache {path}",
            lambda: load_prompt_into(Path(path), self.ctx, self._n_ctx, self._cache_settings()),
        )

    def copy_prompt(self) -> CopiedPrompt:
        """The evaluated text with its cache contents, for `restore_prompt` of this object. Raises PromptCacheError."""
        self._remove_the_rest()
        return CopiedPrompt(self.saved_prompt(), copy_sequence(self.ctx))

    def restore_prompt(self, copy: CopiedPrompt) -> int:
        """Restore a text that `copy_prompt` copied; returns its number of tokens. Raises PromptCacheError."""

        def restore() -> SavedPrompt:
            restore_sequence(self.ctx, copy.content)
            return copy.saved

        return self._restore("the copy", restore)

    def _restore(self, name: str, restore: Callable[[], SavedPrompt]) -> int:
        """Empty the cache and let `restore` fill it; empty it again if that fails."""
        self._clear()
        try:
            saved = restore()
            if isinstance(self._ctx, SelfExtendContext):
                self._ctx.adopt_key_positions(saved.key_positions)
            elif saved.is_grouped:
                raise PromptCacheError(f"{name} holds grouped keys, which need a context beyond the trained one")
        except BaseException:
            self._clear()
            raise
        self.n_tokens = len(saved.tokens)
        self.input_ids[: self.n_tokens] = saved.tokens
        return self.n_tokens

    def _clear(self) -> None:
        self._ctx.kv_cache_clear()
        self.n_tokens = 0
        self._requires_eval = True

    def _cache_settings(self) -> dict[str, Any]:
        metadata = self.metadata
        original = metadata.get(f"{metadata.get('general.architecture')}.rope.scaling.original_context_length")
        others = {
            "lora": [str(self.lora_path), self.lora_scale] if self.lora_path else None,
            "kv_overrides": repr(self.kv_overrides) if self.kv_overrides else None,
            # LongRoPE has two sets of factors; llama.cpp chooses by the size of the context.
            "long_factors": original is not None and self._n_ctx > int(original),
        }
        return cache_settings(self.model_path, self.context_params, others)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if isinstance(self.draft_model, StepLimitedDraft):
            state["draft_model"] = self.draft_model.draft_model
        state.update(self._plan_arguments, flash_attn=self._flash_attn, n_ctx=self._wanted_n_ctx)
        return state
