"""`hf:` names, by the real huggingface_hub client against a server on loopback."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import gguf
import pexpect
import pytest
from click.testing import CliRunner
from gguf.scripts.gguf_new_metadata import copy_with_new_metadata
from hub import COMMIT, Hub, running_hub

from selfextend_gguf import Llama
from selfextend_gguf.cli import main
from selfextend_gguf.errors import ModelFileError, NotReachedWarning
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.stores import model_path
from selfextend_gguf.stores.hugging_face import cache_folder, choose

WHOLE = TINY_MODEL.read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # before it goes on
    # Of a file that breaks off, whole chunks are kept: 10 MB each.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 2**16)
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.repos["ann/tiny"] = {"README.md": b"# A model", "tiny-Q4_K_M.gguf": WHOLE, "tiny-Q8_0.gguf": WHOLE + b"8"}
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bundled model, split."""
    folder = tmp_path_factory.mktemp("split")
    reader = gguf.GGUFReader(TINY_MODEL)
    writer = gguf.GGUFWriter(folder / "tiny-Q8_0.gguf", "llama", split_max_tensors=20)
    copy_with_new_metadata(reader, writer, {}, [])
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def listing(name: str = "a.gguf", size: Any = 5, commit: str = COMMIT, digest: str = "0" * 64) -> bytes:
    """A list of one file."""
    file = {"rfilename": name, "size": size, "blobId": "b" * 40, "lfs": {"sha256": digest, "size": 5, "pointerSize": 1}}
    return json.dumps({"id": "ann/tiny", "sha": commit, "siblings": [file]}).encode()


def in_cache(cache: Path, name: str, repo: str = "models--ann--tiny") -> Path:
    return cache / repo / "snapshots" / COMMIT / name


def test_whole(hub: Hub, cache: Path) -> None:
    path = model_path("hf:ann/tiny")
    assert path == in_cache(cache, "tiny-Q4_K_M.gguf")
    assert path.read_bytes() == WHOLE
    assert (cache / "models--ann--tiny" / "refs" / "main").read_text() == COMMIT  # for others who use the cache
    assert hub.sent == [("tiny-Q4_K_M.gguf", 0)]
    for name in ("hf:ann/tiny:q4_k_m", "hf:ann/tiny/tiny-Q4_K_M.gguf"):
        assert model_path(name) == path
    assert len(hub.sent) == 1  # nothing is asked for twice
    assert model_path("hf:ann/tiny:Q8_0").read_bytes() == WHOLE + b"8"


def test_split(hub: Hub, parts: dict[str, bytes]) -> None:
    assert len(parts) > 1
    hub.repos["ann/split"] = {f"Q8_0/{name}": content for name, content in parts.items()}
    with closing(Llama.from_name("hf:ann/split", n_ctx=64, n_threads=1, verbose=False)) as llama:
        assert llama("The ", max_tokens=1)["choices"]
    assert sorted(hub.sent) == [(name, 0) for name in sorted(hub.repos["ann/split"])]
    hub.repos["ann/split"].popitem()
    with pytest.raises(ModelFileError, match="has not all parts of"):
        model_path("hf:ann/split")


