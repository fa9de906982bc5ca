"""Colours for a terminal, but where NO_COLOR is set or the terminal has none.

click takes them out where the output is no terminal.
"""

from __future__ import annotations

import os
from typing import Any

import click


def coloured(text: str, **style: Any) -> str:
    """`text` in a style of `click.style`, such as dim=True."""
    has_colours = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return click.style(text, **style) if has_colours and text else text
