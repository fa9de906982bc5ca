"""Prompts are built exactly as their sources build them, and scored by RULER's recall."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from selfextend_gguf.errors import ConfigError
from selfextend_gguf.evaluation.retrieval import wilson_interval
from selfextend_gguf.evaluation.tasks import NOISE, TASKS, Wish, recall


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
    question = made.prompt.rfind("\nQuestion: " if name in ("vt", "fwe") else "What ")
    assert all(answer in made.prompt[:question] for answer in made.answers)
    assert made.prompt.isascii()
    assert recall(" ".join(made.answers).upper(), made.answers) == 1
    again = TASKS[name](rng(), wish(n_tokens, text=heldout_text))
    assert again == made


@pytest.mark.parametrize("name", ["longlm", "llama.cpp", "native", "niah_single_1", "niah_multikey_2"])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.9])
def test_the_fact_stands_at_its_depth(name, depth, heldout_text):
    made = TASKS[name](rng(), wish(3000, depth=depth, text=heldout_text))
    assert made.prompt.index(made.answers[0]) / len(made.prompt) == pytest.approx(depth, abs=0.03)


NEEDLE = r"One of the special magic {} for (\S+) is: ({})\."
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def needles(prompt: str, kind: str = "numbers", value: str = r"\d{7}") -> list[tuple[str, str]]:
    """(key, value) of each needle, in the order of the text."""
    return re.findall(NEEDLE.format(kind, value), prompt)


def test_single_needle_prompt_word_by_word():
    # 23 words of introduction, 10 of the needle, 25 of question and answer prefix: 58 + 2 * 19 = 96.
    task = TASKS["niah_single_1"](rng(), wish(100))
    ((key, value),) = needles(task.prompt)
    assert task.answers == (value,)
    assert task.max_tokens == 128
    assert task.prompt == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the number afterwards.\n{NOISE}\nOne of the special magic numbers for {key} is: {value}.\n{NOISE}\n"
        f"What is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )


@pytest.mark.parametrize("n_tokens", [500, 20_000])
def test_nothing_marks_the_needle_among_others(n_tokens):
    words_made = TASKS["niah_multikey_2"](rng(), wish(n_tokens))
    uuids_made = TASKS["niah_multikey_3"](rng(), wish(n_tokens))
    for made, found, pattern in (
        (words_made, needles(words_made.prompt), "[a-z]+-[a-z]+"),
        (uuids_made, needles(uuids_made.prompt, "uuids", UUID), UUID),
    ):
        keys = [key for key, _ in found]
        assert len(keys) == len(set(keys)) > n_tokens / 10 - 10
        assert all(re.fullmatch(pattern, key) for key in keys)
        (asked,) = re.findall(r"What is the special magic \w+ for (\S+) mentioned", made.prompt)
        assert made.answers == (dict(found)[asked],)


def test_the_key_asked_for_stays_alone_when_words_run_out():
    # 10000 pairs of words; a needle has 10 words.
    prompt = TASKS["niah_multikey_2"](rng(), wish(110_000)).prompt
    (asked,) = re.findall(r"What is the special magic number for (\S+) mentioned", prompt)
    keys = [key for key, _ in needles(prompt)]
    assert len(keys) > 10_900
    assert keys.count(asked) == 1
    assert max(keys.count(key) for key in keys[:50]) == 2


def test_four_values_or_four_keys():
    values = TASKS["niah_multivalue"](rng(), wish(500))
    found = needles(values.prompt)
    assert len({key for key, _ in found}) == 1
    assert sorted(value for _, value in found) == sorted(values.answers)
    key = found[0][0]
    assert values.prompt.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n"
    )
    assert values.prompt.endswith(
        f"\nWhat are all the special magic numbers for {key} mentioned in the provided text? "
        f"The special magic numbers for {key} mentioned in the provided text are"
    )
    queries = TASKS["niah_multiquery"](rng(), wish(500))
    found = needles(queries.prompt)
    (asked,) = re.findall(r"What are all the special magic numbers for (.*) mentioned in .*\?", queries.prompt)
    keys = re.fullmatch(r"(\S+), (\S+), (\S+), and (\S+)", asked).groups()
    assert len(set(keys)) == len(found) == 4
    assert tuple(dict(found)[key] for key in keys) == queries.answers


def test_needles_stand_in_any_order_and_apart():
    in_order = 0
    for seed in range(50):
        made = TASKS["niah_multiquery"](np.random.default_rng(seed), wish(300))
        in_order += tuple(value for _, value in needles(made.prompt)) == made.answers
        lines = made.prompt.splitlines()[1:-1]
        assert not any(needles(a) and needles(b) for a, b in pairwise(lines))
    assert in_order < 10  # 1 of 24 orders: 2 expected


def test_variable_tracking_prompt_word_by_word():
    # 13 words of introduction, 4 + 4 * 5 of the chain, 35 of question and answer prefix: 72 + 4 * 19 = 148.
    made = TASKS["vt"](rng(), wish(160))
    x1, x2, x3, x4, x5 = made.answers
    assert all(re.fullmatch("[A-Z]{5}", name) for name in made.answers)
    (value,) = re.findall(rf"VAR {x1} = (\d{{5}}) ", made.prompt)
    assert made.max_tokens == 30
    assert made.prompt == (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"VAR {x1} = {value} {NOISE}\n VAR {x2} = VAR {x1}  {NOISE}\n VAR {x3} = VAR {x2}  {NOISE}\n "
        f"VAR {x4} = VAR {x3}  {NOISE}\n VAR {x5} = VAR {x4} \n"
        f"Question: Find all variables that are assigned the value {value} in the text above. "
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"5 variables are assigned the value {value}, they are: "
    )


def test_variables_hop_four_times_in_order():
    made = TASKS["vt"](rng(), wish(3000))
    hops = re.findall(r"VAR ([A-Z]{5}) = (?:VAR ([A-Z]{5}) |\d{5}) ", made.prompt)
    assert hops == list(zip(made.answers, ("", *made.answers[:-1]), strict=True))


def test_frequent_words_follow_zipf():
    made = TASKS["fwe"](rng(), wish(2000))
    assert made.max_tokens == 50
    assert all(re.fullmatch("[a-z]{6}", word) for word in made.answers)
    assert made.prompt.startswith(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. "
    )
    assert made.prompt.endswith(
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:"
    )
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
    with pytest.raises(ConfigError, match="too short: 0 bytes"):
        TASKS["native"](rng(), wish(5000))
