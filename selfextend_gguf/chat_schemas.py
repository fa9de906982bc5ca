"""The JSON schemas that chats ask for, and how they come through llama_cpp's chat formats."""

from __future__ import annotations

import functools
import json
import types
from typing import Any

from llama_cpp import llama_chat_format
from llama_cpp.llama_grammar import JSON_GBNF, LlamaGrammar, json_schema_to_gbnf

from selfextend_gguf.checks import shown
from selfextend_gguf.errors import GrammarError

_ANY_OBJECT = {"type": "object"}


def json_format(response_format: Any) -> dict[str, Any] | None:
    """A `response_format` of OpenAI's API as llama_cpp knows it; None for plain text. Raises GrammarError."""
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return dict(response_format)
    if kind != "json_schema":
        raise GrammarError("response_format.type must be text, json_object or json_schema")
    wanted = response_format.get("json_schema")
    if not isinstance(wanted, dict) or "schema" not in wanted:
        raise GrammarError("response_format.json_schema.schema is missing")
    return {"type": "json_object", "schema": wanted["schema"]}


def _named(what: str, value: Any) -> dict[str, Any]:
    """A description of a function, which has a name. Raises GrammarError."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise GrammarError(f"{what} must be an object with a name, not {shown(value)}")
    return value


def _listed(what: str, values: Any) -> list[Any]:
    if values is not None and not isinstance(values, (list, tuple)):
        raise GrammarError(f"{what} must be a list, not {shown(values)}")
    return list(values or [])


def _known_tools(tools: Any, functions: Any) -> list[dict[str, Any]]:
    """Names, descriptions and parameters of what may be called."""
    inner = [tool.get("function") if isinstance(tool, dict) else tool for tool in _listed("tools", tools)]
    return [
        *(_named(f"tools[{i}].function", function) for i, function in enumerate(inner)),
        *(_named(f"functions[{i}]", function) for i, function in enumerate(_listed("functions", functions))),
    ]


def _chosen(what: str, choice: Any, words: tuple[str, ...]) -> str | None:
    if isinstance(choice, dict):
        return str(_named(what, choice.get("function", choice))["name"])
    if choice is not None and choice not in words:
        raise GrammarError(f"{what} must be {', '.join(words)} or name a function, not {shown(choice)}")
    return None


def called_tool(tool_choice: Any, function_call: Any) -> str | None:
    """Name of the tool that must be called; `function_call` goes before `tool_choice`, as in llama_cpp."""
    tool = _chosen("tool_choice", tool_choice, ("none", "auto", "required"))
    function = _chosen("function_call", function_call, ("none", "auto"))
    return tool if function_call is None else function


def wanted_schemas(
    *, response_format: Any, tools: Any, tool_choice: Any, functions: Any, function_call: Any
) -> list[Any]:
    """The schemas that an answer has to fit: of the response format, of a tool that must be called.

    Raises GrammarError for tools and choices of another shape than OpenAI's, for a choice that is not among the tools,
    and for a chosen one without parameters.
    """
    schemas = []
    if isinstance(response_format, dict) and response_format["type"] == "json_object":
        schemas.append(response_format.get("schema", _ANY_OBJECT))
    known = _known_tools(tools, functions)
    name = called_tool(tool_choice, function_call)
    if name is not None:
        tool = next((function for function in known if function["name"] == name), None)
        if tool is None:
            chooser = "tool_choice" if function_call is None else "function_call"
            raise GrammarError(f"{chooser} names {name!r}, which is not among the tools")
        if "parameters" not in tool:
            raise GrammarError(f"the tool {name!r} has no parameters")
        schemas.append(tool["parameters"])
    return schemas


def any_call(functions: list[dict[str, Any]], *, many: bool) -> dict[str, Any]:
    """The schema of a call of any of the functions, or of a list of such calls."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": function["parameters"]},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1} if many else {"anyOf": calls}


class _Schema(str):
    """A JSON schema where llama_cpp has the text of a grammar."""


class SchemaGrammar(LlamaGrammar):
    """A JSON schema where llama_cpp has a grammar; our `Llama` keeps to the schema itself."""

    def __init__(self, schema: str) -> None:
        self.schema = schema  # JSON
        self._root = "root"

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> SchemaGrammar:
        """A grammar for any schema: whether it can be kept is seen when it is used."""
        return cls(json_schema)

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> LlamaGrammar:
        """As llama_cpp's, if it is the text of a grammar."""
        return cls(grammar) if isinstance(grammar, _Schema) else LlamaGrammar.from_string(grammar, verbose)

    @functools.cached_property
    def _grammar(self) -> str:  # type: ignore[override]
        """The grammar that llama_cpp would have made, for its own `Llama`."""
        try:
            return str(JSON_GBNF if isinstance(self.schema, _Schema) else json_schema_to_gbnf(self.schema))
        except Exception:  # as its chat formats do
            return str(JSON_GBNF)


# llama_cpp's converter leaves out what it does not know of a schema, and its strings break lines. Its chat formats find
# schemas in place of grammars here, so that it is only asked where llama_cpp's own `Llama` is to follow them.
_grammars = types.SimpleNamespace(
    LlamaGrammar=SchemaGrammar, JSON_GBNF=_Schema(json.dumps(_ANY_OBJECT)), json_schema_to_gbnf=_Schema
)
setattr(llama_chat_format, "llama_grammar", _grammars)  # noqa: B010  # mypy: the name is not exported
