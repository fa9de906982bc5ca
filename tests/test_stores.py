"""Models by name: stores laid out like Ollama's and LM Studio's."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ollama_store import MODEL, write_manifest, write_ollama
from served import Served

from selfextend_gguf import Llama
from selfextend_gguf.cli import main
from selfextend_gguf.errors import ModelFileError
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.stores import model_path, name_of, ollama


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def test_ollama_of_the_system(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ollama's installer makes a service, the models are the service's."""
    assert str(ollama.SYSTEM_STORE) == "/usr/share/ollama/.ollama/models"
    system = home / "system"
    monkeypatch.setattr(ollama, "SYSTEM_STORE", system)
    with pytest.raises(ModelFileError, match=rf"^Ollama has no model tiny: there is no {home}/\.ollama.* no {system}/"):
        model_path("ollama:tiny")
    blob = write_ollama(system, "registry.ollama.ai/library/tiny/latest")
    assert model_path("ollama:tiny") == blob
    own = write_ollama(home / ".ollama" / "models", "registry.ollama.ai/library/tiny/latest")
    assert model_path("ollama:tiny") == own


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_ollama_of_the_system_closed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = home / "system"
    monkeypatch.setattr(ollama, "SYSTEM_STORE", system)
    write_ollama(system, "registry.ollama.ai/library/tiny/latest")
    system.chmod(0)
    try:
        with pytest.raises(ModelFileError, match=rf"{system}/.* cannot be read \(Permission denied\)$"):
            model_path("ollama:tiny")
    finally:
        system.chmod(0o700)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "null", '{"layers": 1}', '{"layers": [1]}', '{"layers": []}', "[" * 100_000, " " * 2**20 + "{}"]
    + [{"layers": [{"mediaType": MODEL, "digest": digest}]} for digest in (1, "sha256:../../x", "sha256:ab")],
)
def test_damaged_manifest(home: Path, content: Any) -> None:
    path = write_manifest(home / ".ollama" / "models", "registry.ollama.ai/library/tiny/latest", content)
    with pytest.raises(ModelFileError, match=f"^{path} (is damaged|names no model file)"):
        model_path("ollama:tiny")


def test_half_written_store(home: Path) -> None:
    blob = write_ollama(home / ".ollama" / "models", manifest := "registry.ollama.ai/library/tiny/latest")
    blob.unlink()
    with pytest.raises(ModelFileError, match=f"^Ollama's tiny:latest is not complete: there is no file {blob}$"):
        model_path("ollama:tiny")
    blob.symlink_to(home / "nowhere")
    with pytest.raises(ModelFileError, match=f"complete: {blob} leads to {home / 'nowhere'}, which is not there$"):
        model_path("ollama:tiny")
    path = home / ".ollama" / "models" / "manifests" / manifest
    path.unlink()
    path.symlink_to(home / "nowhere")
    with pytest.raises(ModelFileError, match=f"^{path} leads to {home / 'nowhere'}, which is not there$"):
        model_path("ollama:tiny")
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelFileError, match=f"^{path} is a directory, not a file$"):
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
    (folder / "b 2.gguf").touch()
    with pytest.raises(ModelFileError, match=r"say which: a-00001-of-00002\.gguf, b 2\.gguf$"):
        model_path("lmstudio:ann/tiny-GGUF")
    assert model_path("lmstudio:ann/tiny-GGUF/b 2.gguf") == folder / "b 2.gguf"
    with pytest.raises(ModelFileError, match=r"there is no file .*c\.gguf; there: a-00001-of-00002\.gguf, b 2\.gguf$"):
        model_path("lmstudio:ann/tiny-GGUF/c.gguf")


def test_lm_studio_moved(home: Path) -> None:
    """To where its pointer says, and the models to where its settings there say; nonsense in either is passed over."""
    pointer, settings = home / ".lmstudio-home-pointer", home / "moved" / "settings.json"
    settings.parent.mkdir()
    for said, content, expected in [
        (f"{home / 'moved'}\n", '{"downloadsFolder": "%s"}' % (home / "big disk"), "big disk"),
        (f"{home / 'moved'}\n", "{", "moved/models"),
        (f"{home / 'moved'}\n", "[]", "moved/models"),
        (f"{home / 'moved'}\n", '{"downloadsFolder": 1}', "moved/models"),
        ("\0", "{}", ".lmstudio/models"),
    ]:
        pointer.write_text(said)
        settings.write_text(content)
        file = home / expected / "ann" / "tiny" / "a.gguf"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        assert model_path("lmstudio:ann/tiny") == file
        file.unlink()
        file.parent.rmdir()


def test_lm_studio_half(home: Path) -> None:
    folder = home / ".lmstudio" / "models" / "ann" / "tiny"
    folder.mkdir(parents=True)
    later, first = folder / "a-00002-of-00003.gguf", folder / "a-00001-of-00003.gguf"
    later.touch()
    with pytest.raises(ModelFileError, match=f"^part 1 of 3 is missing: there is no file {first}$"):
        model_path("lmstudio:ann/tiny")
    first.touch()
    with pytest.raises(ModelFileError, match=r"^part 3 of 3 is missing: there is no file"):
        model_path("lmstudio:ann/tiny")
    (folder / "a-00003-of-00003.gguf").symlink_to(home / "nowhere")
    with pytest.raises(ModelFileError, match=r"^part 3 of 3 is missing: .* leads to .*nowhere, which is not there$"):
        model_path("lmstudio:ann/tiny")


@pytest.mark.parametrize("name", ["ollama:tiny", "lmstudio:ann/tiny"])
def test_no_home(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    with pytest.raises(ModelFileError, match="set HOME"):
        model_path(name)


def test_link_to_nowhere(home: Path) -> None:
    (home / "model.gguf").symlink_to("nowhere.gguf")
    result = CliRunner().invoke(main, ["info", "model.gguf"])
    assert (
        result.stderr == "Error: Model path does not exist: model.gguf (it leads to nowhere.gguf, which is not there)\n"
    )


def test_what_to_call_it(home: Path) -> None:
    blob = write_ollama(home / ".ollama" / "models", "registry.ollama.ai/ann/tiny/1b")
    assert name_of(blob) == "ollama:ann/tiny:1b"
    assert name_of(Path(TINY_MODEL)) == TINY_MODEL.name
    nameless = blob.with_name("sha256-" + "0" * 64)
    assert name_of(nameless) == nameless.name


def test_a_path_is_a_path(home: Path) -> None:
    (home / "ollama:tiny").touch()
    assert model_path("ollama:tiny") == Path("ollama:tiny")
    assert model_path("missing.gguf") == Path("missing.gguf")


def test_one_line(home: Path) -> None:
    result = CliRunner().invoke(main, ["info", "ollama:tiny"])
    assert result.exit_code == 1
    assert "Error: Ollama has no model tiny" in result.output


def test_serve(home: Path) -> None:
    """Clients ask for models by the names that were given, which differ where the files' names would not."""
    for name in ("tiny/1b", "tiny/2b"):
        write_ollama(home / ".ollama" / "models", f"registry.ollama.ai/library/{name}")
    server = Served("ollama:tiny:1b", "ollama:tiny:2b", "--ctx", "256", "-t", "1", HOME=str(home))
    try:
        answer = server.client().completions.create(model="ollama:tiny:2b", prompt="a", max_tokens=1)
    finally:
        server.end()
    assert answer.usage.completion_tokens == 1
