"""`Llama`: llama-cpp-python's `Llama` for texts longer than the model's trained context."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp._internals import LlamaContext
from llama_cpp.llama import LlamaState

from selfextend_gguf._native import (
    EVAL_CALLBACK,
    Engine,
    RewriteStats,
    schedule_step,
)
from selfextend_gguf.adapters import adapters_of
from selfextend_gguf.arguments import check_arguments
from selfextend_gguf.checks import path as check_path
from selfextend_gguf.checks import shown, whole_number
from selfextend_gguf.context import SelfExtendContext
from selfextend_gguf.drafting import StepLimitedDraft
from selfextend_gguf.errors import (
    ConfigError,
    ForeignPromptCacheError,
    PromptCacheError,
    SelfExtendError,
    StateError,
    UnsupportedModelError,
)
from selfextend_gguf.handles import check_tokens
from selfextend_gguf.kv_cache import flash_attention_type, warn_of_rounding
from selfextend_gguf.memory import can_foresee, check_allocation, check_memory, demand_of
from selfextend_gguf.model_info import ModelInfo, check_is_gguf
from selfextend_gguf.planning import PARAMETERS, check_parameters, plan_if_beyond
from selfextend_gguf.prompt_cache import (
    CopiedPrompt,
    SavedPrompt,
    cache_settings,
    copy_sequence,
    load_prompt_into,
    restore_sequence,
    write_prompt,
)
from selfextend_gguf.safe_llama import SafeLlama
from selfextend_gguf.schedule import SelfExtendConfig
from selfextend_gguf.stores import model_path as find_model
from selfextend_gguf.templates import (
    check_chat_format,
)
from selfextend_gguf.turns import takes_turn

_uint8_p = ctypes.POINTER(ctypes.c_uint8)


class Llama(SafeLlama):
    """Drop-in for `llama_cpp.Llama` that reads texts longer than the trained context with Self-Extend.

    With `n_ctx` within the trained context it is plain llama.cpp. Beyond, cached keys are given grouped key
    positions as the text grows (arXiv 2401.01325); `self_extend` holds the resolved parameters.

    An object holds one text. Threads that share it wait for each other, so that a whole completion in one thread is
    none of the others' business; a generator or a stream holds the others up only while it makes its next token, and
    raises TextChangedError if another call has changed the text meanwhile. After `close` everything that needs the
    model raises ClosedError.

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
        model_path: str | os.PathLike[str],
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
            devices: Names of the devices for the `n_gpu_layers`, as in `devices.devices()`; None = all.
            op_offload: Let devices compute large batches of layers that are on the CPU; None = as llama.cpp does, but
                not where the text is extended and no layer is on a device.
            adapters: Scales of LoRA adapters by their paths, beside `lora_path` with its `lora_scale`.
            kwargs: All other arguments of `llama_cpp.Llama`. Its `seed` is the same in every process unless another
                is given, and so are the answers: give one for answers that differ, here or to each completion.

        The five parameters of Self-Extend are chosen by `plan` where None.

        Raises:
            UnknownArgumentError: an unknown argument.
            ConfigError: numbers out of range, or that cannot reach `n_ctx`.
            ModelFileError: a missing or damaged file.
            UnsupportedModelError: `n_ctx` is beyond the trained context of a model that cannot be extended.
            NotEnoughMemoryError: the model and the context do not fit the memory; nothing was loaded.
        """
        given = {"model_path": model_path, "n_ctx": n_ctx, "n_batch": n_batch, "flash_attn": flash_attn}
        arguments = check_arguments(given | kwargs)
        n_ctx = self._wanted_n_ctx = arguments["n_ctx"]
        self._flash_attn: bool | None = arguments["flash_attn"]
        numbers = (group_size, neighbor_window, max_distance, block_size, schedule)
        self._plan_arguments = check_parameters(dict(zip(PARAMETERS, numbers, strict=True)))
        self._engine: Engine | None = None
        if not isinstance(model_info, ModelInfo | None):
            raise ConfigError(f"model_info must be a ModelInfo, not {shown(model_info)}")
        for adapter in adapters_of(**arguments):
            check_is_gguf(adapter)
        with contextlib.ExitStack() as opened:
            info = model_info or opened.enter_context(
                ModelInfo(arguments["model_path"], kv_overrides=arguments.get("kv_overrides"))
            )
            #: Resolved parameters; None while `n_ctx` is within the trained context.
            self.self_extend: SelfExtendConfig | None = plan_if_beyond(info.n_ctx_train, n_ctx, **self._plan_arguments)
            check_chat_format(arguments.get("chat_format"), info.metadata)
            if self.self_extend is not None and not arguments.get("n_gpu_layers"):
                # llama.cpp would have a device compute large batches even with no layer there. With CUDA that ended the
                # process (docs/devices.md), and who puts no layer on a device expects the CPU.
                arguments["op_offload"] = bool(arguments.get("op_offload"))
            if can_foresee(info, arguments):
                check_memory(demand_of(info, **arguments))
        super().__init__(**arguments)
        if self._engine is not None and self.self_extend is not None:
            self._extend(self._engine, self.self_extend)

    @classmethod
    def from_name(cls, model: str | os.PathLike[str], *, offline: bool = False, **arguments: Any) -> Llama:
        """The model of a path or of a name in a store, such as `hf:USER/REPO` (docs/models-by-name.md), downloaded
        from Hugging Face unless it is there or `offline`.

        `arguments` are the constructor's. Raises ModelFileError if there is no such model."""
        return cls(find_model(os.fspath(model), offline=offline), **arguments)

    def _prepare_context(self, model: Any) -> None:
        super()._prepare_context(model)
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
            on_cpu=self.placement == "CPU",
        )
        if config is None:
            return
        if params.embeddings:
            raise UnsupportedModelError(
                f"embeddings are computed within the trained context: n_ctx must be at most {n_ctx_train}, "
                f"not {self._wanted_n_ctx}"
            )
        if not self._is_causal(model.metadata()):
            raise UnsupportedModelError("attention in both directions has no older keys to group")
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

    def _longest_step(self, n_cached: int) -> int:
        longest = super()._longest_step(n_cached)
        return longest if self.self_extend is None else schedule_step(self.self_extend, n_cached, longest)

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

    @takes_turn
    def save_state(self) -> LlamaState:
        """The text, its cache and its key positions, for `load_state` of a model with the same cache types.

        Raises NotEnoughMemoryError.
        """
        rows = self._scores
        if not self._keeps_logits:
            rows = np.broadcast_to(
                np.single(0), rows.shape
            )  # nobody has written them; they would be large all the same
        n_bytes = llama_cpp.llama_state_get_size(self.ctx)
        check_allocation(2 * n_bytes + (rows.nbytes if self._keeps_logits else 0), "a state")
        content = np.empty(n_bytes, np.uint8)
        written = llama_cpp.llama_state_get_data(self.ctx, content.ctypes.data_as(_uint8_p), n_bytes)
        state = LlamaState(
            input_ids=self.input_ids.copy(),
            scores=rows.copy() if self._keeps_logits else rows,
            n_tokens=self.n_tokens,
            llama_state=content[:written].tobytes(),
            llama_state_size=written,
            seed=self._seed,
        )
        vars(state)["key_positions"] = self.key_positions.copy()  # the class declares no such attribute
        return state

    @takes_turn
    def load_state(self, state: LlamaState) -> None:
        """Restore a state saved by this class or, for text within the trained context, by llama_cpp.Llama.

        Raises StateError for a state that does not fit; the cache is empty then.
        """
        try:
            positions = self._check_state(state)
            content = np.frombuffer(state.llama_state, np.uint8)
            if llama_cpp.llama_state_set_data(self.ctx, content.ctypes.data_as(_uint8_p), len(content)) != len(content):
                raise StateError("llama.cpp does not take it")
            self._n_held = self.n_tokens = self._n_unscored = state.n_tokens
            self.input_ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
            if self._keeps_logits and state.scores.shape == self._scores.shape:
                self._scores[:] = state.scores
            self._seed = state.seed
            if isinstance(self._ctx, SelfExtendContext):
                self._ctx.adopt_key_positions(positions)
        except (SelfExtendError, ValueError) as error:
            self._clear()
            raise StateError(f"the saved state cannot be restored: {error}") from error
        self._requires_eval = True
        self.note_change()

    def _check_state(self, state: LlamaState) -> npt.NDArray[np.int32]:
        """The key positions of a state. Raises StateError, ConfigError."""
        if not isinstance(state, LlamaState):
            raise StateError(f"{shown(state)} is none")
        n_tokens = whole_number("the number of its tokens", state.n_tokens, 0, self._n_ctx)
        if len(state.llama_state) != state.llama_state_size:
            raise StateError(f"{len(state.llama_state)} bytes instead of {state.llama_state_size}")
        if len(check_tokens(state.input_ids[:n_tokens], self._n_vocab)) != n_tokens:
            raise StateError(f"it lacks some of its {n_tokens} tokens")
        positions: npt.NDArray[np.int32] | None = getattr(state, "key_positions", None)
        if positions is None:
            return np.arange(n_tokens, dtype=np.int32)
        if len(positions) != n_tokens:
            raise StateError(f"{len(positions)} key positions for {n_tokens} tokens")
        if self._engine is None and not np.array_equal(positions, np.arange(n_tokens)):
            raise StateError("it holds grouped keys, and this context is within the trained one")
        return positions

    # ---- prompt cache ----------------------------------------------------------------------------------------

    @takes_turn
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
        path = Path(check_path("path", path))
        self._remove_the_rest()
        write_prompt(path, self.ctx, self.saved_prompt())

    @takes_turn
    def saved_prompt(self) -> SavedPrompt:
        """What `save_prompt` would write, without the cache contents."""
        tokens = np.array(self.input_ids[: self.n_tokens], np.int32)
        return SavedPrompt(tokens, self.key_positions, self._wanted_n_ctx or self._n_ctx, self._cache_settings())

    @takes_turn
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
        path = Path(check_path("path", path))
        return self._restore(
            f"the prompt cache {path}",
            lambda: load_prompt_into(path, self.ctx, self._n_ctx, self._cache_settings()),
        )

    @takes_turn
    def copy_prompt(self) -> CopiedPrompt:
        """The evaluated text with its cache contents, for `restore_prompt` of this object.

        Raises PromptCacheError, NotEnoughMemoryError.
        """
        self._remove_the_rest()
        check_allocation(llama_cpp.llama_state_seq_get_size(self.ctx, 0), "a copy of the text")
        return CopiedPrompt(self.saved_prompt(), copy_sequence(self.ctx))

    @takes_turn
    def restore_prompt(self, copy: CopiedPrompt) -> int:
        """Restore a text that `copy_prompt` copied; returns its number of tokens. Raises PromptCacheError."""

        def restore() -> SavedPrompt:
            if not isinstance(copy, CopiedPrompt):
                raise PromptCacheError(f"{shown(copy)} is no copy of a prompt")
            if copy.saved.made_by != self._cache_settings():
                raise ForeignPromptCacheError("the copy was made by another model or with other settings")
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
        self._n_unscored = self._n_held = self.n_tokens = len(saved.tokens)
        self.input_ids[: self.n_tokens] = saved.tokens
        return self.n_tokens

    def _cache_settings(self) -> dict[str, Any]:
        metadata = self.metadata
        original = metadata.get(f"{metadata.get('general.architecture')}.rope.scaling.original_context_length")
        others = {
            "lora": sorted(map(list, adapters_of(self.lora_path, self.lora_scale, self.adapters).items())) or None,
            "kv_overrides": repr(self.kv_overrides) if self.kv_overrides else None,
            # LongRoPE has two sets of factors; llama.cpp chooses by the size of the context.
            "long_factors": original is not None and self._n_ctx > int(original),
        }
        return cache_settings(self.model_path, self.context_params, others)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if isinstance(self.draft_model, StepLimitedDraft):
            state["draft_model"] = self.draft_model.draft_model
        state.update(
            self._plan_arguments,
            adapters=self.adapters,
            devices=self.devices,
            flash_attn=self._flash_attn,
            n_ctx=self._wanted_n_ctx,
        )
        return state
