"""The messages of a chat in a file of the user's, after every turn: what ends the program does not end them."""

from __future__ import annotations

from platformdirs import user_state_path

from selfextend_gguf.conversation import Conversation


class LastChat:
    """Where the running chat is kept, and the one before it."""

    def __init__(self, *, keeps: bool) -> None:
        """Not `keeps`: nothing is written, and the one before is the last that was. Raises OSError."""
        self._file = user_state_path("sx-gguf") / "last-chat.json"
        self._keeps = keeps
        self._kept: list[object] = []
        self.before = self._file.with_name("chat-before.json") if keeps else self._file
        if keeps:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            if self._file.exists():
                self._file.replace(self.before)

    def keep(self, conversation: Conversation) -> None:
        """Write the messages, if there are others than before. Raises OSError."""
        state: list[object] = [conversation.system, *conversation.messages]
        if self._keeps and state != self._kept and (conversation.messages or self._kept):
            conversation.save(self._file)
            self._kept = state
