"""Write docs/models.md from what the engine does with a model of every family:

python tests/models_table.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from families import EXTENDED, FAMILIES, REFUSED, Family, write_family
from oracle import N_CTX, Verdict, examine

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

"""


def extended_row(family: Family, verdict: Verdict) -> str:
    assert verdict.errors is not None and max(verdict.errors.values()) < TOLERANCE, family.name
    names = {"state": "turned keys", "shift": "K-shift"}
    roads = ", ".join(names[road] for road in verdict.errors) if verdict.n_rewritten else "plain llama.cpp"
    return f"| {family.name} | {family.note} | {verdict.n_rewritten} of {len(family.kinds)} | {roads} |"


def document(verdict_of: Callable[[str], Verdict]) -> str:
    """The whole text; `verdict_of` examines the family of a name."""
    extended = [extended_row(family, verdict_of(family.name)) for family in EXTENDED]
    refused = [f"| {family.name} | {family.note} | {verdict_of(family.name).refused} |" for family in REFUSED]
    return HEAD + "\n".join(
        [
            f"## Extended: {len(extended)}",
            "",
            "| architecture | attention | rewritten layers | checked against |",
            "|---|---|---|---|",
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


def examine_by_name(name: str) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_family(FAMILIES[name], path)
        return examine(FAMILIES[name], path)


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(examine_by_name), encoding="utf-8")
