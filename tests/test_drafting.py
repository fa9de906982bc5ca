"""Guesses at what comes next."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from selfextend_gguf.drafting import PromptLookup
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.studies import prompt_lookup as study


def guess(draft: PromptLookup, text: str) -> str:
    return "".join(map(chr, draft(np.array([ord(c) for c in text], np.intc))))


def test_a_text_goes_on_as_it_did_where_its_end_occurred_last():
    assert guess(PromptLookup(), "one two, one ten, one t") == "e"
    assert guess(PromptLookup(), "one two, one ten, the") == ""
    assert guess(PromptLookup(), "") == ""
    assert guess(PromptLookup(), "abc") == ""
    assert guess(PromptLookup(), "aaaa") == "a"  # places may overlap


def test_right_guesses_become_longer():
    text = "".join(map(chr, range(300)))
    draft, told = PromptLookup(), text + text[:5]
    lengths = []
    while len(told) < len(text) + 50:
        g = guess(draft, told)
        assert text.startswith(told[len(text) :] + g)
        lengths.append(len(g))
        told += g + text[len(told) - len(text) + len(g)]  # the guess, and the token sampled after it
    assert lengths == [1, 2, 4, 8, 16, 16]


def test_wrong_guesses_become_rarer():
    draft = PromptLookup()
    assert guess(draft, "abcd;abc") == "d"
    assert guess(draft, "abcd;abcx,abc") == ""  # now four tokens must match
    assert guess(draft, "abcd;abcx,abcx,abc") == "x"
    assert guess(draft, "abcd;abcx,abcx,abcx;bcx") == ";b"  # it was right: three will do, for a longer guess


def test_a_guess_that_was_right_at_first_is_made_as_long_again():
    draft = PromptLookup()
    draft._n_guess = 8
    assert guess(draft, "abcdefghijkl, abc") == "defghijk"
    assert guess(draft, "abcdefghijkl, abcdef!, abcd") == "ef!"


def test_another_text_is_no_trouble():
    draft = PromptLookup()
    assert guess(draft, "abcd, abc") == "d"
    assert guess(draft, "xyz") == ""
    assert guess(draft, "wxyz, wxyz") == ","


def test_the_study_compares_answers_with_and_without_guesses(capsys):
    text = Path(__file__).with_name("data") / "heldout.txt"
    study.main([str(TINY_MODEL), "--text", str(text), "--tokens", "300", "--passages", "2", "-n", "12", "-t", "1"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert [len(row.split("|")) for row in rows] == [len(head.split("|"))] * 2
    for row in rows:
        assert re.findall(r"\d of 2", row) == ["2 of 2", "2 of 2"]  # these weights round alike in batches
