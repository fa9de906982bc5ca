"""The bundled models and the text the demo reads."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent

#: A 1.7 M parameter byte-level model with a trained context of 256 (see `selfextend_gguf.tiny.train`).
TINY_MODEL = _FOLDER / "tiny-256.Q8_0.gguf"
#: The same with a trained context of 512.
TINY_MODEL_512 = _FOLDER / "tiny-512.Q8_0.gguf"
TINY_MODELS = (TINY_MODEL, TINY_MODEL_512)
#: ASCII text the model was not trained on.
DEMO_TEXT = _FOLDER / "demo.txt"
