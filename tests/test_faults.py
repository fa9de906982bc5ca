"""What docs/robustness.md says of faults is what happens."""

from __future__ import annotations

import pytest
from faults import DOCUMENT, Fault, NotPossibleError, faults, outcome, row

LINES = DOCUMENT.read_text(encoding="utf-8").splitlines(keepends=True)


@pytest.mark.parametrize("fault", faults(n_sharing=6), ids=lambda fault: fault.name)
def test_what_is_seen_and_what_is_kept(fault: Fault):
    try:
        what = outcome(fault)
    except NotPossibleError as error:
        pytest.skip(str(error))
    assert row(fault, what) in LINES
