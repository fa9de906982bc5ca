"""What models think before they answer: the tags around it, in texts that come in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["answer", "thought", "tag"]  #: of a part of a text; "tag" with the blank space around tags


@dataclass(frozen=True)
class Tags:
    """The tags of a family of models."""

    begin: str
    end: str
    others: tuple[str, ...] = ()  # that may stand between thoughts and the answer


FAMILIES = (
    Tags("<think>", "</think>"),  # DeepSeek, Qwen, GLM, MiniMax, Nemotron, SmolLM3 and most others
    Tags("<thinking>", "</thinking>"),  # Apriel 1.5
    Tags("<seed:think>", "</seed:think>"),  # Seed-OSS
    Tags("<mm:think>", "</mm:think>"),  # MiniMax M3
    Tags("<think:opensource>", "</think:opensource>"),  # Hy3
    Tags("[THINK]", "[/THINK]"),  # Mistral
    Tags("<|START_THINKING|>", "<|END_THINKING|>", ("<|START_RESPONSE|>", "<|START_TEXT|>")),  # Command
    Tags("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    Tags("<|channel>thought\n", "<channel|>"),  # Gemma 4
    Tags("<|channel|>analysis<|message|>", "<|end|>", ("<|start|>assistant", "<|channel|>final<|message|>")),  # gpt-oss
    Tags("<|think|>", "<|end|>", ("<|begin|>assistant", "<|content|>")),  # Solar
    Tags("Here are my reasoning steps:\n", "[BEGIN FINAL RESPONSE]"),  # Apriel 1.6
)
_END_OF = {tags.begin: tags.end for tags in FAMILIES}
_BEFORE_ANSWERS = (*_END_OF, *(other for tags in FAMILIES for other in tags.others))

# Variables with which templates switch thinking off and on; each family has its own, and ignores the others.
_SWITCHES: dict[str, tuple[object, object]] = {
    "enable_thinking": (False, True),
    "thinking": (False, True),  # DeepSeek, Kimi, Granite
    "reasoning": (False, True),  # Command A
    "thinking_budget": (0, -1),  # Seed-OSS
    "thinking_mode": ("disabled", "enabled"),  # MiniMax M3
}
OFF = {name: off for name, (off, _) in _SWITCHES.items()}
ON = {name: on for name, (_, on) in _SWITCHES.items()}


def end_of_open_thought(prompt: str) -> str | None:
    """The tag that will end a thought which the prompt itself begins, as many templates do; None if it begins none."""
    prompt = prompt.rstrip()
    return next((tags.end for tags in FAMILIES if prompt.endswith(tags.begin.rstrip())), None)


def speaks_of_thoughts(template: str) -> bool:
    """Whether a chat template is for a model that thinks."""
    return any(tags.begin.rstrip() in template for tags in FAMILIES)


class Splitter:
    """Splits a text that comes in pieces into parts of one kind; joined they are the text, however it was cut.

    Thoughts come before the answer: a tag within it, such as in an explanation of tags, is part of it.
    """

    def __init__(self, end: str | None = None) -> None:
        """`end`: the tag that ends the thought with which the text begins; None if it begins with none."""
        self._end = end
        self._held = ""  # what may be the beginning of a tag
        self._has_tags = end is not None
        self._answers = False

    @property
    def kind(self) -> Kind:
        """Of what would come next: "thought" within one, "answer" else."""
        return "answer" if self._end is None else "thought"

    def feed(self, piece: str) -> Iterator[tuple[Kind, str]]:
        """Parts whose kind is known when `piece` has come."""
        self._held += piece
        while self._held:
            found = self._next()
            if found is None:
                return
            kind, length = found
            text, self._held = self._held[:length], self._held[length:]
            if text:
                yield kind, text

    def finish(self) -> Iterator[tuple[Kind, str]]:
        """The rest, when no more comes."""
        rest, self._held = self._held, ""
        if self._end is not None:
            parts: list[tuple[Kind, str]] = [("thought", rest)]
        else:
            blank = len(rest) - len(rest.lstrip())
            parts = [(self._kind_of_blank, rest[:blank]), ("answer", rest[blank:])]
        yield from ((kind, text) for kind, text in parts if text)

    @property
    def _kind_of_blank(self) -> Kind:
        """Of blank space before the answer."""
        return "tag" if self._has_tags else "answer"

    def _next(self) -> tuple[Kind, int] | None:
        """Kind and length of the next part of what is held; None if more must come to know."""
        if self._answers:
            return "answer", len(self._held)
        if self._end is not None:
            return self._in_thought(self._end)
        text = self._held.lstrip()
        blank = len(self._held) - len(text)
        tag = next((tag for tag in _BEFORE_ANSWERS if text.startswith(tag)), None)
        if tag is not None:
            self._end, self._has_tags = _END_OF.get(tag), True
            return "tag", blank + len(tag)
        if any(tag.startswith(text) for tag in _BEFORE_ANSWERS):
            return None
        self._answers = True
        return self._kind_of_blank, blank

    def _in_thought(self, end: str) -> tuple[Kind, int] | None:
        if self._held.startswith(end):
            self._end = None
            return "tag", len(end)
        at = self._held.find(end)
        if at < 0:
            longest = min(len(self._held), len(end) - 1)
            begun = next((n for n in range(longest, 0, -1) if self._held.endswith(end[:n])), 0)
            at = len(self._held) - begun
        return ("thought", at) if at else None


class Whole(Splitter):
    """Takes a text for an answer, whatever it begins with."""

    def __init__(self) -> None:
        super().__init__()
        self._answers = True
