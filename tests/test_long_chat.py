"""A short one of the long chats."""

from __future__ import annotations

import long_chat
import pytest


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_the_last_answer_is_that_of_a_fresh_reading(kind):
    with pytest.raises(SystemExit) as end:
        long_chat.main(["--turns", "40", "--type", kind])
    assert not end.value.code
