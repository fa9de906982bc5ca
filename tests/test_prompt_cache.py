"""Prompt caches on disk: what is restored, what is refused, and that nothing is ever lost."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import F32, logits_of_parts, random_tokens, relative_error
from llama_cpp._internals import LlamaBatch

from selfextend_gguf import Llama
from selfextend_gguf.cli import main
from selfextend_gguf.context import SelfExtendContext
from selfextend_gguf.errors import ForeignPromptCacheError, PromptCacheError
from selfextend_gguf.models import TINY_MODEL, TINY_MODELS
from selfextend_gguf.prompt_cache import read_prompt_header
from selfextend_gguf.reference import Reference
from selfextend_gguf.schedule import SCHEDULES

MODEL = str(TINY_MODEL)


def open_tiny(n_ctx: int = 1024, **arguments) -> Llama:
    return Llama(MODEL, n_ctx=n_ctx, verbose=False, **arguments)


@pytest.fixture(scope="module")
def good_file(tmp_path_factory) -> Path:
    """Of 600 tokens, by the bundled model with its defaults."""
    llm = open_tiny()
    llm.eval(random_tokens(600))
    path = tmp_path_factory.mktemp("cache") / "good.kv"
    llm.save_prompt(path)
    return path


# ---- what is restored ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["norm-32", "neox-64"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_restored_keys_go_on_under_any_schedule(model, name, schedule, tmp_path):
    """Also in a context of another size, and after going back into the grouped part. What was read keeps the values it
    was read with, so the reference reads the first part under the first parameters as well."""
    path, tokens, more = model(name), random_tokens(300), random_tokens(40, seed=1)
    arguments = {"logits_all": True, "verbose": False, **F32}
    first = Llama(str(path), n_ctx=512, **arguments)
    first.eval(tokens)
    first.save_prompt(tmp_path / "p.kv")
    second = Llama(str(path), n_ctx=768, schedule=schedule, **arguments)
    assert second.load_prompt(tmp_path / "p.kv") == 300
    assert np.array_equal(second.key_positions, first.key_positions)
    reference = Reference(path)
    for keep in (300, 120):
        second.n_tokens = keep
        second.eval(more)
        parts = [(keep, first.self_extend), (keep + 40, second.self_extend)]
        wanted = logits_of_parts(reference, tokens[:keep] + more, parts)
        assert relative_error(second.scores[keep : keep + 40], wanted[keep:]) < 1e-4


def test_a_file_is_as_large_as_what_was_read(tmp_path):
    llm = open_tiny(n_ctx=16384)
    llm.eval(random_tokens(300))
    llm.save_prompt(tmp_path / "p.kv")
    # 4 layers x (64 + 64) x 2 bytes = 1024 bytes a token for the cache, 8 for tokens and positions
    assert 300 * 1032 < (tmp_path / "p.kv").stat().st_size < 1.1 * 300 * 1032


def test_text_within_the_trained_context_is_shared_with_contexts_that_group_nothing(tmp_path):
    long, short = open_tiny(), open_tiny(n_ctx=256, flash_attn=False)
    long.eval(random_tokens(200))
    long.save_prompt(tmp_path / "p.kv")
    assert short.load_prompt(tmp_path / "p.kv") == 200
    short.save_prompt(tmp_path / "q.kv")
    assert long.load_prompt(tmp_path / "q.kv") == 200


def test_grouped_keys_need_a_context_beyond_the_trained_one(tmp_path):
    long, short = open_tiny(schedule="paper"), open_tiny(n_ctx=256, flash_attn=False)
    long.eval(random_tokens(200))
    long.eval(random_tokens(20))
    long.save_prompt(tmp_path / "p.kv")
    with pytest.raises(PromptCacheError, match="holds grouped keys"):
        short.load_prompt(tmp_path / "p.kv")
    assert short.n_tokens == 0


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantised_caches(kind, tmp_path):
    from selfextend_gguf.kv_cache import KV_TYPES

    types = {"type_k": KV_TYPES[kind], "type_v": KV_TYPES[kind], "logits_all": True}
    first, second = open_tiny(**types), open_tiny(**types)
    first.eval(random_tokens(700))
    first.save_prompt(tmp_path / "p.kv")
    second.load_prompt(tmp_path / "p.kv")
    for llm in (first, second):
        llm.eval(random_tokens(90, seed=1))
    assert np.array_equal(first.scores[700:790], second.scores[700:790])


def test_a_later_prompt_is_read_from_where_it_differs(good_file):
    llm, seen = open_tiny(), []
    llm.load_prompt(good_file)
    llm.progress = lambda done, total: seen.append(total)
    llm.create_completion(random_tokens(600)[:500] + random_tokens(30, seed=5), max_tokens=1, temperature=0)
    assert seen[0] == 30


# ---- what is refused -------------------------------------------------------------------------------------------


def damaged_copies(content: bytes):
    """Cuts and flipped bits all over the file, the last bytes (header, footer) among them."""
    rng = np.random.default_rng(0)
    for n in [0, 1, 11, 19, *rng.integers(20, len(content), 10).tolist(), len(content) - 1]:
        yield f"cut at {n}", content[:n]
    for at in [0, 4, 8, *rng.integers(12, len(content), 20).tolist(), *range(len(content) - 24, len(content), 3)]:
        changed = bytearray(content)
        changed[at] ^= 1 << int(rng.integers(8))
        yield f"bit flipped at {at}", bytes(changed)
    yield "longer", content + b"x"
    yield "zeros", bytes(len(content))


def test_any_damage_is_noticed_and_leaves_an_empty_cache(good_file, tmp_path):
    llm = open_tiny()
    path = tmp_path / "damaged.kv"
    for what, content in damaged_copies(good_file.read_bytes()):
        path.write_bytes(content)
        llm.eval(random_tokens(20))
        with pytest.raises(PromptCacheError):
            llm.load_prompt(path)
        assert llm.n_tokens == 0, what
    llm.load_prompt(good_file)  # and it still works
    assert llm.n_tokens == 600


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"model_path": str(TINY_MODELS[1])}, "by another model file"),
        ({**F32}, "with other types of cached keys or values"),
        ({"rope_freq_base": 20000.0}, "with other RoPE settings"),
        ({"kv_overrides": {"llama.expert_count": 0}}, "with other adapters or overridden metadata"),
    ],
)
def test_files_of_other_models_and_settings_are_refused(good_file, arguments, why):
    llm = Llama(**{"model_path": MODEL, "n_ctx": 1024, "verbose": False, **arguments})
    with pytest.raises(ForeignPromptCacheError, match=why):
        llm.load_prompt(good_file)


def test_a_file_of_another_version_is_refused(good_file, monkeypatch):
    llm = open_tiny()
    monkeypatch.setattr(llama_cpp, "__version__", "9.9.9")
    with pytest.raises(ForeignPromptCacheError, match="with another version of llama-cpp-python"):
        llm.load_prompt(good_file)


def test_another_layout_of_values_is_refused(good_file):
    """Without flash attention llama.cpp keeps values transposed."""
    with pytest.raises(PromptCacheError, match="cannot restore"):
        open_tiny(flash_attn=True).load_prompt(good_file)


def test_too_long_a_text_is_refused(good_file):
    with pytest.raises(PromptCacheError, match="holds 600 tokens, more than the context of 512"):
        open_tiny(n_ctx=512).load_prompt(good_file)


def test_nothing_read_is_nothing_to_save(tmp_path):
    with pytest.raises(PromptCacheError, match="nothing was evaluated"):
        open_tiny().save_prompt(tmp_path / "p.kv")
    assert not list(tmp_path.iterdir())


# ---- writing ---------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file(tmp_path):
    llm = open_tiny()
    llm.eval(random_tokens(300))
    path = tmp_path / "p.kv"
    llm.save_prompt(path)
    old = path.read_bytes()
    llm.eval(random_tokens(300))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for n_bytes in (1000, 100_000, 400_000, 600 * 1032 + 100):  # the last: in the header
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limit[1]))
        try:
            with pytest.raises((OSError, PromptCacheError)):
                llm.save_prompt(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert path.read_bytes() == old
        assert [p.name for p in tmp_path.iterdir()] == ["p.kv"]


def test_kill_at_any_moment_leaves_a_good_file(tmp_path):
    """Fifty writers that die while they replace one good file by another: at bytes all over it, and at later steps."""
    script = f"""
        import os, resource, signal, sys
        from pathlib import Path
        from selfextend_gguf import Llama
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from helpers import random_tokens

        path = Path({str(tmp_path / "p.kv")!r})
        writer, reader = (Llama({MODEL!r}, n_ctx=1024, verbose=False) for _ in range(2))
        texts = [random_tokens(300 + n, seed=n) for n in (0, 1)]
        for text in texts:  # leaves files for the children to take turns with
            writer.reset()
            writer.eval(text)
            writer.save_prompt(path.with_suffix(f".{{len(text)}}"))
        path.hardlink_to(path.with_suffix(".300"))
        size = path.stat().st_size

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        def die_at_byte(n):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))

        def die_before(owner, step):
            setattr(owner, step, die)

        def die_after(owner, step):
            function = getattr(owner, step)
            setattr(owner, step, lambda *arguments: die(function(*arguments)))

        moments = [(die_at_byte, n * size // 46) for n in range(46)]
        moments += [(die, *step) for step in ((os, "fsync"), (Path, "replace")) for die in (die_before, die_after)]
        held, n_unfinished = 0, 0
        for moment, *arguments in moments:
            child = os.fork()
            if child == 0:
                writer.load_prompt(path.with_suffix(f".{{301 - held}}"))
                moment(*arguments)
                writer.save_prompt(path)
                os._exit(0)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
            if (moment, arguments) == (die_after, [Path, "replace"]):
                held = 1 - held
            else:
                n_unfinished += 1
            n = reader.load_prompt(path)
            assert reader.input_ids[:n].tolist() == texts[held]
            assert len(list(path.parent.glob(".p.kv.*.tmp"))) == n_unfinished
        assert held == 1
        for left in path.parent.glob(".p.kv.*.tmp"):
            os.utime(left, (0, 0))
        reader.save_prompt(path)  # cleans up what is older than a minute
        assert not any(path.parent.glob(".p.kv.*.tmp"))
        print(len(moments))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "50\n"), result.stderr


def test_two_writers_at_once_leave_the_file_of_one_of_them(tmp_path):
    script = f"""
        import sys
        from selfextend_gguf import Llama
        llm = Llama({MODEL!r}, n_ctx=1024, verbose=False)
        llm.eval([int(sys.argv[1])] * (500 + int(sys.argv[1])))
        for _ in range(60):
            llm.save_prompt({str(tmp_path / "p.kv")!r})
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    writers = [subprocess.Popen([*command, n], cwd=tmp_path) for n in ("1", "2")]
    assert [w.wait() for w in writers] == [0, 0]
    llm = open_tiny()
    n = llm.load_prompt(tmp_path / "p.kv")
    assert llm.input_ids[:n].tolist() in ([1] * 501, [2] * 502)
    assert [p.name for p in tmp_path.iterdir()] == ["p.kv"]


# ---- the command -----------------------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["run", MODEL, *arguments, "-n", "12", "--temp", "0"])


@pytest.fixture
def prompt_file(heldout_text, tmp_path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(heldout_text[:1500])
    return path


@pytest.fixture(scope="module")
def plain_answer(heldout_text) -> str:
    """To the prompt of that file, without a cache."""
    return run("-p", heldout_text[:1500]).stdout


def test_a_second_run_reads_one_token_and_says_the_same(prompt_file, heldout_text, tmp_path):
    cache = tmp_path / "p.kv"
    arguments = ["-f", str(prompt_file), "--prompt-cache", str(cache), "--json"]
    first, second = (json.loads(run(*arguments).stdout) for _ in range(2))
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] == 1499  # the last one is decoded again, for its logits
    assert second["text"] == first["text"]
    assert len(read_prompt_header(cache).tokens) == 1500
    # A prompt that goes on from there, and one that is shorter than the trained context.
    prompt_file.write_text(heldout_text[:1600])
    third = json.loads(run(*arguments).stdout)
    assert (third["cached_tokens"], third["prompt_tokens"]) == (1500, 1600)
    plain = json.loads(run("-f", str(prompt_file), "--json").stdout)
    assert third["text"] == plain["text"]
    assert len(read_prompt_header(cache).tokens) == 1600
    prompt_file.write_text(heldout_text[:100])
    assert json.loads(run(*arguments).stdout)["cached_tokens"] == 99
    assert len(read_prompt_header(cache).tokens) == 1600  # it holds this prompt, too


def test_a_read_only_file_is_not_written(prompt_file, heldout_text, tmp_path):
    cache = tmp_path / "p.kv"
    missing = run("-f", str(prompt_file), "--prompt-cache-ro", str(cache))
    assert missing.exit_code == 0
    assert missing.stderr == f"Warning: the prompt cache {cache} does not exist; the prompt is read\n"
    run("-f", str(prompt_file), "--prompt-cache", str(cache))
    content = cache.read_bytes()
    prompt_file.write_text(heldout_text[:1000] + "And Peter said")
    record = json.loads(run("-f", str(prompt_file), "--prompt-cache-ro", str(cache), "--json").stdout)
    assert record["cached_tokens"] == 1000
    assert cache.read_bytes() == content
    both = run("-f", str(prompt_file), "--prompt-cache-ro", str(cache), "--prompt-cache", str(cache))
    assert both.exit_code == 2
    assert "not both" in both.stderr


@pytest.mark.parametrize("what", ["foreign", "text", "damaged", "folder", "no folder", "full"])
def test_whatever_is_wrong_is_one_warning_line(what, prompt_file, plain_answer, good_file, tmp_path):
    cache = tmp_path / "cache" / "p.kv"
    content, limit = None, resource.getrlimit(resource.RLIMIT_FSIZE)
    if what != "no folder":
        cache.parent.mkdir()
    if what == "foreign":
        llm = Llama(str(TINY_MODELS[1]), n_ctx=1024, verbose=False)
        llm.eval(random_tokens(30))
        llm.save_prompt(cache)
        content = cache.read_bytes()
    elif what == "text":
        content = b"my precious notes"
        cache.write_bytes(content)
    elif what == "damaged":
        cache.write_bytes(good_file.read_bytes()[:-50])
    elif what == "folder":
        cache.mkdir()
    elif what == "full":
        cache.write_bytes(good_file.read_bytes())
        content = cache.read_bytes()
    if what == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        result = run("-f", str(prompt_file), "--prompt-cache", str(cache))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (result.exit_code, result.stdout) == (0, plain_answer)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("Warning: "), result.stderr
    if content is not None:
        assert cache.read_bytes() == content
    if what == "damaged":
        assert len(read_prompt_header(cache).tokens) == 1500  # replaced
    if cache.parent.exists():
        assert [p.name for p in cache.parent.iterdir()] == ["p.kv"]


def test_ctrl_c_while_reading_keeps_what_was_read(heldout_text, prompt_file, tmp_path, monkeypatch):
    """Ctrl-C in the fifth batch."""
    cache, n_batches, decode = tmp_path / "p.kv", 0, SelfExtendContext.decode

    def interrupted(self: SelfExtendContext, batch: LlamaBatch) -> None:
        nonlocal n_batches
        n_batches += 1
        if n_batches == 5:
            os.kill(os.getpid(), signal.SIGINT)
        decode(self, batch)

    monkeypatch.setattr(SelfExtendContext, "decode", interrupted)
    result = run("-f", str(prompt_file), "-b", "64", "--prompt-cache", str(cache))
    assert result.exit_code == 130
    n_read = int(re.fullmatch(r"Interrupted after reading (\d+) of 1500 tokens\.\n", result.stderr)[1])
    assert n_read == 4 * 64
    saved = read_prompt_header(cache)
    assert saved.tokens.tolist() == list(heldout_text[:n_read].encode())


def test_same_file_name_as_a_device_is_no_crash():
    result = run("hello", "--prompt-cache", os.devnull)
    assert result.exit_code == 0
    assert result.stderr.startswith("Warning: ")


def test_the_fingerprint_changes_with_the_weights(tmp_path):
    from selfextend_gguf.prompt_cache import model_fingerprint

    content = bytearray(TINY_MODEL.read_bytes())
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(content)
    assert model_fingerprint(str(copy), 0) == model_fingerprint(MODEL, 0)
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    assert model_fingerprint(str(copy), 1) != model_fingerprint(MODEL, 0)
