"""ctypes binding of native/selfextend.h. Nothing above this file sees a pointer."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from dataclasses import dataclass
from enum import IntEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# First, and not only for its types: whichever libllama is in the process when our library is loaded is the one
# it uses. Loaded the other way round there would be two copies.
import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp._logger import llama_log_callback

from selfextend_gguf.checks import shown, whole_number
from selfextend_gguf.errors import (
    ClosedError,
    ConfigError,
    EngineError,
    NativeLibraryError,
    NotEnoughMemoryError,
    SelfExtendError,
    TextError,
    UnsupportedModelError,
)
from selfextend_gguf.handles import Handle
from selfextend_gguf.schedule import LONGEST, SCHEDULES, SelfExtendConfig

_REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir ."
_int32_p = ctypes.POINTER(ctypes.c_int32)


class Status(IntEnum):
    """enum sx_status"""

    OK = 0
    ERR_ARGUMENT = -1
    ERR_SCHEDULE = -2
    ERR_MODEL = -3
    ERR_DECODE = -4
    ERR_CACHE = -5
    ERR_MEMORY = -6
    ERR_DEVICE = -7
    ERR_ABORTED = -8
    ERR_TEXT = -9


# What is raised for a status; a decode that Ctrl-C aborted is a KeyboardInterrupt.
_ERRORS: dict[Status, type[SelfExtendError]] = {
    Status.ERR_ARGUMENT: EngineError,
    Status.ERR_SCHEDULE: ConfigError,
    Status.ERR_MODEL: UnsupportedModelError,
    Status.ERR_DECODE: EngineError,
    Status.ERR_CACHE: EngineError,
    Status.ERR_MEMORY: NotEnoughMemoryError,
    Status.ERR_DEVICE: EngineError,
    Status.ERR_TEXT: TextError,
}


class _Params(ctypes.Structure):
    """struct sx_params"""

    _fields_ = [
        ("schedule", ctypes.c_int32),
        ("n_ctx_train", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("neighbor_window", ctypes.c_int32),
        ("max_distance", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("n_ctx", ctypes.c_int32),
        ("n_batch", ctypes.c_int32),
    ]


class _Stats(ctypes.Structure):
    """struct sx_stats"""

    _fields_ = [("n_rewrites", ctypes.c_int64), ("n_rows", ctypes.c_int64), ("t_us", ctypes.c_int64)]


@dataclass(frozen=True)
class RewriteStats:
    """What rewriting cost so far: steps that rotated keys, cache rows rotated in them, seconds spent."""

    n_rewrites: int
    n_rows: int
    seconds: float


def _library_path() -> Path:
    name = "libselfextend.dylib" if sys.platform == "darwin" else "libselfextend.so"
    package = find_spec("selfextend_gguf")
    # An editable install has two folders: the sources and the one pip compiled into.
    tried = [Path(folder) / name for folder in (package and package.submodule_search_locations) or ()]
    tried += [Path(folder) / "selfextend_gguf" / name for folder in sys.path if folder]
    for path in tried:
        if path.is_file():
            return path
    raise NativeLibraryError(
        f"the compiled library {name} is missing (looked in {', '.join(sorted({str(p.parent) for p in tried[:2]}))}); "
        f"from the source folder, type: {_REINSTALL}"
    )


def _load() -> ctypes.CDLL:
    path = _library_path()
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeLibraryError(
            f"cannot load {path}: {error}. It was probably built against another llama-cpp-python than the installed "
            f"{llama_cpp.__version__}; from the source folder of selfextend_gguf, type: {_REINSTALL}"
        ) from error
    lib.sx_built_against.argtypes = []
    lib.sx_built_against.restype = ctypes.c_char_p
    check_version(lib.sx_built_against().decode(), llama_cpp.__version__)
    return lib


def check_version(built_against: str, installed: str) -> None:
    """Refuse a llama-cpp-python other than the one compiled against: llama.cpp's structures change between versions."""
    if built_against != installed:
        raise NativeLibraryError(
            f"selfextend_gguf was compiled against llama-cpp-python {built_against}, but {installed} is installed; "
            f"type: pip install llama-cpp-python=={built_against} "
            f"(or, from the source folder, recompile with: {_REINSTALL} --no-build-isolation)"
        )


_LIB = _load()


def _declare(name: str, argtypes: list[Any], restype: Any) -> None:
    function = getattr(_LIB, name)
    function.argtypes = argtypes
    function.restype = restype


