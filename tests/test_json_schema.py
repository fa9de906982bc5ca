"""Texts made to fit JSON schemas: the public test suite's cases, random schemas, hostile ones, and every door."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from json_schema_suite import KEPT, REFUSED
from jsonschema import Draft202012Validator

from selfextend_gguf import Llama
from selfextend_gguf.errors import ConfigError, GrammarError
from selfextend_gguf.json_schema import formats, rewriting
from selfextend_gguf.json_schema.forms import byte_vocabulary, form, matcher
from selfextend_gguf.models import TINY_MODEL

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "json-schema.md").read_text(encoding="utf-8")
END = 256
CLOSING = (*b'"]}', END)
# More by the environment: SX_SCHEMAS=2000 pytest tests/test_json_schema.py -k random
N_SCHEMAS = int(os.environ.get("SX_SCHEMAS", "60"))
N_TEXTS = 100 if "SX_SCHEMAS" in os.environ else 20


def fits(schema: Any, text: str) -> bool:
    """Whether a text may come out under a schema."""
    following = matcher(form(schema), byte_vocabulary())
    tokens = list(text.encode())
    return following.try_consume_tokens(tokens) == len(tokens) and following.is_accepting()


def random_text(following: Any, rng: random.Random, most: int = 300) -> str | None:
    """A text under a form: any byte that may follow, ends and closing signs rather than others; None if too long."""
    text = bytearray()
    while len(text) < most:
        bits = np.frombuffer(following.compute_bitmask(), np.uint8)
        assert not following.is_error(), following.get_error()
        allowed = np.flatnonzero(np.unpackbits(bits, count=257, bitorder="little")).tolist()
        closing = [token for token in allowed if token in CLOSING]
        token = rng.choice(closing if closing and rng.random() < (0.3 if len(text) < most // 2 else 0.9) else allowed)
        if token == END:
            break
        text.append(token)
        assert following.consume_token(token)
    else:
        return None
    return text.decode()  # never half of a character


def assert_random_texts_fit(schema: Any, n: int, seed: int = 0) -> int:
    """The number of texts that came to an end."""
    start, validator = matcher(form(schema), byte_vocabulary()), validator_of(schema)
    texts = [random_text(start.deep_copy(), random.Random(seed + i)) for i in range(n)]
    ended = [text for text in texts if text is not None]
    for text in ended:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # whole characters only
        assert validator.is_valid(value), text
    return len(ended)


def validator_of(schema: Any) -> Draft202012Validator:
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)


# ---- the public suite ----------------------------------------------------------------------------------------


def test_fifty_cases_of_the_suite_and_more():
    assert len(KEPT) >= 50
    assert len({case[0] for case in KEPT + REFUSED}) == len(KEPT) + len(REFUSED)


@pytest.mark.parametrize(("schema", "good", "bad"), [c[1:] for c in KEPT], ids=[c[0] for c in KEPT])
def test_kept(schema, good, bad):
    validator = validator_of(schema)
    for value in good:
        assert validator.is_valid(value)
        assert fits(schema, json.dumps(value, ensure_ascii=False)), value
    for value in bad:
        assert not validator.is_valid(value)
        assert not fits(schema, json.dumps(value, ensure_ascii=False)), value
    assert assert_random_texts_fit(schema, 20) > 0


@pytest.mark.parametrize(("schema", "message"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_refused_by_name(schema, message):
    with pytest.raises(GrammarError) as error:
        form(schema)
    assert f"the JSON schema cannot be kept {message}" in str(error.value)


# ---- random schemas ------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "foo", 'quo"te', "back\\slash", "line\nend", "é", "😀", "a/b", ""])
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 10, 17, 99, -7, 0.5, -0.5, 0.1, 1.5, 3.14, 1e-9, 123456.789, 10**12])
PATTERNS = st.sampled_from(
    [
        *("^a+$", "b", "^[A-Z]{2}\\d{3}$", "y$", "^(foo|bar)?$", "\\w+@\\w+", "^\\S+$", "\\W", "^[^\\d]+$", "^.{2,3}$"),
        *("^[^\\s\\w]$", "\\D\\d", "[\\]a-]", '"', "\\\\", "^$", "(^a)|(b$)", "\\u00e9", "[^\\W_]", "(?:ab){2}", "\\/"),
    ]
)
NAME_PATTERNS = st.sampled_from(["^x-", "^[a-f]{2}$", "^\\w+$", "^.*$", "o"])
FORMATS = st.sampled_from(["date", "date-time", "time", "uuid", "ipv4", "ipv6", "email", "hostname", "uri", "duration"])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | NAMES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)


def some_of(**keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = {"ref": "$ref"}
    return st.fixed_dictionaries({}, optional={names.get(k, k): v for k, v in keywords.items()})


def bounds(*names: str) -> dict[str, st.SearchStrategy[Any]]:
    return dict.fromkeys(names, NUMBERS)


def counts(*names: str) -> dict[str, st.SearchStrategy[Any]]:
    return {name: st.integers(0, 4) for name in names}


def of_type(name: str, keywords: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return keywords.map(lambda chosen: {"type": name} | chosen)


def composed(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    schemas = st.lists(inner, min_size=1, max_size=2)
    arrays = some_of(items=inner, prefixItems=schemas, **counts("minItems", "maxItems"))
    objects = some_of(
        properties=st.dictionaries(NAMES, inner, max_size=3),
        required=st.lists(NAMES, max_size=2, unique=True),
        additionalProperties=inner | st.booleans(),
        patternProperties=st.dictionaries(NAME_PATTERNS, inner, max_size=1),
        **counts("minProperties", "maxProperties"),
    )
    joined = some_of(allOf=schemas, anyOf=schemas, oneOf=schemas, ref=st.sampled_from(["#", "#/$defs/a"]))
    return of_type("array", arrays) | of_type("object", objects) | joined | st.tuples(joined, inner).map(beside)


def beside(schemas: tuple[dict[str, Any], Any]) -> dict[str, Any]:
    return schemas[0] | (schemas[1] if isinstance(schemas[1], dict) else {})


NUMERIC = some_of(
    **bounds("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), multipleOf=st.sampled_from([1, 2, 3, 7, 10])
)
SIMPLE = (
    st.sampled_from([True, False, {}, {"type": "null"}, {"type": "boolean"}, {"type": ["integer", "null"]}])
    | of_type("integer", NUMERIC)
    | of_type("number", NUMERIC)
    | of_type("string", some_of(pattern=PATTERNS, format=FORMATS, **counts("minLength", "maxLength")))
    | some_of(enum=st.lists(VALUES, min_size=1, max_size=3))
    | some_of(const=VALUES)
)
SCHEMAS = st.recursive(SIMPLE, composed, max_leaves=8)


@settings(max_examples=N_SCHEMAS, deadline=None)
@given(schema=SCHEMAS, definition=SCHEMAS, seed=st.integers(0, 2**16))
@example({"type": "number", "exclusiveMinimum": 1, "maximum": 1.5}, True, 0)
@example({"type": "object", "minProperties": 1}, True, 0)
@example({"type": "string", "format": "date-time"}, True, 0)
def test_random_texts_fit_random_schemas(schema, definition, seed):
    if isinstance(schema, dict):
        schema = schema | {"$defs": {"a": definition}}
    try:
        form(schema)
    except GrammarError:
        return
    try:
        assert_random_texts_fit(schema, N_TEXTS, seed)
    except (RecursionError, AssertionError) as error:
        # A reference that only leads to itself: no text comes to an end, and a validator does not either.
        if "$ref" not in json.dumps(schema) or (isinstance(error, AssertionError) and "NoExtension" not in str(error)):
            raise


# ---- single keywords -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        # Strings are JSON: no raw line break, no escape of half a character, nothing that can be spelled twice.
        ({"type": "string"}, ['"é😀/\\n\\"\\\\"'], ['"a\nb"', '"\\ud83d"', '"\\u0041"', '"\t"', '"\\x"', '"']),
        ({"enum": ["back\\slash", 'quo"te', "é"]}, ['"back\\\\slash"', '"quo\\"te"', '"é"'], ['"back\\slash"']),
        (
            {"type": "integer", "minimum": 3, "maximum": 17},
            ["3", "17", "9"],
            ["2", "18", "03", "3.0", "2048238320030142"],
        ),
        ({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, ["-0.5", "-0.1"], ["0", "-0", "-0.51", "0.1"]),
        ({"type": "number", "exclusiveMinimum": 1, "maximum": 1.5}, ["1.5", "1.01"], ["1", "1.0", "1.51"]),
        ({"type": "integer", "maximum": 2**63}, ["9007199254740991"], ["9007199254740992"]),
        ({"type": "string", "pattern": "^\\d{3}-[a-c]$"}, ['"123-b"'], ['"12-b"', '"123-d"', '"123-b "', '"٣٣٣-b"']),
        ({"type": "string", "pattern": "b"}, ['"b"', '"abc"', '"\\nb"'], ['"a"', '""']),
        ({"type": "string", "format": "date"}, ['"2024-02-29"', '"2000-02-29"'], ['"2023-02-29"', '"2100-02-29"']),
        ({"type": "string", "format": "time"}, ['"23:59:59Z"', '"01:02:03.5+01:00"'], ['"23:59:60Z"', '"24:00:00Z"']),
        ({"format": "date-time", "pattern": "^2"}, ['"2024-02-29T01:02:03Z"'], ['"1999-01-01T01:02:03Z"']),
        ({"type": "string", "format": "hostname"}, ['"a-b.example"'], ['"xn--a"', '"-a"', '"a_b"']),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ['"é😀"', '"\\"\\"\\""'], ['"😀"', '"abcd"']),
        (
            {"$ref": "#/$defs/node", "$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}}}}},
            ['{"next":{"next":{}}}'],
            [],
        ),
        # Blanks: one, or line ends and what indents the next line.
        ({"type": "array"}, ["[ 1, 2 ]", "[\n  1,\n\n\t2\n]"], ["[  1]", "[\n\n\n1]", "[1] ", " [1]"]),
        # A name with other letters is no way around a property.
        (
            {"properties": {"foo": {"type": "integer"}}},
            ['{"foo":1,"bar":"x"}'],
            ['{"\\u0066oo":"x"}', '{"x":1,"foo":1}'],
        ),
        # Engines disagree on \w in names: only such as all take come out.
        ({"patternProperties": {"^\\w+$": {"type": "null"}}}, ['{"a":null}'], ['{"é":1}', '{"a-b":1}', '{"a":1}']),
        ({"patternProperties": {"^x-": {"type": "null"}}}, ['{"x-a":null,"é":1}'], ['{"x-a":1}']),
        ({"type": "object", "required": ["a"], "minProperties": 1}, ['{"a":1}'], ["{}"]),
        (
            {
                "oneOf": [
                    {"properties": {"kind": {"const": "a"}, "x": {"type": "integer"}}, "required": ["kind", "x"]},
                    {"properties": {"kind": {"const": "b"}}, "required": ["kind"]},
                ],
                "type": "object",
            },
            ['{"kind":"a","x":1}', '{"kind":"b"}'],
            ['{"kind":"a"}', '{"kind":"c"}', "{}"],
        ),
    ],
)
def test_what_fits(schema, good, bad):
    for text in good:
        assert validator_of(schema).is_valid(json.loads(text))
        assert fits(schema, text), text
    for text in bad:
        assert not fits(schema, text), text
    assert_random_texts_fit(schema, 20)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "foo"}, "at #/type: 'foo' is none of"),
        ({"properties": {"a/b": {"items": {"not": {}}}}}, "at #/properties/a~1b/items: 'not' is not supported"),
        ({"properties": {"x": {"oneOf": [{}, True]}}}, "at #/properties/x: 'oneOf' is supported only where"),
        ({"type": "object", "properties": {"not": {"type": "foo"}}}, "at #/properties/not/type: 'foo' is none of"),
        ({"type": "array", "items": [{}]}, "at #/items: schemas of single items belong in 'prefixItems'"),
        ({"minimum": 2**60}, "at #/minimum: bounds beyond 9007199254740991"),
        ({"minimum": "1"}, "at #/minimum: it is a number, not '1'"),
        ({"minItems": 10**9}, "at #/minItems: 1000000000 is no whole number from 0 to 1000000"),
        ({"multipleOf": 0.1}, "at #/multipleOf: 0.1 is no whole number"),
        ({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "at #/allOf/1/multipleOf: divisors"),
        ({"minProperties": 2}, "at #/minProperties: more than 1"),
        ({"const": [{"a": "\x01"}]}, "at #/const/0/a: the character '\\x01' is not supported in constants"),
        ({"enum": [2**60]}, "at #/enum/0: numbers of more than 15 digits"),
        ({"enum": [0.12345678901234567]}, "at #/enum/0: numbers of more than 15 digits"),
        ({"properties": {"a": {"$id": "x"}}}, "at #/properties/a/$id: '$id' is supported in the outermost schema only"),
        ({"$ref": "#/nowhere"}, "at #: Pointer '/nowhere' does not exist"),
        ({"$ref": "#"}, "at #: no value fits it"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "at #: no value fits it: minimum (5) is greater"),
        ({"patternProperties": {"\\w": {}}, "properties": {"é": {}}}, "engines differ on whether 'é' matches"),
        ({"patternProperties": {"\\d": {}, "[0-9]": {}}}, "at #/patternProperties: two patterns are the same"),
        (5, "at #: a schema is an object, true or false, not 5"),
        ({"properties": 5}, "at #/properties: it is an object whose values are schemas"),
        ({"allOf": []}, "at #/allOf: it is a list of at least one schema"),
        ({"required": "a"}, "at #/required: it is a list of names"),
        ({"uniqueItems": True}, "'uniqueItems' is not supported"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "'not' is not supported"),
    ],
)
def test_what_is_refused(schema, message):
    with pytest.raises(GrammarError) as error:
        form(schema)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [{"const": float("nan")}, {"const": "\ud800"}, {"const": {1, 2}}, {"a": object()}])
def test_what_is_no_json(value):
    with pytest.raises(GrammarError, match="is no JSON value"):
        form(value)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(?=a)", "look-around"),
        ("(?i)a", "flags"),
        ("a(?!b)", "look-around"),
        ("\\bword", r"the escape \\b"),
        ("(a)\\1", r"the escape \\1"),
        ("\\Aa", r"the escape \\A"),
        ("a**", "quantifier after a quantifier"),
        ("a++", "quantifier after a quantifier"),
        ("*a", "without anything to repeat"),
        ("^*", "without anything to repeat"),
        ("a{,3}", "brace that is no quantifier"),
        ("a{99999}", "more than 9999 repetitions"),
        ("a{" + "9" * 5000 + "}", "brace that is no quantifier"),
        ("[]", "empty character class"),
        ("[a", "class without an end"),
        ("[z-a]", "range that is none"),
        ("[a-\\d]", "range that is none"),
        ("[\\w--a]", "range that is none"),
        ("\\ud800", "half of a character"),
        ("\\x01", "control characters"),
        ("a\\", "the escape"),
        ("(a", "unclosed group"),
    ],
)
def test_patterns_that_are_refused(pattern, problem):
    with pytest.raises(GrammarError, match=problem):
        form({"type": "string", "pattern": pattern})


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        ("^[[:alpha:]&&a]$", ["a&&a]", "[&&a]"], ["a", "&", "b&&a]"]),  # a class up to the first bracket
        ("^[a\\-z]$", ["-", "a"], ["b"]),
        ("^[\\]\\\\]$", ["]", "\\"], ["a"]),
        ("^\\<\\/\\u{1F600}\\ud83d\\ude00$", ["</😀😀"], [""]),
        ("^(?<year>\\d{4})$", ["2024"], ["20245", "٢٠٢٤"]),
        ("^a+?b{2}$", ["abb", "aabb"], ["bb", "abbb"]),
        ("^.$", ["a", "😀"], ["\n", "\u2028", "ab"]),
        ("^\\W$", ["-", " "], ["é", "a"]),
        ("^[^\\D5]$", ["4"], ["5", "٣", "a"]),
        ("^\\p{Lu}$", ["A", "É"], ["a"]),
        ("a|^$", ["", "xax"], ["b"]),
    ],
)
def test_patterns(pattern, good, bad):
    schema = {"type": "string", "pattern": pattern}
    for text in good:
        assert fits(schema, json.dumps(text, ensure_ascii=False)), text
    for text in bad:
        assert not fits(schema, json.dumps(text, ensure_ascii=False)), text


# ---- hostile schemas -----------------------------------------------------------------------------------------


def chain(n: int, schema: Any) -> dict[str, Any]:
    """Definitions that refer to one another, n times."""
    links = {f"a{i}": json.loads(json.dumps(schema).replace("NEXT", f"#/$defs/a{i + 1}")) for i in range(n)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{n}": {"type": "null"}}}


NEXT = {"$ref": "NEXT"}
LONG_PATTERNS = [{"type": "string", "pattern": f".*{c}.*x.*{c}"} for c in "abcdefghijklmnopqrstuvwxyzabcd"]
HOSTILE = {
    "references": chain(900, NEXT),
    "many references": chain(20_000, NEXT),
    "nested items": chain(480, {"items": NEXT}),
    "nested properties": chain(240, {"properties": {"x": {"anyOf": [NEXT, {"type": "null"}]}}, "required": ["x"]}),
    "doubling joints": chain(40, {"allOf": [NEXT, NEXT]}),
    "doubling properties": chain(
        40, {"properties": {"x": {"allOf": [NEXT, {"type": "object"}]}}, "additionalProperties": NEXT, "allOf": [NEXT]}
    ),
    "doubling items": chain(40, {"prefixItems": [NEXT, NEXT]}),
    "joined patterns": {"allOf": LONG_PATTERNS},
    "joined choices": {"allOf": [{"anyOf": [{"const": f"{i}{j}"} for j in range(9)]} for i in range(50)]},
    "many names": {"properties": {f"p{i}": {} for i in range(10_000)}},
    "many required": {"required": [f"p{i}" for i in range(10_000)]},
    "many patterns of names": {"patternProperties": {f"^k{i}.*x": {} for i in range(900)}},
    "large enum": {"enum": [f"value {i}" for i in range(100_000)]},
    "repetitions": {"type": "string", "pattern": "^((a{9999}){9999}){9999}$"},
    "groups": {"type": "string", "pattern": "(" * 50_000 + ")" * 50_000},
    "items": {"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}},
    "divisor": {"type": "integer", "multipleOf": 9973, "minimum": 10**12},
    "digits": {"const": 10**4000},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_taken_or_refused_within_seconds(name):
    code = (
        "import json, sys, resource; resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
        "from selfextend_gguf.errors import ConfigError, GrammarError\n"
        "from selfextend_gguf.json_schema.forms import byte_vocabulary, form, matcher\n"
        "try: following = matcher(form(json.load(sys.stdin)), byte_vocabulary())\n"
        "except GrammarError as error: sys.exit(f'refused: {error}'[:500])\n"
        "for _ in range(100):\n"
        "    mask = following.compute_bitmask()\n"
        "    byte = next(i for i in range(257) if mask[i // 8] >> i % 8 & 1)\n"
        "    if byte == 256 or not following.consume_token(byte): break\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(HOSTILE[name]), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") or done.stderr.startswith("refused: the JSON schema "), done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_schemas_nested_without_end():
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(GrammarError):
        form(schema)
    schema = {}
    schema["items"] = schema
    with pytest.raises(GrammarError, match="Circular reference"):
        form(schema)


# ---- the document --------------------------------------------------------------------------------------------


def test_the_document_names_every_keyword_and_format():
    kept, refused = DOCUMENT.split("Everything else that constrains")
    for name in (*rewriting._Rewriting()._keywords, *formats.KEPT_FORMATS, *formats.PATTERNS):
        assert f"`{name}`" in kept, name
    for name in rewriting._UNSUPPORTED:
        assert f"`{name}`" in refused, name
    assert f"{len(KEPT) + len(REFUSED)} cases" in refused
    assert f"{len(KEPT)} are kept and {len(REFUSED)} refused" in refused


# ---- doors ---------------------------------------------------------------------------------------------------

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ['Rome "R"', "Back\\slash"]},
        "days": {"type": "integer", "minimum": 3, "maximum": 17},
        "code": {"type": "string", "pattern": "^[A-Z]{2}\\d$"},
    },
    "required": ["city", "days", "code"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "", "parameters": WEATHER}}
ASK = [{"role": "user", "content": "And it came to pass"}]


@pytest.fixture(scope="module")
def llm():
    llm = Llama(str(TINY_MODEL), n_ctx=2048, verbose=False, chat_format="llama-2", seed=3)
    yield llm
    llm.close()


def streamed(chunks: Any) -> str:
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [d["tool_calls"][0]["function"]["arguments"] for d in deltas if d.get("tool_calls")]
    return "".join(calls or [d.get("content") or "" for d in deltas])


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "json_object", "schema": WEATHER}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER, "strict": True}}},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"functions": [TOOL["function"]], "function_call": {"name": "weather"}},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}, "stream": True},
        {"response_format": {"type": "json_object", "schema": WEATHER}, "stream": True},
    ],
    ids=["json_object", "json_schema", "tool", "function", "tool streamed", "streamed"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_chat_keeps_the_schema(llm, asked, temperature):
    answer = llm.create_chat_completion(ASK, temperature=temperature, **asked)
    if asked.get("stream"):
        text = streamed(answer)
    else:
        choice = answer["choices"][0]
        call = choice["message"].get("tool_calls")
        text = call[0]["function"]["arguments"] if call else choice["message"]["content"]
        assert choice["finish_reason"] == ("tool_calls" if call else "stop")
    assert validator_of(WEATHER).is_valid(json.loads(text))


def test_any_object_is_json(llm):
    for seed in range(3):
        asked = {"response_format": {"type": "json_object"}, "temperature": 1.5, "seed": seed, "max_tokens": 300}
        choice = llm.create_chat_completion(ASK, **asked)["choices"][0]
        text = choice["message"]["content"]
        assert text.startswith("{")
        assert "\n" not in text.strip('{}[]\n\t ":,') or "\\n" in text or choice["finish_reason"] == "length"
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("format_name", ["chatml-function-calling", "functionary"])
def test_chat_formats_with_converters_of_their_own(llm, format_name, monkeypatch):
    monkeypatch.setattr(llm, "chat_format", format_name)
    choice = {"type": "function", "function": {"name": "weather"}}
    if format_name == "functionary":
        answer = llm.create_chat_completion(ASK, functions=[TOOL["function"]], function_call={"name": "weather"})
    else:
        answer = llm.create_chat_completion(ASK, tools=[TOOL], tool_choice=choice)
    arguments = answer["choices"][0]["message"]["function_call"]["arguments"]
    assert validator_of(WEATHER).is_valid(json.loads(arguments))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"response_format": {"type": "json_object", "schema": {"not": {}}}}, "at #: 'not' is not supported"),
        ({"response_format": {"type": "json_object", "schema": {"const": {1}}}}, "is no JSON value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema is missing"),
        ({"response_format": {"type": "xml"}}, "must be text, json_object or json_schema"),
        ({"functions": [{"name": "f", "parameters": {"if": {}}}], "function_call": {"name": "f"}}, "'if' is not"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "f"}}, "the tool 'f' has no parameters"),
        ({"functions": 5}, "functions must be a list, not 5"),
        ({"functions": [5]}, "functions[0] must be an object with a name, not 5"),
        ({"function_call": 5}, "function_call must be none, auto or name a function, not 5"),
        ({"function_call": {"name": "f"}}, "function_call names 'f', which is not among the tools"),
        ({"tools": "f"}, "tools must be a list, not 'f'"),
        ({"tools": [5]}, "tools[0].function must be an object with a name, not 5"),
        ({"tools": [{}]}, "tools[0].function must be an object with a name, not None"),
        ({"tools": [{"function": {"name": 5}}]}, "tools[0].function must be an object with a name, not {'name': 5}"),
        ({"tools": [TOOL], "tool_choice": "x"}, "tool_choice must be none, auto, required or name a function, not 'x'"),
        ({"tools": [TOOL], "tool_choice": []}, "tool_choice must be none, auto, required or name a function, not []"),
        ({"tools": [TOOL], "tool_choice": {}}, "tool_choice must be an object with a name, not {}"),
        ({"tools": [TOOL], "tool_choice": {"function": 5}}, "tool_choice must be an object with a name, not 5"),
        (
            {"tools": [TOOL], "tool_choice": {"function": {"name": "x"}}},
            "tool_choice names 'x', which is not among the tools",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_refuses_before_it_reads(llm, asked, message, stream):
    llm.reset()
    with pytest.raises(GrammarError, match=re.escape(message)):
        llm.create_chat_completion(ASK, stream=stream, **asked)
    assert llm.n_tokens == 0


def test_arguments_by_place_are_checked_too(llm):
    with pytest.raises(GrammarError, match="functions must be a list, not 5"):
        llm.create_chat_completion(ASK, 5)
    with pytest.raises(TypeError, match="multiple values"):
        llm.create_chat_completion(ASK, None, functions=None)


def test_plain_text_is_asked_for_by_name(llm):
    asked = {"max_tokens": 4, "temperature": 0}
    plain = llm.create_chat_completion(ASK, **asked)["choices"][0]["message"]["content"]
    again = llm.create_chat_completion(ASK, response_format={"type": "text"}, **asked)
    assert again["choices"][0]["message"]["content"] == plain


def test_samplers_that_leave_no_token_end_in_an_error(llm):
    """None at all, or letters alone where a number has to come."""

    def nothing(_, scores):
        return np.full_like(scores, -np.inf)

    def letters(_, scores):
        scores = np.full_like(scores, -np.inf)
        scores[ord("a") : ord("z") + 1] = 0.0
        return scores

    for processor, error, words in (
        (
            lambda _, scores: np.full_like(scores, -np.inf),
            ConfigError,
            "the logits processors leave no token to choose",
        ),
        (letters, GrammarError, "the JSON schema allows no token here"),
    ):
        with pytest.raises(error, match=words):
            llm.create_chat_completion(
                ASK,
                response_format={"type": "json_object", "schema": {"type": "integer"}},
                logits_processor=llama_cpp.LogitsProcessorList([processor]),
                max_tokens=20,
            )


def test_llama_cpps_own_llama_and_grammars_are_as_they_were(llm):
    theirs = llama_cpp.LlamaGrammar.from_json_schema(json.dumps({"enum": ["yes", "no"]}))
    assert type(theirs) is llama_cpp.LlamaGrammar
    assert llm("And", grammar=theirs, max_tokens=9)["choices"][0]["text"].strip() in ('"yes"', '"no"')
    plain = llama_cpp.Llama(str(TINY_MODEL), n_ctx=512, verbose=False, chat_format="llama-2")
    for schema in ({"schema": {"enum": ["yes", "no"]}}, {}):
        asked = {"response_format": {"type": "json_object", **schema}, "max_tokens": 60, "temperature": 0}
        answer = plain.create_chat_completion(ASK, **asked)["choices"][0]["message"]["content"]
        assert answer.strip() in ('"yes"', '"no"') if schema else answer.startswith("{")
    plain.close()
