"""Self-Extend (arXiv 2401.01325) for llama.cpp: read texts longer than a GGUF model's trained context."""

from selfextend_gguf._native import RewriteStats, schedule_positions
from selfextend_gguf.errors import SelfExtendError
from selfextend_gguf.llama import Llama
from selfextend_gguf.planning import plan
from selfextend_gguf.schedule import SelfExtendConfig

__version__ = "0.1.0"
__all__ = ["Llama", "RewriteStats", "SelfExtendConfig", "SelfExtendError", "plan", "schedule_positions"]
