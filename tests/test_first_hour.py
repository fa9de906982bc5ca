"""docs/first-hour.md says what comes of its commands."""

from __future__ import annotations

import os
import re
from pathlib import Path

import first_hour
import pytest

DOCUMENT = first_hour.DOCUMENT.read_text(encoding="utf-8")


def told() -> list[tuple[str, str]]:
    """Commands of the document and what it says comes of them, in their order."""
    found = []
    for block in re.finditer(r"```sh\n(.*?)\n```\n(?:\n```\n(.*?)\n```\n)?", DOCUMENT, re.DOTALL):
        found.append((block[1], block[2] or ""))
    return found[1:]  # the first one installs


def test_the_document_has_the_commands_that_are_typed():
    assert [command for command, _ in told()] == [step.command for step in first_hour.STEPS]
    assert first_hour.write([outcome for _, outcome in told()]) == DOCUMENT
    assert not re.search(r"/home/|/tmp/|Traceback", DOCUMENT)


@pytest.mark.real
@pytest.mark.skipif(not os.environ.get("SX_GGUF_TEST_HOUR"), reason="SX_GGUF_TEST_HOUR names no folder, see first_hour")
def test_the_commands_do_what_the_document_says():
    """Numbers aside, and what a model writes."""
    with first_hour.fresh_home(Path(os.environ["SX_GGUF_TEST_HOUR"])) as (home, environment):
        for step, (_, said) in zip(first_hour.STEPS, told(), strict=True):
            outcome = first_hour.outcome(step, home, environment)
            assert "Traceback" not in outcome
            if step.is_answer:
                assert outcome and not outcome.startswith("Error")
            else:
                assert first_hour.masked(outcome) == first_hour.masked(said)
