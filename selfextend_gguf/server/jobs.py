"""What a request asks for, checked against the model before it waits for its turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from llama_cpp.llama_grammar import LlamaGrammar

from selfextend_gguf.chat_schemas import SchemaGrammar, any_call, called_tool, wanted_schemas
from selfextend_gguf.checks import check_all
from selfextend_gguf.errors import ConfigError, ContextFullError, GrammarError
from selfextend_gguf.grammar import check_grammar
from selfextend_gguf.handles import check_tokens
from selfextend_gguf.json_schema.forms import form
from selfextend_gguf.more_samplers import MoreSamplers
from selfextend_gguf.prompt import Prompt
from selfextend_gguf.reasoning import OFF, end_of_open_thought
from selfextend_gguf.sampling import COMPLETION, Processor, Scores, end_tokens
from selfextend_gguf.server.messages import render
from selfextend_gguf.server.models import ServedModel
from selfextend_gguf.server.requests import ChatRequest, CompletionRequest, Request
from selfextend_gguf.templates import check_variables
from selfextend_gguf.tokenizer import Tokenizer, restore
from selfextend_gguf.tool_calls.families import GENERIC
from selfextend_gguf.tool_calls.reading import ArgumentsReader, CallReader, Reader, TextReader


@dataclass(frozen=True)
class Job:
    """Prompts and how to answer them."""

    alias: str  #: the model's
    prompts: list[Prompt]
    n: int  #: answers to each prompt
    longest: int  #: tokens of an answer; -1 = as many as the context has room for
    least: int  #: tokens of an answer
    seed: int  #: of the first answer; each has its own
    sampling: dict[str, Any]  #: further arguments of `Llama.create_completion`
    more_samplers: MoreSamplers
    ends: list[int]  #: tokens that end an answer
    schema: Any = None  #: JSON schema that an answer fits
    grammar: str | None = None
    n_top: int | None = None  #: likeliest tokens to note at each place; None = no probabilities at all
    tells_thoughts: bool = False  #: whether thoughts are told from the answer
    reader: Callable[[], Reader] = TextReader  #: of each answer, that tells calls from text
    spelled: Sequence[str] = ()  #: texts whose control tokens are spelled in the answer
    scored_from: Sequence[int] = ()  #: where in each prompt the tokens begin whose probabilities are told; empty = none

    def answers(self) -> Iterator[tuple[Prompt, dict[str, Any]]]:
        """Prompt and sampling of each answer, one after the other."""
        for number in range(len(self.prompts) * self.n):
            prompt = self.prompts[number // self.n]
            sampling = {**self.sampling, "seed": (self.seed + number) % 2**32, "max_tokens": self.longest or 1}
            if self.schema is not None:
                sampling["grammar"] = SchemaGrammar(json.dumps(self.schema))
            elif self.grammar is not None:
                sampling["grammar"] = LlamaGrammar.from_string(self.grammar)
            if self.least:
                sampling["logits_processor"] = [_at_least(len(prompt.tokens) + self.least, self.ends)]
            yield prompt, sampling


def _at_least(n_tokens: int, ends: Sequence[int]) -> Processor:
    """A processor that lets no text end before it has so many tokens."""

    def process(tokens: Any, scores: Scores) -> Scores:
        if len(tokens) >= n_tokens:
            return scores
        scores = scores.copy()
        scores[ends] = -np.inf
        return scores

    return process


def completion_job(body: CompletionRequest, model: ServedModel) -> Job:
    """Raises ContextFullError, GrammarError, ConfigError, TextError."""
    tokenizer, n_vocab = model.info.tokenizer, model.info.model.n_vocab()
    # Special tokens are recognised, since whoever needs a template writes it here.
    prompts = [
        tokenizer.tokens(prompt, special=True)
        if isinstance(prompt, str)
        else check_tokens(_joined(prompt, tokenizer), n_vocab)
        for prompt in body.prompts
    ]
    job = _job(body, model, [Prompt(tokens, body.stops) for tokens in prompts], n_top=body.logprobs)
    if body.echo and body.logprobs is not None:
        begins = [_begin_of(prompt, tokens, model) for prompt, tokens in zip(body.prompts, prompts, strict=True)]
        job = replace(job, scored_from=begins)
    if body.json_schema is not None:
        if body.grammar is not None:
            raise GrammarError("only one of grammar and json_schema can give the form of the answer")
        form(body.json_schema)
        job = replace(job, schema=body.json_schema)
    return _checked(job, model)


def _joined(prompt: Sequence[int | str], tokenizer: Tokenizer) -> list[int]:
    """Tokens of a prompt that is made of tokens and texts."""
    tokens: list[int] = []
    for part in prompt:
        if isinstance(part, str):
            tokens += tokenizer.tokens(part, special=True, begins=not tokens)
        else:
            tokens.append(part)
    return tokens


def _begin_of(prompt: object, tokens: Sequence[int], model: ServedModel) -> int:
    """Where what was given as a prompt begins in its tokens: after a BOS that was put before a text."""
    if not isinstance(prompt, str) or list(tokens[:1]) != [model.info.model.token_bos()]:
        return 0
    bos = model.info.tokenizer.detokenize(tokens[:1], special=True)
    return int(not prompt.encode().startswith(bos))


def chat_job(body: ChatRequest, model: ServedModel) -> Job:
    """Raises ContextFullError, GrammarError, ConfigError, TextError."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
    called, calls_any = tool_to_call(body), calls_any_tool(body)
    schemas = wanted_schemas(
        response_format=body.response_format,
        tools=tools,
        tool_choice=tools[0] if body.tool_choice == "required" and called else body.tool_choice,
        functions=None,
        function_call=None,
    )
    if calls_any:
        schemas.append(any_call([tool["function"] for tool in tools], many=bool(body.parallel_tool_calls)))
    if len(schemas) + (body.grammar is not None) > 1:
        raise GrammarError("only one of grammar, response_format and a tool to call can give the form of the answer")
    for schema in schemas:
        form(schema)
    is_free = not schemas and body.grammar is None
    prompt = chat_prompt(body, model)
    job = _job(body, model, [prompt], n_top=body.top_logprobs if body.logprobs else None)
    job = replace(job, schema=schemas[0] if schemas else None, tells_thoughts=is_free)
    parameters = {tool.function.name: tool.function.parameters for tool in body.tools}
    calls = model.call_format if is_free and tools and body.tool_choice in (None, "auto") else None
    if called is not None:
        job = replace(job, reader=lambda: ArgumentsReader(called))
    elif calls_any:
        job = replace(job, reader=lambda: CallReader(GENERIC, parameters))
    elif calls is not None:
        at_most_one = body.parallel_tool_calls is False
        job = replace(job, reader=lambda: CallReader(calls, parameters, at_most_one=at_most_one), spelled=calls.marks)
    return _checked(job, model)