def test_commands(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    """llama.cpp's -hf too; a pipe sees no progress."""
    for name in (["hf:ann/tiny"], ["-hf", "ann/tiny"], ["--offline", "-hf", "ann/tiny:Q4_K_M"]):
        result = CliRunner().invoke(main, ["info", *name])
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        assert "tiny-Q4_K_M.gguf" in result.stdout
    assert capfd.readouterr() == ("", "")
    assert len(hub.sent) == 1
    result = CliRunner().invoke(main, ["info", "-hf"])
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: -hf needs USER/REPO[:QUANT]\n")


def test_goes_on_where_it_broke_off(hub: Hub, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.breaks = 2
    assert model_path("hf:ann/tiny").read_bytes() == WHOLE
    starts = [start for _, start in hub.sent]
    assert len(starts) == 3
    assert 0 == starts[0] < starts[1] < starts[2]
    assert not caplog.records
    assert not list(cache.glob("**/*.incomplete"))


def test_another_process_goes_on(hub: Hub, cache: Path) -> None:
    hub.breaks = 100
    with pytest.raises(ModelFileError, match=r"is not reached .*; what has arrived is kept, and the same"):
        model_path("hf:ann/tiny")
    arrived = next(cache.glob("**/*.incomplete")).stat().st_size
    assert 0 < arrived < len(WHOLE)
    hub.breaks, hub.sent = 0, []
    assert model_path("hf:ann/tiny").read_bytes() == WHOLE
    assert hub.sent == [("tiny-Q4_K_M.gguf", arrived)]


def test_interrupted_on_a_terminal(hub: Hub, cache: Path) -> None:
    """Its progress is seen, Ctrl-C ends it, and the same command goes on."""
    program = (
        "import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 2**16\n"
        "from selfextend_gguf.cli import main; main(prog_name='sx-gguf')"
    )
    arguments = ["-c", program, "info", "hf:ann/tiny"]
    hub.holds = Event()
    spawn = partial(
        pexpect.spawn, sys.executable, arguments, encoding="utf-8", timeout=60, dimensions=(24, 100), cwd=cache.parent
    )
    terminal = spawn()
    terminal.expect(r"tiny-Q4_K_M\.gguf: +\d+%.*B/s")
    while not any(file.stat().st_size for file in cache.glob("**/*.incomplete")):
        sleep(0.01)
    terminal.sendintr()
    terminal.expect_exact("Interrupted.\r\n")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 130
    assert "Traceback" not in str(terminal.before)
    hub.holds.set()
    terminal = spawn()
    terminal.expect("Trained context: +256 tokens")
    terminal.expect(pexpect.EOF)
    (_, begun), (_, went_on) = hub.sent
    assert begun == 0 < went_on


def test_wrong_checksum(hub: Hub, cache: Path) -> None:
    hub.damages = True
    with pytest.raises(ModelFileError, match=r"^tiny-Q4_K_M\.gguf is not what .* its SHA-256 is another; try again$"):
        model_path("hf:ann/tiny")
    assert not list(cache.glob("**/*.gguf")) + list(cache.glob("**/*.incomplete"))
    hub.damages = False
    assert model_path("hf:ann/tiny").read_bytes() == WHOLE


def test_gated(hub: Hub, monkeypatch: pytest.MonkeyPatch, one_line_error: Callable[..., str]) -> None:
    hub.token = "secret"
    error = one_line_error("info", "hf:ann/tiny")
    assert error.startswith("Error: ann/tiny is open to those only")
    assert error.endswith(f"ask at {hub.url}/ann/tiny, then set HF_TOKEN to your token")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert model_path("hf:ann/tiny").is_file()


def test_not_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch, one_line_error: Callable[..., str]) -> None:
    """What is there is used, with a warning."""
    path = model_path("hf:ann/tiny")
    hub.status = 503
    with pytest.warns(NotReachedWarning, match=r"answers 503 Service Unavailable: the model is taken from the cache$"):
        assert model_path("hf:ann/tiny") == path
    hub.status, hub.waits = 200, 1
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.1)
    with pytest.warns(NotReachedWarning, match="is not reached .*time"):
        assert model_path("hf:ann/tiny") == path
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(NotReachedWarning, match=r"^http://127\.0\.0\.1:9 is not reached"):
        assert model_path("hf:ann/tiny") == path
    assert "holds no GGUF file of ann/other, and http://127.0.0.1:9 is not" in one_line_error("info", "hf:ann/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    error = one_line_error("info", "hf:ann/other")
    assert error.endswith("need huggingface_hub: pip install 'selfextend-gguf[hub]'")


def test_offline(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, one_line_error: Callable[..., str]) -> None:
    error = one_line_error("info", "--offline", "hf:ann/tiny")
    assert error == (
        f"Error: Hugging Face's cache {cache} holds no GGUF file of ann/tiny, and nothing is downloaded offline"
    )
    path = model_path("hf:ann/tiny")
    hub.shutdown()
    assert CliRunner(env={"SX_GGUF_OFFLINE": "1"}).invoke(main, ["info", "hf:ann/tiny"]).stderr == ""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert model_path("hf:ann/tiny") == path
    with pytest.raises(ModelFileError, match=r"ann/tiny has no Q8_0; it has Q4_K_M in Hugging Face's cache"):
        model_path("hf:ann/tiny:Q8_0")
    path.resolve().unlink()
    with pytest.raises(ModelFileError, match=r"leads to .*, which is not there in Hugging Face's cache"):
        model_path("hf:ann/tiny")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:ann/none", "Hugging Face shows no ann/none: if it is private, set HF_TOKEN to your token"),
        ("hf:ann/tiny:Q2_K", "ann/tiny has no Q2_K; it has Q4_K_M, Q8_0"),
        ("hf:ann/tiny/x.gguf", "ann/tiny has no x.gguf; it has Q4_K_M, Q8_0"),
        ("hf:ann/text", "ann/text holds no .gguf model"),
        ("hf:ann", "'ann' is no name of a model: expected hf:USER/REPO[:QUANT] or hf:USER/REPO/FILE.gguf"),
        ("hf:ann--x/tiny", "ann--x/tiny is no name of a repository on Hugging Face"),
        ("hf:ann/tiny/../x.gguf", "'ann/tiny/../x.gguf' is no name of a model: expected hf:USER/REPO[:QUANT] or "),
    ],
)
def test_no_such_model(hub: Hub, one_line_error: Callable[..., str], name: str, expected: str) -> None:
    hub.repos["ann/text"] = {"README.md": b"# No model"}
    assert one_line_error("info", name).startswith(f"Error: {expected}")


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>Welcome to our hotel</html>",
        b"[]",
        b"{}",
        b'{"id": "ann/tiny", "siblings": 1}',
        listing(commit="../../.."),
        listing(digest="../../x"),
        listing(name="../x.gguf"),
        listing(name="/x.gguf"),
        listing(size="5"),
    ],
)
def test_answers_of_something_else(hub: Hub, cache: Path, answer: bytes, one_line_error: Callable[..., str]) -> None:
    """None of them leads out of the cache."""
    hub.list = answer
    assert one_line_error("info", "hf:ann/tiny").endswith(f"and {hub.url} does not answer as Hugging Face does")
    assert hub.sent == []
    assert not cache.exists()


