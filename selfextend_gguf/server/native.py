"""llama.cpp's own endpoint for completions, `/completion`, as its server's older clients use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator

from selfextend_gguf.checks import shown
from selfextend_gguf.server.answering import Said
from selfextend_gguf.server.forms import Choice, Form, event, timings_of
from selfextend_gguf.server.jobs import Job
from selfextend_gguf.server.logprobs import Chosen, Likely
from selfextend_gguf.server.requests import UNLIMITED, CompletionRequest


class NativeRequest(CompletionRequest):
    """A body of /completion. Raises pydantic's ValidationError."""

    prompt: Any  # what `_one_kind_of_prompts` makes of it
    max_tokens: int | None = Field(UNLIMITED, ge=UNLIMITED)
    n_probs: int = Field(0, ge=0, le=100)
    return_tokens: bool = False
    response_fields: list[str] = Field(default_factory=list)
    post_sampling_probs: bool = False

    @model_validator(mode="before")
    @classmethod
    def _pairs_are_biases(cls, values: Any) -> Any:
        """`[[token, bias], ...]`, where a token may be a text and false forbids it."""
        if isinstance(values, dict) and isinstance(values.get("logit_bias"), list):
            pairs = values["logit_bias"]
            if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
                raise ValueError("logit_bias: give pairs of a token, or a text, and a number")
            values = {**values, "logit_bias": {str(key): -100.0 if bias is False else bias for key, bias in pairs}}
        return values

    @model_validator(mode="after")
    def _one_kind_of_prompts(self) -> NativeRequest:
        if self.post_sampling_probs and self.n_probs:
            raise ValueError("post_sampling_probs is not supported: probabilities are the model's, before any sampler")
        if self.n_probs:
            self.logprobs = self.n_probs
        whole = self.prompt
        parts = isinstance(whole, list) and any(isinstance(part, int) for part in whole)
        prompts = whole if isinstance(whole, list) and not parts else [whole]
        self.prompt = [_prompt(prompt) for prompt in prompts]
        return self

    @property
    def prompts(self) -> list[Any]:
        """All prompts, as texts or as lists of tokens and texts."""
        return self.prompt  # type: ignore[no-any-return]

    @property
    def may_be_empty(self) -> bool:
        """Whether an answer of no tokens makes sense: the prompt is read, and known from then on."""
        return True

    @property
    def biases_texts(self) -> bool:
        """Whether a key of `logit_bias` that is no number is a text."""
        return True


def _prompt(prompt: Any) -> str | list[int | str]:
    if isinstance(prompt, Mapping):
        if prompt.get("multimodal_data"):
            raise ValueError("prompt: answers are to texts, not to images or sounds")
        prompt = prompt.get("prompt_string")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(part) in (int, str) for part in prompt):
        return list(prompt)
    raise ValueError(f"prompt: a text, or a list of tokens and texts, not {shown(prompt)}")


class NativeForm(Form):
    """Answers as llama.cpp's server gives them."""

    def __init__(self, job: Job, body: NativeRequest, prompts: list[str]) -> None:
        """`prompts`: as texts."""
        super().__init__(job)
        self._body = body
        self._prompts = prompts

    def whole(self) -> dict[str, Any] | list[dict[str, Any]]:  # type: ignore[override]
        """One answer, or a list of several."""
        answers = [self._whole(index, choice) for index, choice in enumerate(self._choices)]
        return answers[0] if len(answers) == 1 else answers

    def tell(self, said: Said) -> Iterator[str]:
        """What is said, as chunks."""
        choice = self.take(said)
        if said.text or said.tokens:
            part = self._part(said.index, choice, said.text, said.tokens)
            yield event({**part, "tokens": [token.id for token in said.tokens], "stop": False})
        if said.finish_reason is not None:
            end = {**self._whole(said.index, choice), "content": "", "tokens": []}
            end.pop("completion_probabilities", None)
            yield event(self._chosen_fields(end))

    def end(self) -> Iterator[str]:
        """Nothing: the last answer says that it is one."""
        yield from ()

    def _part(self, index: int, choice: Choice, text: str, tokens: list[Chosen]) -> dict[str, Any]:
        part: dict[str, Any] = {
            "index": index,
            "content": text,
            "tokens": [token.id for token in tokens] if self._body.return_tokens else [],
            "id_slot": 0,
            "tokens_predicted": choice.n_answer,
            "tokens_evaluated": choice.timings.prompt_tokens,
        }
        if self._body.n_probs:
            part["completion_probabilities"] = [_probabilities(token) for token in tokens]
        return part

    def _whole(self, index: int, choice: Choice) -> dict[str, Any]:
        prompt = self._prompts[index // self._job.n]
        text = (prompt if self._body.echo else "") + choice.text
        stops = self._body.stops
        ended = choice.timings.generated_tokens > choice.n_answer  # by a token that is no part of the answer
        kind = "limit" if choice.finish_reason == "length" else "eos" if ended else "word"
        whole = {
            **self._part(index, choice, text, choice.tokens),
            "stop": True,
            "model": self._job.alias,
            "generation_settings": self._settings(index),
            "prompt": prompt,
            "has_new_line": "\n" in choice.text,
            "truncated": False,
            "stop_type": kind,
            "stopping_word": stops[0] if kind == "word" and len(stops) == 1 else "",  # of several it is not known
            "tokens_cached": choice.timings.prompt_tokens + choice.n_answer,
            "timings": timings_of(choice.timings),
        }
        return self._chosen_fields(whole)

    def _chosen_fields(self, whole: dict[str, Any]) -> dict[str, Any]:
        """Of an answer, those that are asked for; "a/b" is b in a."""
        if not self._body.response_fields:
            return whole
        chosen = {}
        for name in self._body.response_fields:
            value: Any = whole
            for key in name.split("/"):
                value = value.get(key) if isinstance(value, dict) else None
            chosen[name] = value
        return chosen

    def _settings(self, index: int) -> dict[str, Any]:
        sampling = {name: value for name, value in self._job.sampling.items() if isinstance(value, int | float)}
        return {
            **sampling,
            "seed": (self._job.seed + index) % 2**32,
            "n_predict": self._job.longest,
            "max_tokens": self._job.longest,
            "stop": self._body.stops,
            "stream": self._body.stream,
            "n_probs": self._body.n_probs,
            "ignore_eos": self._body.ignore_eos,
            "grammar": self._body.grammar or "",
        }


def _probabilities(token: Chosen) -> dict[str, Any]:
    top = [_likely(one) for one in token.top]
    return {**(_likely(token.likely) if token.likely is not None else {}), "top_logprobs": top}


def _likely(one: Likely) -> dict[str, Any]:
    return {"id": one.id, "token": one.text, "bytes": list(one.spelled), "logprob": one.logprob}