def tool_to_call(body: ChatRequest) -> str | None:
    """Name of the tool that the answer calls; None if it may be another, or none. Raises GrammarError."""
    if body.tool_choice == "required":
        return None if calls_any_tool(body) else body.tools[0].function.name
    return called_tool(body.tool_choice, None)


def calls_any_tool(body: ChatRequest) -> bool:
    """Whether the answer is a call of any of the tools, or several."""
    return body.tool_choice == "required" and (len(body.tools) > 1 or bool(body.parallel_tool_calls))


def chat_text(body: ChatRequest, model: ServedModel) -> str:
    """The messages in the model's chat template. Raises ConfigError, TextError."""
    return _rendered(body, model, lambda value: (value, {}))[0]


def chat_prompt(body: ChatRequest, model: ServedModel) -> Prompt:
    """The tokens of the messages in the model's chat template. Raises ConfigError, TextError."""
    text, marks, stop = _rendered(body, model, model.info.tokenizer.mark)
    tokens = model.info.tokenizer.tokens(text, special=True, marks=marks)
    return Prompt(tokens, [*stop, *body.stops], end_of_open_thought(restore(text, marks)))


def _rendered(
    body: ChatRequest, model: ServedModel, mark: Callable[[Any], tuple[Any, Any]]
) -> tuple[str, Any, list[str]]:
    """The text of a conversation, its marks and the strings that end an answer."""
    template = model.template
    if template is None:
        raise ConfigError(f"the model {model.alias!r} has no chat template; use /v1/completions")
    may_call = tool_to_call(body) is None and body.tool_choice != "required"
    tools = [] if body.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in body.tools]
    if tools and may_call and "tools" not in (model.info.chat_template or ""):
        raise ConfigError(
            f"the chat template of {model.alias!r} tells the model nothing of tools; name one in tool_choice"
        )
    variables = {
        **(OFF if body.reasoning_effort == "none" else {}),
        "reasoning_effort": body.reasoning_effort,
        **check_variables(body.chat_template_kwargs),
        "tools": tools or None,
        "functions": [tool["function"] for tool in tools] if body.functions and tools else None,
        "tool_choice": body.tool_choice if tools else None,
        "add_generation_prompt": False if body.add_generation_prompt is False and not body.continues else None,
    }
    messages, begun = body.messages, ""
    if body.continues:
        messages, begun = messages[:-1], messages[-1].content

    def render_marked(plain: list[dict[str, Any]]) -> tuple[str, Any, list[str]]:
        marked, marks = mark({"messages": plain, "begun": begun, **variables})
        begun_marked = marked.pop("begun")
        rendered = template(**marked)
        text = rendered.prompt
        thought = end_of_open_thought(text)
        if begun and thought is not None:
            text += f"\n{thought}\n\n"  # what was begun is the answer
        stop = rendered.stop if isinstance(rendered.stop, list) else [rendered.stop or ""]
        return text + begun_marked, marks, [s for s in stop if s]

    return render(messages, render_marked)