def test_a_token_that_is_none(hub: Hub, monkeypatch: pytest.MonkeyPatch, one_line_error: Callable[..., str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "\N{SNOWMAN}")
    error = one_line_error("info", "hf:ann/tiny")
    assert error == "Error: the token for Hugging Face (HF_TOKEN) has letters that no token has"


def test_disk_is_full(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ModelFileError, match=r"^0\.0 GB are to be downloaded, and .* has room for 0\.0 GB$"):
        model_path("hf:ann/tiny")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "/home/ann/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/c", "HF_HOME": "~/hf"}, "/home/ann/hf/hub"),
        ({"HF_HOME": "/hf", "HF_HUB_CACHE": "/hub"}, "/hub"),
    ],
)
def test_where_the_cache_is(
    cache: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name, value in {"HF_HOME": "", "XDG_CACHE_HOME": "", "HOME": "/home/ann", **variables}.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == expected


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("", "a-Q4_K_M.gguf"),
        ("q4_k_m", "a-Q4_K_M.gguf"),
        ("Q4_K", "a-Q4_K.gguf"),
        ("IQ4_XS", "IQ4_XS/a-00001-of-00002.gguf"),
        ("F16", "a.F16.gguf"),
    ],
)
def test_which_file(wanted: str, expected: str) -> None:
    files = ["README.md", "a-Q4_K_M.gguf", "a-Q4_K.gguf", "a.F16.gguf", "a-BF16.gguf", "mmproj-a-Q4_K_M.gguf"]
    files += [f"IQ4_XS/a-0000{number}-of-00002.gguf" for number in (1, 2)]
    assert choose(files, wanted, "ann/a") == expected