# const char * sx_last_error(void);
_declare("sx_last_error", [], ctypes.c_char_p)
# int32_t sx_schedule_stage(const struct sx_params *, int32_t n_cached, int32_t n_total, int32_t * stage);
_declare("sx_schedule_stage", [ctypes.POINTER(_Params), ctypes.c_int32, ctypes.c_int32, _int32_p], ctypes.c_int32)
# int32_t sx_schedule_positions(const struct sx_params *, int32_t n_cached, int32_t n_total, int32_t * positions);
_declare("sx_schedule_positions", [ctypes.POINTER(_Params), ctypes.c_int32, ctypes.c_int32, _int32_p], ctypes.c_int32)
# int32_t sx_schedule_step(const struct sx_params *, int32_t n_cached, int32_t n_new, int32_t * n_step);
_declare("sx_schedule_step", [ctypes.POINTER(_Params), ctypes.c_int32, ctypes.c_int32, _int32_p], ctypes.c_int32)
# int32_t sx_model_check(const struct llama_model *);
_declare("sx_model_check", [ctypes.c_void_p], ctypes.c_int32)
# sx_engine * sx_engine_init(int32_t n_ctx);
_declare("sx_engine_init", [ctypes.c_int32], ctypes.c_void_p)
# void sx_engine_free(sx_engine *);
_declare("sx_engine_free", [ctypes.c_void_p], None)
# int32_t sx_engine_attach(sx_engine *, struct llama_context *);
_declare("sx_engine_attach", [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int32)
# int32_t sx_engine_n_layers(const sx_engine *);
_declare("sx_engine_n_layers", [ctypes.c_void_p], ctypes.c_int32)
# bool sx_engine_has_frame(const sx_engine *);
_declare("sx_engine_has_frame", [ctypes.c_void_p], ctypes.c_bool)
# const char * sx_engine_device_name(const sx_engine *, int32_t i);
_declare("sx_engine_device_name", [ctypes.c_void_p, ctypes.c_int32], ctypes.c_char_p)
# int32_t sx_engine_n_tokens(const sx_engine *);
_declare("sx_engine_n_tokens", [ctypes.c_void_p], ctypes.c_int32)
# void sx_engine_get_key_positions(const sx_engine *, int32_t * positions);
_declare("sx_engine_get_key_positions", [ctypes.c_void_p, _int32_p], None)
# int32_t sx_engine_set_key_positions(sx_engine *, const int32_t * positions, int32_t n);
_declare("sx_engine_set_key_positions", [ctypes.c_void_p, _int32_p, ctypes.c_int32], ctypes.c_int32)
# int32_t sx_engine_adopt_key_positions(sx_engine *, const int32_t * positions, int32_t n);
_declare("sx_engine_adopt_key_positions", [ctypes.c_void_p, _int32_p, ctypes.c_int32], ctypes.c_int32)
# int32_t sx_engine_decode(sx_engine *, struct llama_batch batch);
_declare("sx_engine_decode", [ctypes.c_void_p, llama_cpp.llama_batch], ctypes.c_int32)
# void sx_engine_truncate(sx_engine *, int32_t n);
_declare("sx_engine_truncate", [ctypes.c_void_p, ctypes.c_int32], None)
# struct sx_stats sx_engine_stats(const sx_engine *);
_declare("sx_engine_stats", [ctypes.c_void_p], _Stats)
# int64_t sx_longest_match(const char * text, int64_t n_text);
_declare("sx_longest_match", [ctypes.c_char_p, ctypes.c_int64], ctypes.c_int64)
# int32_t sx_tokenize(const struct llama_vocab *, const char * text, int32_t n_text, bool add_special,
#                     bool parse_special, int64_t n_stack, int32_t * tokens, int32_t n_max, int32_t * n_tokens);
_declare(
    "sx_tokenize",
    [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_int32,
        ctypes.c_bool,
        ctypes.c_bool,
        ctypes.c_int64,
        _int32_p,
        ctypes.c_int32,
        _int32_p,
    ],
    ctypes.c_int32,
)
# int32_t sx_special_tokens(const struct llama_vocab *, int32_t * tokens, int32_t n_max);
_declare("sx_special_tokens", [ctypes.c_void_p, _int32_p, ctypes.c_int32], ctypes.c_int32)
# int32_t sx_interrupt_watch(struct llama_context *);
_declare("sx_interrupt_watch", [ctypes.c_void_p], ctypes.c_int32)
# void sx_aborts_throw(bool on);
_declare("sx_aborts_throw", [ctypes.c_bool], None)
# void sx_log_silence(void);
_declare("sx_log_silence", [], None)
# void sx_log_note_errors(bool on);
_declare("sx_log_note_errors", [ctypes.c_bool], None)

# bool sx_engine_eval_callback(struct ggml_tensor *, bool ask, void * engine);
EVAL_CALLBACK = ctypes.cast(_LIB.sx_engine_eval_callback, llama_cpp.ggml_backend_sched_eval_callback)


def raise_interrupt() -> None:
    """Raise the KeyboardInterrupt of a decode that Ctrl-C aborted."""
    time.sleep(0)  # gives Python the occasion to raise it itself, so that it does not do so again later
    raise KeyboardInterrupt


def _check(status: int) -> None:
    if status == Status.ERR_ABORTED:
        raise_interrupt()
    if status != Status.OK:
        raise _ERRORS[Status(status)](last_error())


def _pointer(array: npt.NDArray[np.int32]) -> Any:
    return array.ctypes.data_as(_int32_p)


def _params(config: SelfExtendConfig) -> _Params:
    return _Params(
        SCHEDULES.index(config.schedule),
        config.n_ctx_train,
        config.group_size,
        config.neighbor_window,
        config.max_distance,
        config.block_size,
        config.n_ctx,
        config.n_batch,
    )


def schedule_stage(config: SelfExtendConfig, n_cached: int, n_total: int) -> int:
    """Stage of a step that decodes tokens [n_cached, n_total): while it stays the same, no cached key moves.

    Raises as `schedule_positions` does.
    """
    stage = ctypes.c_int32()
    _check(_LIB.sx_schedule_stage(ctypes.byref(_params(config)), n_cached, n_total, ctypes.byref(stage)))
    return stage.value


def schedule_positions(config: SelfExtendConfig, n_cached: int, n_total: int) -> npt.NDArray[np.int32]:
    """Key positions P(0..n_cached-1) for decoding tokens [n_cached, n_total): int32, shape (n_cached,).

    Raises ConfigError when the step cannot keep the distances below `config.max_distance` and the neighbor window
    (decode at most `config.n_batch` tokens at once), or when the counts are not 0 <= n_cached <= n_total.
    """
    if not isinstance(config, SelfExtendConfig):
        raise ConfigError(f"config must be what `plan` returns, not {shown(config)}")
    n_cached, n_total = whole_number("n_cached", n_cached), whole_number("n_total", n_total)
    if not 0 <= n_cached <= n_total <= LONGEST:
        raise ConfigError(f"a step needs 0 <= n_cached <= n_total, not {shown(n_cached)} and {shown(n_total)}")
    positions = np.empty(n_cached, np.int32)
    _check(_LIB.sx_schedule_positions(ctypes.byref(_params(config)), n_cached, n_total, _pointer(positions)))
    return positions


def schedule_step(config: SelfExtendConfig, n_cached: int, n_new: int) -> int:
    """How many of `n_new` >= 1 tokens to decode in one step after `n_cached`: up to where keys move.

    Every token is then computed with the key positions its own index asks for, and logits do not depend on how a text
    is cut into evaluations.
    """
    step = ctypes.c_int32()
    _check(_LIB.sx_schedule_step(ctypes.byref(_params(config)), n_cached, n_new, ctypes.byref(step)))
    return step.value


def check_model(model: llama_cpp.llama_model_p) -> None:
    """Raise UnsupportedModelError where the header of the model's file rules out that it is extended."""
    _check(_LIB.sx_model_check(model))


def longest_match(text: bytes) -> int:
    """Most bytes of `text` that a pre-tokenizer may match at once, or more: its recursion is as deep."""
    return int(_LIB.sx_longest_match(text, len(text)))


def tokenize(vocab: ctypes.c_void_p, text: bytes, *, add_special: bool, parse_special: bool, n_stack: int) -> list[int]:
    """llama_tokenize of a text of less than 2 GiB, on a thread with `n_stack` bytes of stack (0: on this one).

    Raises TextError where llama.cpp throws or asserts, and NotEnoughMemoryError.
    """
    n_tokens, n_max = ctypes.c_int32(), len(text) + 16  # a token is a byte or more, nearly always
    while True:
        tokens = np.empty(n_max, np.int32)
        flags = (add_special, parse_special, n_stack)
        _check(_LIB.sx_tokenize(vocab, text, len(text), *flags, _pointer(tokens), n_max, ctypes.byref(n_tokens)))
        if n_tokens.value >= 0:
            return list(tokens[: n_tokens.value].tolist())
        n_max = -n_tokens.value


def special_tokens(vocab: ctypes.c_void_p) -> list[int]:
    """Ids of the control, unknown and user-defined tokens, in ascending order."""
    ids = np.empty(_LIB.sx_special_tokens(vocab, None, 0), np.int32)
    _LIB.sx_special_tokens(vocab, _pointer(ids), len(ids))
    return list(ids.tolist())


def watch_interrupts(context: llama_cpp.llama_context_p) -> None:
    """Let Ctrl-C abort a running decode of a llama_context; for command line programs, from the main thread."""
    _check(_LIB.sx_interrupt_watch(context))


def silence_log() -> None:
    """Drop llama.cpp's log, process-wide; for command line programs."""
    _LIB.sx_log_silence()


def restore_log() -> None:
    """Let llama_cpp handle llama.cpp's log again."""
    llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))