def _job(body: Request, model: ServedModel, prompts: list[Prompt], *, n_top: int | None) -> Job:
    sampling = body.sampling()
    seed = body.first_seed()
    check_all(COMPLETION, {**sampling, "seed": seed})
    ends = end_tokens(model.info.model)
    bias = _bias(body, model)
    if body.ignore_eos:
        bias |= dict.fromkeys(ends, -np.inf)
    return Job(
        alias=model.alias,
        prompts=prompts,
        n=body.n,
        longest=body.longest,
        least=body.min_tokens,
        seed=seed,
        sampling=sampling | ({"logit_bias": bias} if bias else {}),
        more_samplers=body.more_samplers(),
        ends=ends,
        grammar=body.grammar,
        n_top=n_top,
    )


def _bias(body: Request, model: ServedModel) -> dict[int, float]:
    """The bias of tokens. Raises ConfigError for what are none."""
    n_vocab = model.info.model.n_vocab()
    bias: dict[int, float] = {}
    for token, value in body.logit_bias.items():
        is_number = token.isascii() and token.isdigit()
        if body.logit_bias_type == "tokens" or (body.biases_texts and not is_number):
            bias |= dict.fromkeys(model.info.tokenizer.tokens(token, special=True, begins=False), value)
        elif is_number and int(token) < n_vocab:
            bias[int(token)] = value
        else:
            raise ConfigError(f"logit_bias has {token!r}, which is no token of the model (0 to {n_vocab - 1})")
    return bias


def _checked(job: Job, model: ServedModel) -> Job:
    """The job, if it can be done. Raises ContextFullError, GrammarError, ConfigError."""
    if job.grammar is not None:
        check_grammar(model.info.model.vocab, job.grammar)
    if job.least and (job.schema is not None or job.grammar is not None):
        raise GrammarError("min_tokens cannot be combined with a grammar, which alone says where an answer may end")
    if not job.prompts or not all(prompt.tokens for prompt in job.prompts):
        raise ConfigError("the prompt is empty")
    n_prompt, n_answer = max(len(prompt.tokens) for prompt in job.prompts), max(job.longest, 1)
    if n_prompt + n_answer > model.n_ctx:
        raise ContextFullError(
            f"this model's maximum context length is {model.n_ctx} tokens, however you requested {n_prompt + n_answer} "
            f"({n_prompt} in the prompt, {n_answer} for the completion); reduce the prompt or max_tokens"
        )
    return job
