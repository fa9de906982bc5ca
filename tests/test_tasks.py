"""Prompts are built exactly as their sources build them, and scored by RULER's recall."""

from __future__ import annotations

import re

import numpy as np
import pytest

from selfextend_gguf import Llama
from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.retrieval import ANSWER_ROOM, evaluate_grid, wilson_interval
from selfextend_gguf.evaluation.tasks import NOISE, TASKS, Wish, recall
from selfextend_gguf.models import TINY_MODEL


def words(text: str) -> int:
    return len(text.split())


def wish(n_tokens: int, depth: float = 0.5, **others) -> Wish:
    return Wish(n_tokens, words, depth, **others)


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def test_longlm_prompt_word_by_word():
    # 26 words of introduction, 12 of the fact, 8 of the question (its first touches the line before it), and
    # 19 a filler line: 46 + 3 * 19 = 103.
    task = TASKS["longlm"](rng(), wish(105, depth=0.34))
    (key,) = task.answers
    assert re.fullmatch(r"[1-9]\d{4}", key)
    assert task.prompt == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information there.\n"
        f"{NOISE}\nThe pass key is {key}. Remember it. {key} is the pass key.\n{NOISE}\n{NOISE}"
        "What is the pass key? The pass key is "
    )


def test_llama_cpp_prompt_word_by_word():
    # 26 + 12 + 9 + 2 * 19 = 85 words.
    task = TASKS["llama.cpp"](rng(), wish(90, depth=1.0))
    (key,) = task.answers
    assert task.max_tokens == 16
    assert 1 <= int(key) <= 50000
    assert task.prompt == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        f"about the important information there. {NOISE} {NOISE} The pass key is {key}. Remember it. {key} is the pass "
        "key. What is the pass key? The pass key is"
    )


@pytest.mark.parametrize("digits", [5, 20, 64])
def test_keys_have_the_digits_asked_for(digits):
    (key,) = TASKS["longlm"](rng(), wish(200, digits=digits)).answers
    assert len(key) == digits


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("n_tokens", [600, 2000])
def test_prompts_fill_their_budget_and_hold_their_answers(name, n_tokens, heldout_text):
    made = TASKS[name](rng(), wish(n_tokens, text=heldout_text))
    assert n_tokens - 20 <= words(made.prompt) <= n_tokens
    question = made.prompt.rfind("VAR ") if name == "vt" else made.prompt.rfind("?")
    assert all(answer in made.prompt[: question + 12] for answer in made.answers)
    assert recall(" ".join(made.answers).upper(), made.answers) == 1
    again = TASKS[name](rng(), wish(n_tokens, text=heldout_text))
    assert again == made


@pytest.mark.parametrize("name", ["longlm", "llama.cpp", "native", "niah_single_1", "niah_multikey_2"])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.9])
def test_the_fact_stands_at_its_depth(name, depth, heldout_text):
    made = TASKS[name](rng(), wish(3000, depth=depth, text=heldout_text))
    assert made.prompt.index(made.answers[0]) / len(made.prompt) == pytest.approx(depth, abs=0.03)


def test_needles_by_rulers_rules():
    needle = r"One of the special magic {} for \S+ is: {}\."
    single = TASKS["niah_single_1"](rng(), wish(500))
    assert len(re.findall(needle.format("numbers", r"\d{7}"), single.prompt)) == 1
    assert single.prompt.count(NOISE) > 10
    keys = re.findall(r"magic numbers for (\S+) is: \d{7}\.", TASKS["niah_multikey_2"](rng(), wish(500)).prompt)
    assert len(keys) == len(set(keys)) > 20
    uuids = TASKS["niah_multikey_3"](rng(), wish(500))
    assert len(re.findall(needle.format("uuids", r"[0-9a-f-]{36}"), uuids.prompt)) > 20
    values = TASKS["niah_multivalue"](rng(), wish(500))
    assert len(values.answers) == 4
    assert len(set(re.findall(r"magic numbers for (\S+) is", values.prompt))) == 1
    queries = TASKS["niah_multiquery"](rng(), wish(500))
    assert len(queries.answers) == len(set(re.findall(r"magic numbers for (\S+) is", queries.prompt))) == 4


def test_variables_hop_four_times():
    made = TASKS["vt"](rng(), wish(500))
    assignments = re.findall(r"VAR (\w+) = ((?:VAR )?\w+)", made.prompt)
    assert [name for name, _ in assignments] == list(made.answers)
    assert re.fullmatch(r"\d{5}", assignments[0][1])
    assert [value for _, value in assignments[1:]] == [f"VAR {name}" for name in made.answers[:4]]


def test_frequent_words_follow_zipf():
    made = TASKS["fwe"](rng(), wish(2000))
    counts = [made.prompt.split().count(word) for word in ("...", *made.answers)]
    assert counts == sorted(counts, reverse=True)
    # Alpha 2: ranks 1 to 4 are in proportion 1, 1/4, 1/9, 1/16.
    for rank, count in enumerate(counts, 1):
        assert count / counts[0] == pytest.approx(1 / rank**2, rel=0.05)


def test_recall_is_the_fraction_found_in_any_case():
    assert recall("The answer: ABC and 12.", ["abc", "12", "13"]) == pytest.approx(2 / 3)


def test_wilson_interval():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_too_small_a_budget_and_too_short_a_text_are_refused():
    with pytest.raises(ConfigError, match="no room for this task"):
        TASKS["longlm"](rng(), wish(20))
    with pytest.raises(ConfigError, match="too short to fill"):
        TASKS["native"](rng(), wish(5000, text="word " * 300))


def test_the_bundled_model_finds_native_keys(heldout_text):
    llm = Llama(str(TINY_MODEL), n_ctx=512 + ANSWER_ROOM, verbose=False)
    cells = evaluate_grid(
        llm, "native", [512], [0.1, 0.9], 3, count_tokens=lambda part: len(part.encode()), text=heldout_text
    )
    assert [(c.depth, c.score) for c in cells] == [(0.1, 1.0), (0.9, 1.0)]
    assert cells[0].low == pytest.approx(0.4385, abs=1e-3)