def note_log_errors(on: bool) -> None:
    """From on to off, the first error that llama.cpp logs is what `last_error` returns. What it asserts while this
    thread loads a model or makes a context is such an error too, which would end the process."""
    _LIB.sx_log_note_errors(on)
    _LIB.sx_aborts_throw(on)


def last_error() -> str:
    """Message of the last failure, "" if none."""
    message: bytes = _LIB.sx_last_error()
    return message.decode("utf-8", "replace")


class Engine:
    """Owner of one sx_engine: the key position of every cached token of one llama_context."""

    _handle = Handle()

    def __init__(self, n_ctx: int) -> None:
        handle = _LIB.sx_engine_init(whole_number("n_ctx", n_ctx, 1, LONGEST))
        if not handle:
            raise NotEnoughMemoryError(last_error())
        self._handle = handle

    def close(self) -> None:
        """Free the engine. Its context must have been freed before."""
        with contextlib.suppress(ClosedError):
            _LIB.sx_engine_free(self._handle)
        self._handle = None

    @property
    def user_data(self) -> ctypes.c_void_p:
        """For `llama_context_params.cb_eval_user_data`."""
        return ctypes.c_void_p(self._handle)

    def attach(self, context: llama_cpp.llama_context_p) -> None:
        """Learn the layers of a llama_context; raises UnsupportedModelError when it cannot be extended."""
        _check(_LIB.sx_engine_attach(self._handle, context))

    @property
    def n_layers(self) -> int:
        """Layers whose keys are rewritten."""
        n: int = _LIB.sx_engine_n_layers(self._handle)
        return n

    @property
    def has_frame(self) -> bool:
        """Whether a key is rewritten a few times only, and not whenever the boundary moves."""
        has_frame: bool = _LIB.sx_engine_has_frame(self._handle)
        return has_frame

    @property
    def devices(self) -> list[str]:
        """Names of the devices that hold rewritten keys."""
        names: list[str] = []
        while name := _LIB.sx_engine_device_name(self._handle, len(names)):
            names.append(name.decode())
        return names

    @property
    def n_tokens(self) -> int:
        """Cached tokens."""
        n: int = _LIB.sx_engine_n_tokens(self._handle)
        return n

    @property
    def key_positions(self) -> npt.NDArray[np.int32]:
        """P(0..n_tokens-1), int32."""
        positions = np.empty(self.n_tokens, np.int32)
        _LIB.sx_engine_get_key_positions(self._handle, _pointer(positions))
        return positions

    def set_key_positions(self, positions: npt.NDArray[np.int32]) -> None:
        """Rotate the cached keys to `positions`, int32 of shape (n_tokens,)."""
        positions = np.ascontiguousarray(positions, np.int32)
        _check(_LIB.sx_engine_set_key_positions(self._handle, _pointer(positions), len(positions)))

    def adopt_key_positions(self, positions: npt.NDArray[np.int32]) -> None:
        """Declare what a restored cache holds, without rotating."""
        positions = np.ascontiguousarray(positions, np.int32)
        _check(_LIB.sx_engine_adopt_key_positions(self._handle, _pointer(positions), len(positions)))

    def decode(self, batch: llama_cpp.llama_batch) -> None:
        """llama_decode of a batch that continues the cache; new keys get P(k) = k."""
        _check(_LIB.sx_engine_decode(self._handle, batch))

    def truncate(self, n: int) -> None:
        """Forget the tokens from n on."""
        _LIB.sx_engine_truncate(self._handle, n)

    @property
    def stats(self) -> RewriteStats:
        """Rewriting so far."""
        stats = _LIB.sx_engine_stats(self._handle)
        return RewriteStats(stats.n_rewrites, stats.n_rows, stats.t_us / 1e6)
