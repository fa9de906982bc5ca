"""The tiny models: their data, their file, their training, and what the bundled one can do."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest

from selfextend_gguf import Llama
from selfextend_gguf.evaluation.readers import open_reader
from selfextend_gguf.models import DEMO_TEXT, TINY_MODEL
from selfextend_gguf.studies import methods
from selfextend_gguf.studies.cache_types import REWRITES, quality, rewrite_errors
from selfextend_gguf.studies.quality import fraction_found, key_tasks
from selfextend_gguf.tiny import batches, keys
from selfextend_gguf.tiny.model_file import LlamaShape


def test_batches_have_one_weight_for_each_predicted_token(heldout_text):
    text = np.frombuffer(heldout_text.encode(), np.uint8)
    words = batches.vocabulary_words(text)
    rng = np.random.default_rng(0)
    for tokens, weights in (
        batches.text_batch(rng, text, 4, 100),
        batches.copy_batch(rng, text, 4, 100),
        batches.partial_copy_batch(rng, text, 4, 100),
        batches.retrieval_batch(rng, text, words, 16, 256),
    ):
        assert tokens.shape == (weights.shape[0], weights.shape[1] + 1)
        assert tokens.min() >= 0
        assert tokens.max() < 256


def test_retrieval_rows_weigh_the_answer_and_not_the_fact(heldout_text):
    text = np.frombuffer(heldout_text.encode(), np.uint8)
    tokens, weights = batches.retrieval_batch(np.random.default_rng(1), text, ["oak"], 8, 256)
    for row, weight in zip(tokens, weights, strict=True):
        heavy = bytes(row[1:][weight == weight.max()].astype(np.uint8))
        assert heavy.isdigit()
        unforeseeable = bytes(row[1:][weight == 0].astype(np.uint8))
        assert unforeseeable.isdigit()
        assert bytes(row.astype(np.uint8)).count(heavy[:3]) >= 2


@pytest.mark.parametrize("depth", [0.0, 0.05, 0.5, 1.0])
def test_a_key_task_hides_its_key_where_asked(heldout_text, depth):
    task = keys.key_task(np.random.default_rng(2), heldout_text, 1000, depth)
    assert len(task.prompt) == 1000
    assert task.prompt.count(task.answer) == 1
    assert abs(task.prompt.index(task.answer) / 1000 - depth) < 0.12
    assert task.prompt.endswith(" key is ")


def test_a_key_task_needs_room(heldout_text):
    with pytest.raises(ValueError, match="no room"):
        keys.key_task(np.random.default_rng(2), heldout_text, 40, 0.5)


def test_every_byte_survives_the_vocabulary():
    llm = Llama(str(TINY_MODEL), n_ctx=256, verbose=False)
    # All bytes that UTF-8 text can hold: ASCII but for 0 (the end of text), then leading and continuation bytes.
    text = bytes(range(1, 128)) + "".join(map(chr, range(0x80, 0x1000))).encode() + "\u2603\u2603\U0001f600".encode()
    assert llm.tokenize(text, add_bos=False) == list(text)
    assert llm.detokenize(list(text)) == text


def test_demo_text_was_not_trained_on(heldout_text):
    assert DEMO_TEXT.read_text(encoding="ascii") in heldout_text


def test_training_learns(tmp_path, heldout_text):
    """A few steps of the real trainer, through the real file format into llama.cpp."""
    torch = pytest.importorskip("torch", reason="training needs the extra [train]")
    from selfextend_gguf.tiny.model_file import write_llama
    from selfextend_gguf.tiny.train import Recipe, Stage, TinyLlama, load_weights, train

    text = np.frombuffer(heldout_text.encode(), np.uint8)
    shape = LlamaShape(n_ctx_train=256, n_layer=2, n_embd=64, n_head=2, n_head_kv=1, n_ff=96)
    lines: list[str] = []
    torch.manual_seed(0)
    model = TinyLlama(shape)
    stages = [
        Stage("text", 25, 64, (8, 0, 0)),
        Stage("retrieval", 5, 192, (2, 2, 2)),
        Stage("sharpen", 5, 192, (2, 2, 2), 0.4, batches.partial_copy_batch),
    ]
    train(text[:-20000], text[-20000:], model, Recipe(stages, warm_up=5), log_every=10, log=lines.append)
    losses = [float(line.split(" loss ")[1].split()[0]) for line in lines if " loss " in line]
    assert losses[1] < losses[0] < np.log(256)
    path = tmp_path / "trained.gguf"
    write_llama(path, shape, model.gguf_tensors())
    copy = TinyLlama(shape)
    load_weights(copy, path)
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), model.parameters(), strict=True))
    tokens = list(heldout_text[:64].encode())
    llm = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0)
    llm.eval(tokens)
    with torch.no_grad():
        wanted = model(torch.tensor([tokens]))[0].numpy()
    assert np.abs(llm.scores[:64] - wanted).max() < 1e-3 * np.abs(wanted).max()


# ---- the bundled model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The bundled model in F16 and Q4_0, made by llama.cpp's own quantiser."""
    folder = tmp_path_factory.mktemp("quantised")
    kinds = {"F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
    paths = {"Q8_0": TINY_MODEL}
    for name, kind in kinds.items():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = kind
        params.allow_requantize = True
        paths[name] = folder / f"tiny.{name}.gguf"
        assert llama_cpp.llama_model_quantize(str(TINY_MODEL).encode(), str(paths[name]).encode(), params) == 0
    return paths


@pytest.mark.parametrize(("n_tokens", "n_keys"), [(256, 40), (1024, 40), (2048, 20), (4096, 10)])
def test_key_retrieval_with_automatic_parameters(heldout_text, n_tokens, n_keys):
    """Each in a text of its own, at depths from 5 % to 95 %, greedy. (The published table has 40 at every length.)"""
    llm = Llama(str(TINY_MODEL), n_ctx=n_tokens + 64, verbose=False)
    assert fraction_found(llm, key_tasks(heldout_text, n_tokens, n_keys)) >= 0.98


def test_plain_llama_cpp_finds_nothing(heldout_text):
    reader = open_reader("plain", str(TINY_MODEL), 1040)
    found = [f for text in methods.key_texts(heldout_text, 1024, 5, 8) for f in methods.keys_found(reader, text)]
    assert len(found) == 40
    assert sum(found) <= 2


@pytest.mark.parametrize("name", ["F16", "Q4_0"])
def test_other_quantisations_find_keys_too(quantised, heldout_text, name):
    llm = Llama(str(quantised[name]), n_ctx=1100, verbose=False)
    assert fraction_found(llm, key_tasks(heldout_text, 1024, 10)) >= 0.9


@pytest.mark.parametrize("n_tokens", [512, 2048, 4096])
def test_perplexity_stays_at_the_texts_own_difficulty(heldout_text, n_tokens):
    tokens = list(heldout_text[5000 : 5000 + n_tokens].encode())
    ours, fresh = (open_reader(m, str(TINY_MODEL), n_tokens).losses(tokens) for m in ("selfextend", "window"))
    late = slice(n_tokens // 2, None)
    assert np.exp((ours - fresh)[late].mean()) < 1.06


def test_caches_of_few_bits_keep_what_f16_finds(heldout_text):
    """8 trained contexts, keys of q8_0 and q4_0 against f16."""

    def of(kind: str) -> tuple[float, float]:
        return quality(str(TINY_MODEL), heldout_text, kind, 2048, n_trials=10, n_texts=2)

    found, perplexity = of("f16")
    for kind, limit in (("q8_0", 1.01), ("q4_0", 1.05)):
        found_too, perplexity_too = of(kind)
        assert found_too >= found - 0.02
        assert perplexity_too < limit * perplexity


def test_rewriting_rounds_keys_of_few_bits_only(heldout_text):
    tokens = list(heldout_text[:600].encode())
    assert rewrite_errors(str(TINY_MODEL), tokens, "f32") == [0.0] * len(REWRITES)
    once, often = (rewrite_errors(str(TINY_MODEL), tokens, "q4_0")[REWRITES.index(n)] for n in (1, 50))
    assert 0.01 < once < often < 1
