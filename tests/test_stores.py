"""Models by name: stores laid out like Ollama's and LM Studio's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from selfextend_gguf import Llama
from selfextend_gguf.cli import main
from selfextend_gguf.errors import ModelFileError
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.stores import model_path

MODEL = "application/vnd.ollama.image.model"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_manifest(store: Path, name: str, content: Any) -> Path:
    path = store / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def write_ollama(store: Path, name: str) -> Path:
    """A model as `ollama pull` leaves it; the path of its blob."""
    digest = hashlib.sha256(Path(TINY_MODEL).read_bytes()).hexdigest()
    template = {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64, "size": 1}
    weights = {"mediaType": MODEL, "digest": f"sha256:{digest}", "size": Path(TINY_MODEL).stat().st_size}
    write_manifest(store, name, {"schemaVersion": 2, "layers": [template, weights]})
    blob = store / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir(exist_ok=True)
    shutil.copy(TINY_MODEL, blob)
    return blob


@pytest.mark.parametrize(
    ("name", "manifest"),
    [
        ("tiny", "registry.ollama.ai/library/tiny/latest"),
        ("tiny:1b", "registry.ollama.ai/library/tiny/1b"),
        ("ann/tiny", "registry.ollama.ai/ann/tiny/latest"),
        ("hf.co/ann/tiny:Q4_K_M", "hf.co/ann/tiny/Q4_K_M"),
    ],
)
def test_ollama(home: Path, name: str, manifest: str) -> None:
    blob = write_ollama(home / ".ollama" / "models", manifest)
    assert model_path(f"ollama:{name}") == blob
    result = CliRunner().invoke(main, ["info", f"ollama:{name}"])
    assert result.exit_code == 0, result.output


def test_ollama_models_says_where(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "elsewhere"))
    blob = write_ollama(home / "elsewhere", "registry.ollama.ai/library/tiny/latest")
    assert model_path("ollama:tiny") == blob
    with contextlib.closing(Llama.from_name("ollama:tiny", n_ctx=64, n_threads=1, verbose=False)) as llama:
        assert llama.model_path == str(blob)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "null", '{"layers": 1}', '{"layers": [1]}', '{"layers": []}', "[" * 100_000]
    + [{"layers": [{"mediaType": MODEL, "digest": digest}]} for digest in (1, "sha256:../../x", "sha256:ab")],
)
def test_damaged_manifest(home: Path, content: Any) -> None:
    path = write_manifest(home / ".ollama" / "models", "registry.ollama.ai/library/tiny/latest", content)
    with pytest.raises(ModelFileError, match=f"^{path} (is damaged|names no model file)"):
        model_path("ollama:tiny")


def test_half_written_store(home: Path) -> None:
    blob = write_ollama(home / ".ollama" / "models", "registry.ollama.ai/library/tiny/latest")
    blob.unlink()
    blob.symlink_to(home / "nowhere")
    with pytest.raises(ModelFileError, match="is not complete"):
        model_path("ollama:tiny")


@pytest.mark.parametrize("name", ["ollama:", "ollama:../x", "ollama:a/b/c/d", "lmstudio:a", "lmstudio:a/../b"])
def test_no_name(home: Path, name: str) -> None:
    with pytest.raises(ModelFileError, match="is no name of a model: expected"):
        model_path(name)


@pytest.mark.parametrize("store", [".lmstudio/models", ".cache/lm-studio/models"])
def test_lm_studio(home: Path, store: str) -> None:
    folder = home / store / "ann" / "tiny-GGUF"
    folder.mkdir(parents=True)
    with pytest.raises(ModelFileError, match=r"no \.gguf file"):
        model_path("lmstudio:ann/tiny-GGUF")
    for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "mmproj-a.gguf"):
        (folder / name).touch()
    assert model_path("lmstudio:ann/tiny-GGUF") == folder / "a-00001-of-00002.gguf"
    (folder / "b.gguf").touch()
    with pytest.raises(ModelFileError, match=r"say which: a-00001-of-00002\.gguf, b\.gguf"):
        model_path("lmstudio:ann/tiny-GGUF")
    assert model_path("lmstudio:ann/tiny-GGUF/b.gguf") == folder / "b.gguf"


def test_a_path_is_a_path(home: Path) -> None:
    (home / "ollama:tiny").touch()
    assert model_path("ollama:tiny") == Path("ollama:tiny")
    assert model_path("missing.gguf") == Path("missing.gguf")


def test_one_line(home: Path) -> None:
    result = CliRunner().invoke(main, ["info", "ollama:tiny"])
    assert result.exit_code == 1
    assert "Error: Ollama has no model tiny" in result.output
