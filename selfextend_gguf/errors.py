"""Every error this package raises on purpose. Catch `SelfExtendError` for all of them."""

from __future__ import annotations


class SelfExtendError(Exception):
    """Base of all errors of this package; the message says what to change."""


class ConfigError(SelfExtendError, ValueError):
    """Parameters that are out of range, unknown, or that cannot reach the requested context."""


class TooLongError(SelfExtendError):
    """More tokens than are possible; `longest` = the largest context that would be, None where that is not known."""

    def __init__(self, message: str = "", longest: int | None = None) -> None:
        super().__init__(message)
        self.longest = longest


class OutOfReachError(TooLongError, ConfigError):
    """A context beyond what the parameters reach."""


class UnknownArgumentError(ConfigError, TypeError):
    """A keyword argument that neither this package nor llama_cpp.Llama knows."""


class TemplateError(ConfigError):
    """A chat template that is none, fails, or takes too much time or memory."""


class ModelFileError(SelfExtendError, ValueError):
    """A model file that is missing, not a GGUF file, damaged, or unknown to llama.cpp."""


class NotReachedError(ModelFileError):
    """A server that has models, or the library that speaks with it, is not there; the message says which and why."""


class UnsupportedModelError(SelfExtendError):
    """A model or context that Self-Extend cannot extend correctly; the message names the reason."""


class DocumentError(SelfExtendError, ValueError):
    """A file whose text cannot be read; the message says why."""


class TextError(SelfExtendError, ValueError):
    """A text that cannot be made tokens, or a token that the vocabulary does not have."""


class ContextFullError(TooLongError, ValueError):
    """More tokens than the context holds."""


class GrammarError(SelfExtendError, ValueError):
    """A grammar or JSON schema that llama.cpp cannot parse, or that allows no token to go on with."""


class NotEnoughMemoryError(TooLongError, MemoryError):
    """A model and a context that do not fit the memory; the message names options that would."""


class StateError(SelfExtendError, ValueError):
    """A saved state that is damaged or was made by another configuration."""


class PromptCacheError(StateError):
    """A prompt cache file that is damaged, does not fit the context, or cannot be written."""


class ForeignPromptCacheError(PromptCacheError):
    """A file that is no prompt cache, or a good one of another model, version or kind of cache: worth keeping."""


class ConversationError(SelfExtendError, ValueError):
    """A step that a conversation does not allow, or a file that holds none."""


class EngineError(SelfExtendError, RuntimeError):
    """The native library or llama.cpp failed while running; the message says what happened."""


class ClosedError(SelfExtendError, ValueError):
    """A model was used after it had been closed."""


class TextChangedError(SelfExtendError, RuntimeError):
    """A generator was asked for its next token after another call had changed the text of its model."""


class NativeLibraryError(SelfExtendError, ImportError):
    """The compiled library is missing or was built against another llama-cpp-python."""


class UnknownModelError(SelfExtendError, LookupError):
    """A server was asked for a model that it does not have."""


class QueueFullError(SelfExtendError):
    """A server has as many requests as it takes; later there may be room."""


class RequestStoppedError(SelfExtendError):
    """A server's work on a request that nobody waits for any more was stopped."""


class KeyPrecisionWarning(UserWarning):
    """Cached keys of few bits will be rewritten, and so rounded, more often than is good for them."""


class MemoryTightWarning(UserWarning):
    """A model that the system will have to read from disk again and again while it runs."""


class IgnoredArgumentWarning(UserWarning):
    """An argument that older versions of llama-cpp-python had is ignored."""


class NotReachedWarning(UserWarning):
    """A model is taken from a cache, since the server that may have a newer one was not reached."""
