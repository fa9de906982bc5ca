"""The clipboard of the system, or of a terminal that may be on another one."""

from __future__ import annotations

import base64
import sys

import pyperclip

from selfextend_gguf.errors import ConversationError


def copy(text: str) -> str:
    """Copy a text; where to, in words. Raises ConversationError where there is no clipboard."""
    try:
        pyperclip.copy(text)
    except (pyperclip.PyperclipException, OSError) as error:
        if not sys.stderr.isatty():
            raise ConversationError("there is no clipboard: this is no terminal, and no xclip or wl-copy") from error
        # OSC 52. Terminals do not say whether they take it.
        sys.stderr.write(f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\a")
        sys.stderr.flush()
        return "the terminal's clipboard, if it lets programs do that"
    return "the clipboard"
