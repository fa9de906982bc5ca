"""`sx-gguf models`: what folders and stores hold, from the headers of files."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from families import FAMILIES, write_header
from ollama_store import write_manifest, write_ollama

from selfextend_gguf.catalogue import HeldModel, held_models
from selfextend_gguf.cli import main
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.stores import model_path, ollama

SIZE = TINY_MODEL.stat().st_size
# Only the weights, or the compute graph, show it; or the family's file does not say what real ones do (bert).
NOT_IN_THE_HEADER = {"hunyuan-dense", "granite (NoPE)", "baichuan (13B)", "bert", "glm4 (V)"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, with a folder to be in."""
    for name in ("OLLAMA_MODELS", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ollama, "SYSTEM_STORE", tmp_path / "system")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def models() -> str:
    result = CliRunner().invoke(main, ["models"], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stderr == ""
    return result.stdout


def put(home: Path, name: str, content: bytes | None = None) -> Path:
    """A file below `home`: the bundled model, unless there is `content`."""
    path = home / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.symlink_to(TINY_MODEL)
    else:
        path.write_bytes(content)
    return path


def test_all_stores(home: Path) -> None:
    put(home, "here/a.gguf")
    put(home, "here/mmproj-a.gguf")
    put(home, "here/below/b.gguf")
    snapshots = ".cache/huggingface/hub/models--ann--tiny/snapshots"
    put(home, f"{snapshots}/new/tiny-Q8_0.gguf")
    put(home, f"{snapshots}/old/tiny-Q8_0.gguf")
    put(home, f"{snapshots}/old/tiny-Q4_K_M.gguf")
    put(home, f"{snapshots}/old/tiny.gguf")
    put(home, f"{snapshots}/../refs/main", b"new")
    for store in (home / "system", home / ".ollama" / "models"):
        write_ollama(store, "registry.ollama.ai/library/tiny/latest")
    put(home, ".lmstudio/models/ann/tiny-GGUF/a b.gguf")
    put(home, ".lmstudio/models/ann/tiny-GGUF/c.gguf")
    names = [
        "a.gguf",
        "hf:ann/tiny:Q8_0",
        "hf:ann/tiny:Q4_K_M",
        "hf:ann/tiny/tiny.gguf",
        "ollama:tiny:latest",
        "lmstudio:ann/tiny-GGUF/a b.gguf",
        "lmstudio:ann/tiny-GGUF/c.gguf",
    ]
    header, *rows = models().splitlines()
    assert header.split("  ")[0] == "MODEL"
    assert [row[: header.index("SIZE")].rstrip() for row in rows] == names
    assert {row[header.index("SIZE") :] for row in rows} == {"1.7 MiB  Q8_0          llama         256      yes"}
    for name in names:
        assert model_path(name, offline=True).is_file()


def test_json(home: Path) -> None:
    put(home, "here/a.gguf")
    put(home, "here/b.gguf", b"")
    result = CliRunner().invoke(main, ["models", "--json"])
    good: dict[str, Any] = {"path": "a.gguf", "n_bytes": SIZE, "quantisation": "Q8_0", "architecture": "llama"}
    good |= {"n_ctx_train": 256, "extendable": True, "reason": None, "error": None}
    bad = dict.fromkeys(good) | {"path": "b.gguf", "error": "b.gguf is empty"}
    assert json.loads(result.stdout) == [{"name": "a.gguf"} | good, {"name": "b.gguf"} | bad]


def test_none(home: Path) -> None:
    result = CliRunner().invoke(main, ["models"])
    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr == "There is none in this folder, in Hugging Face's cache, in Ollama's store or LM Studio's.\n"


def test_what_is_damaged_has_a_row(home: Path) -> None:
    content = TINY_MODEL.read_bytes()
    put(home, "here/a-00002-of-00003.gguf")
    put(home, "here/b.gguf", content[: SIZE // 2])
    (home / "here" / "c.gguf").mkdir()
    (home / "here" / "d.gguf").symlink_to("nowhere")
    put(home, "here/e.gguf", content.replace(b"general.architecture", b"general.architecturx"))
    put(home, "here/f.gguf", b"GGUF\3\0\0\0" + b"\xff" * 100)
    put(home, "here/z.gguf")
    write_manifest(home / ".ollama" / "models", "registry.ollama.ai/library/tiny/latest", "{")
    rows = {name: rest.strip() for name, _, rest in (row.partition(" ") for row in models().splitlines())}
    rows.pop("MODEL")
    assert rows.pop("z.gguf").endswith("yes")
    assert rows.pop("a-00001-of-00003.gguf") == "part 1 of 3 is missing: there is no file a-00001-of-00003.gguf"
    assert "data is not within the file bounds, model is corrupted or incomplete" in rows.pop("b.gguf")
    assert rows.pop("c.gguf") == "c.gguf is a directory, not a file"
    assert rows.pop("d.gguf") == "d.gguf leads to nowhere, which is not there"
    for name in ("e.gguf", "f.gguf"):
        assert rows.pop(name).startswith(f"Failed to load model from file: {name}: ")
    assert rows.pop("ollama:tiny:latest").endswith("latest is damaged: it is no manifest of Ollama's")
    assert rows == {}


def test_a_store_that_cannot_be_listed_has_a_row(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    put(home, "here/a.gguf")
    monkeypatch.setattr(Path, "home", nobody)
    good, *bad = list(held_models(Path()))
    assert good.extendable
    error = "nobody knows the home folder, where models would be: set HOME"
    assert bad == [HeldModel(name, error) for name in ("hf:", "ollama:", "lmstudio:")]


def test_names_of_any_bytes(home: Path) -> None:
    os.link(put(home, "whole.gguf", TINY_MODEL.read_bytes()), os.fsencode(home / "here") + b"/\xff.gguf")
    assert "\N{REPLACEMENT CHARACTER}.gguf" in models()


def test_damaged_headers(home: Path) -> None:
    """Each is a row, whatever is wrong with it."""
    content = TINY_MODEL.read_bytes()
    rng = random.Random(0)
    n_damaged = 0
    for _ in range(200):
        damaged = bytearray(content)
        for at in rng.sample(range(2000), 3):
            damaged[at] = rng.randrange(256)
        (home / "here" / "a.gguf").write_bytes(damaged)
        (held,) = held_models(Path())
        n_damaged += held.error is not None
    assert 20 < n_damaged < 200


def test_the_header_says_whether_a_model_can_be_extended(home: Path) -> None:
    wrong = set()
    for name, family in FAMILIES.items():
        write_header(family, home / "here" / "a.gguf")
        (held,) = held_models(Path())
        assert held.error is None, name
        if held.extendable:
            wrong |= {name} if family.refused else set()
        else:
            assert family.refused is not None, name
            assert family.refused in str(held.reason)
    assert wrong == NOT_IN_THE_HEADER
