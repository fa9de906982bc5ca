"""JSON schemas rewritten to such as llguidance keeps.

What llguidance takes, it keeps, with a few exceptions, which this is for. The rewritten schema asks for the same or for
less. What cannot be kept is refused, with the keyword and its place in the schema.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, NoReturn
from urllib.parse import unquote

from selfextend_gguf.errors import GrammarError
from selfextend_gguf.json_schema.formats import KEPT_FORMATS, PATTERNS
from selfextend_gguf.json_schema.patterns import is_one_to_all, is_writable, translated

# llguidance compiles by recursion, through references as well: some thousands of schemas overflow a thread's stack.
MOST_SCHEMAS = 1000
_DEEPEST = 100
# The time to join patterns doubles with each; few are joined unless there are many of them and many joints.
_MOST_JOINED = 8
_MOST_WRITTEN_OUT = 20_000
_MOST_NAME_PATTERNS = 32  # compared with each other and with all names
_MOST_REPEATED = 10**6  # more than any context holds
_LARGEST_DIVISOR = 10_000  # a state of the matcher each
# llguidance reads numbers of so many digits exactly, and all these whole numbers.
_DIGITS = 15
_LARGEST = 2**53 - 1

_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_APPLICATORS = ("const", "enum", "$ref", "allOf", "anyOf", "oneOf")
_UNSUPPORTED = (
    *("additionalItems", "contains", "dependencies", "dependentRequired", "dependentSchemas", "$dynamicRef", "else"),
    *("if", "maxContains", "minContains", "not", "propertyNames", "$recursiveRef", "then"),
    *("unevaluatedItems", "unevaluatedProperties"),
)


def rewritten(schema: Any) -> Any:
    """A schema for llguidance. Raises GrammarError for what cannot be kept, or would take too long."""
    rewriting = _Rewriting()
    root = rewriting.schema(schema, "#", 0)
    sizes = _Sizes(root, rewriting.anchored)
    try:
        joints = [sizes.of(joint) for joint in rewriting.joints]
    except RecursionError as error:
        raise GrammarError("the JSON schema joins schemas that refer to others in too long a row") from error
    for joint in joints:
        if min(joint.n_patterns, joint.n_joined) > _MOST_JOINED:
            raise GrammarError(
                f"the JSON schema joins {joint.n_joined} schemas (by allOf and the like) with {joint.n_patterns} "
                f"patterns and formats; more than {_MOST_JOINED} of both take too long to combine"
            )
    written_out = sum(joint.n_schemas for joint in joints)
    if written_out > _MOST_WRITTEN_OUT:
        raise GrammarError(
            f"the JSON schema joins schemas (by allOf and the like) that are {written_out:.3g} schemas when what they "
            f"refer to is written out; at most {_MOST_WRITTEN_OUT} are possible"
        )
    return root


def schemas_in(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas right below one, with their paths."""
    for keyword, value in schema.items() if isinstance(schema, dict) else ():
        if keyword in ("allOf", "anyOf", "oneOf", "prefixItems"):
            yield from ((f"{keyword}/{i}", inner) for i, inner in enumerate(value))
        elif keyword in ("$defs", "definitions", "patternProperties", "properties"):
            yield from ((f"{keyword}/{_escaped(name)}", inner) for name, inner in value.items())
        elif keyword in ("additionalProperties", "items"):
            yield keyword, value


def _escaped(name: str) -> str:
    """A name in a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def _refuse(place: str, problem: str) -> NoReturn:
    raise GrammarError(f"the JSON schema cannot be kept at {place}: {problem}")


@dataclass(frozen=True)
class _Keyword:
    """A keyword where it stands."""

    name: str
    place: str  # JSON pointer of its value
    depth: int  # schemas around it
    beside: Mapping[str, Any]  # the schema it belongs to
    rewritten: dict[str, Any]  # that schema as far as it is rewritten


class _Rewriting:
    """Rewrites schemas to such as llguidance keeps. Every method raises GrammarError for what cannot be kept."""

    def __init__(self) -> None:
        self.n_schemas = 0
        self.joints: list[dict[str, Any]] = []  # rewritten schemas in which several have to hold
        self.anchored: dict[str, Any] = {}  # by reference
        self._n_name_patterns = 0
        self._divisor = 1
        self._keywords: dict[str, Callable[[_Keyword, Any], None]] = {
            **dict.fromkeys(("$anchor", "$ref"), self._text),
            **dict.fromkeys(("additionalProperties", "items"), self._one),
            **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), self._list),
            **dict.fromkeys(("$defs", "definitions", "properties"), self._named),
            **dict.fromkeys(("minItems", "minLength", "minProperties"), self._count),
            **dict.fromkeys(("maxItems", "maxLength", "maxProperties"), self._count),
            **dict.fromkeys(("minimum", "exclusiveMinimum"), self._minimum),
            **dict.fromkeys(("maximum", "exclusiveMaximum"), self._maximum),
            "const": self._const,
            "enum": self._enum,
            "format": self._format,
            "$id": self._id,
            "multipleOf": self._multiple_of,
            "pattern": self._pattern,
            "patternProperties": self._pattern_properties,
            "required": self._required,
            "type": self._type,
            "uniqueItems": self._unique_items,
        }

    def schema(self, schema: Any, place: str, depth: int) -> Any:
        """A schema rewritten, without what is no constraint."""
        self._add_schemas(1, place)
        if depth > _DEEPEST:
            _refuse(place, f"schemas nest more than {_DEEPEST} deep")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            _refuse(place, f"a schema is an object, true or false, not {schema!r:.40}")
        rewritten: dict[str, Any] = {}
        for name, value in schema.items():
            if name in _UNSUPPORTED:
                _refuse(place, f"{name!r} is not supported")
            if name in self._keywords:
                self._keywords[name](_Keyword(name, f"{place}/{name}", depth + 1, schema, rewritten), value)
        _count_once(rewritten, place)
        self._add_schemas(len(set(rewritten.get("required", ())) - set(rewritten.get("properties", ()))), place)
        # llguidance takes what stands between two of these for schemas of their own.
        joined = {name: rewritten.pop(name) for name in _APPLICATORS if name in rewritten}
        whole = rewritten | joined
        if _n_joined(whole) > 1:
            self.joints.append(whole)
        if "$anchor" in whole:
            self.anchored[f"#{whole['$anchor']}"] = whole
        return whole

    def _add_schemas(self, n: int, place: str) -> None:
        self.n_schemas += n
        if self.n_schemas > MOST_SCHEMAS:
            _refuse(place, f"there are more than {MOST_SCHEMAS} schemas and names in it")

    # ---- schemas in schemas ----------------------------------------------------------------------------------

    def _one(self, here: _Keyword, value: Any) -> None:
        if isinstance(value, list | tuple):
            _refuse(here.place, "schemas of single items belong in 'prefixItems'")
        rewritten = self.schema(value, here.place, here.depth)
        here.rewritten.setdefault(here.name, rewritten)

    def _list(self, here: _Keyword, value: Any) -> None:
        if not isinstance(value, list | tuple) or not value:
            _refuse(here.place, "it is a list of at least one schema")
        schemas = [self.schema(inner, f"{here.place}/{i}", here.depth) for i, inner in enumerate(value)]
        here.rewritten.setdefault(here.name, []).extend(schemas)

    def _named(self, here: _Keyword, value: Any) -> None:
        here.rewritten[here.name] = dict(self._entries(here, value))

    def _pattern_properties(self, here: _Keyword, value: Any) -> None:
        entries = dict(self._entries(here, value))
        patterns = {translated(name, f"{here.place}/{_escaped(name)}"): inner for name, inner in entries.items()}
        if len(patterns) < len(entries):
            _refuse(here.place, "two patterns are the same")
        self._n_name_patterns += len(patterns)
        if self._n_name_patterns > _MOST_NAME_PATTERNS:
            _refuse(here.place, f"more than {_MOST_NAME_PATTERNS} patterns of names are not supported")
        here.rewritten[here.name] = patterns
        if not all(map(is_one_to_all, entries)):
            _keep_to_names_all_agree_on(here)

    def _entries(self, here: _Keyword, value: Any) -> Iterator[tuple[str, Any]]:
        """Names and schemas."""
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            _refuse(here.place, "it is an object whose values are schemas")
        for name, inner in value.items():
            yield name, self.schema(inner, f"{here.place}/{_escaped(name)}", here.depth)

    # ---- values ----------------------------------------------------------------------------------------------

    def _type(self, here: _Keyword, value: Any) -> None:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not names or not all(name in _TYPES for name in names):
            _refuse(here.place, f"{value!r:.40} is none of {', '.join(_TYPES)}, and no list of them")
        here.rewritten[here.name] = value

    def _const(self, here: _Keyword, value: Any) -> None:
        _check_constant(value, here.place)
        here.rewritten[here.name] = value

    def _enum(self, here: _Keyword, value: Any) -> None:
        if not isinstance(value, list | tuple) or not value:
            _refuse(here.place, "it is a list of at least one value")
        _check_constant(value, here.place)
        here.rewritten[here.name] = value

    def _text(self, here: _Keyword, value: Any) -> None:
        if not isinstance(value, str):
            _refuse(here.place, f"it is a string, not {value!r:.40}")
        here.rewritten[here.name] = value

    def _id(self, here: _Keyword, value: Any) -> None:
        if here.depth > 1:
            _refuse(here.place, "'$id' is supported in the outermost schema only")
        self._text(here, value)

    # ---- numbers ---------------------------------------------------------------------------------------------

    # llguidance lets 1 pass as a number above 1 and up to 1.5, so no bound is left as exclusive.

    def _minimum(self, here: _Keyword, value: Any) -> None:
        least = _bound(value, here, ROUND_CEILING)
        here.rewritten["minimum"] = max(least, here.rewritten.get("minimum", least))

    def _maximum(self, here: _Keyword, value: Any) -> None:
        most = _bound(value, here, ROUND_FLOOR)
        here.rewritten["maximum"] = min(most, here.rewritten.get("maximum", most))

    def _multiple_of(self, here: _Keyword, value: Any) -> None:
        number = _number(value, here.place)
        if number != int(number) or number < 1:
            _refuse(here.place, f"{value} is no whole number, and validators round the multiples of others differently")
        # llguidance combines divisors in 32 bits.
        self._divisor = math.lcm(self._divisor, int(number))
        if self._divisor > _LARGEST_DIVISOR:
            _refuse(here.place, f"divisors with a least common multiple above {_LARGEST_DIVISOR} are not supported")
        here.rewritten[here.name] = int(number)

    def _count(self, here: _Keyword, value: Any) -> None:
        number = _number(value, here.place)
        if here.name.startswith("max"):
            number = min(number, _MOST_REPEATED)
        if number != int(number) or not 0 <= number <= _MOST_REPEATED:
            _refuse(here.place, f"{value} is no whole number from 0 to {_MOST_REPEATED}")
        here.rewritten[here.name] = int(number)

    # ---- strings ---------------------------------------------------------------------------------------------

    def _pattern(self, here: _Keyword, value: Any) -> None:
        self._text(here, value)
        here.rewritten[here.name] = translated(value, here.place)

    def _format(self, here: _Keyword, value: Any) -> None:
        self._text(here, value)
        if value in PATTERNS:
            del here.rewritten[here.name]
            pattern = {"pattern": PATTERNS[value]}
            if "pattern" in here.beside:
                here.rewritten.setdefault("allOf", []).append(pattern)
            else:
                here.rewritten.update(pattern)
        elif value not in KEPT_FORMATS:
            _refuse(
                here.place, f"{value!r} is not supported; formats are {', '.join(sorted([*KEPT_FORMATS, *PATTERNS]))}"
            )

    # ---- arrays and objects ----------------------------------------------------------------------------------

    def _unique_items(self, here: _Keyword, value: Any) -> None:
        if value is not False:
            _refuse(here.place, "'uniqueItems' is not supported")

    def _required(self, here: _Keyword, value: Any) -> None:
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            _refuse(here.place, "it is a list of names")
        here.rewritten[here.name] = value


@dataclass(frozen=True)
class _Size:
    n_schemas: int
    n_patterns: int  # and formats
    n_joined: int  # schemas that have to hold beside others

    def __add__(self, other: _Size) -> _Size:
        return _Size(
            self.n_schemas + other.n_schemas, self.n_patterns + other.n_patterns, self.n_joined + other.n_joined
        )


class _Sizes:
    """What there is in a schema when what it refers to is written out, as llguidance does to join schemas."""

    def __init__(self, root: Any, anchored: dict[str, Any]) -> None:
        self._root = root
        self._anchored = anchored
        self._referred: dict[str, _Size] = {}

    def of(self, schema: Any) -> _Size:
        """The size of a schema. Raises GrammarError and RecursionError."""
        if not isinstance(schema, dict):
            return _Size(1, 0, 0)
        n_patterns = ("pattern" in schema) + ("format" in schema) + len(schema.get("patternProperties", ()))
        size = _Size(1, n_patterns, max(0, _n_joined(schema) - 1))
        if "$ref" in schema:
            size += self._of_referred(schema["$ref"])
        for _, inner in schemas_in(schema):
            size += self.of(inner)
        return size

    def _of_referred(self, reference: str) -> _Size:
        if reference not in self._referred:
            self._referred[reference] = _Size(1, 0, 0)  # in a ring, which llguidance does not join
            self._referred[reference] = self.of(self._schema(reference))
        return self._referred[reference]

    def _schema(self, reference: str) -> Any:
        """What a reference leads to; None if nothing is there."""
        if reference in self._anchored:
            return self._anchored[reference]
        if not reference.startswith("#"):
            raise GrammarError(f"the JSON schema cannot be kept: it does not contain what {reference!r:.80} refers to")
        found = self._root
        for name in unquote(reference).split("/")[1:]:
            if isinstance(found, dict):
                found = found.get(name.replace("~1", "/").replace("~0", "~"))
            else:
                found = found[int(name)] if isinstance(found, list) and name in map(str, range(len(found))) else None
        return found


def _n_joined(schema: dict[str, Any]) -> int:
    """How many schemas with patterns of their own may hold at one place."""
    own = any(name not in (*_APPLICATORS, "$anchor", "$defs", "definitions", "$id") for name in schema)
    return own + len(schema.get("allOf", ())) + sum(name in schema for name in ("$ref", "anyOf", "oneOf"))


def _keep_to_names_all_agree_on(patterns: _Keyword) -> None:
    """Allow no name of which engines may think differently whether it matches a pattern."""
    patterns.rewritten["additionalProperties"] = False
    for names in ("properties", "required"):
        for name in patterns.beside.get(names, ()):
            if not (isinstance(name, str) and name.isascii() and name.isprintable()):
                _refuse(patterns.place, f"engines differ on whether {name!r:.40} matches")


def _count_once(schema: dict[str, Any], place: str) -> None:
    """Nothing keeps an additional name from coming twice, and then it counts once."""
    at_least = schema.get("minProperties", 0)
    if at_least <= len(set(schema.get("required", ()))):
        schema.pop("minProperties", None)
    elif at_least > 1:
        _refuse(f"{place}/minProperties", "more than 1, and more than the required ones, is not supported")


def _check_constant(value: Any, place: str) -> None:
    """Refuse values that cannot be written exactly."""
    if isinstance(value, str):
        for character in value:
            if not is_writable(character):
                _refuse(place, f"the character {character!a} is not supported in constants")
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_constant(inner, f"{place}/{_escaped(str(name))}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _check_constant(inner, f"{place}/{i}")
    elif value is not None and not isinstance(value, bool):
        number = Decimal(repr(_number(value, place)))
        if abs(number) > _LARGEST or number != number.quantize(_unit(number)):
            _refuse(place, f"numbers of more than {_DIGITS} digits are not supported in constants")


def _number(value: Any, place: str) -> float:
    """A number, checked."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(place, f"it is a number, not {value!r:.40}")
    return value


def _bound(value: Any, keyword: _Keyword, rounding: str) -> float:
    """An inclusive bound, within the given one by at most a unit of the last digit that counts."""
    number = _number(value, keyword.place)
    sign = 1 if rounding == ROUND_CEILING else -1
    if sign * number > _LARGEST:
        _refuse(keyword.place, f"bounds beyond {_LARGEST} are not supported")
    if abs(number) > _LARGEST:
        return -sign * _LARGEST
    exact = Decimal(repr(number))
    rounded = exact.quantize(_unit(exact), rounding)
    if rounded == exact and keyword.name.startswith("exclusive"):
        rounded += sign * _unit(exact)
    return int(rounded) if rounded == int(rounded) else float(rounded)


def _unit(number: Decimal) -> Decimal:
    """The unit of the last digit that counts."""
    digits_before_point = max(number.adjusted() + 1, 0) if number else 0
    return Decimal(1).scaleb(-max(_DIGITS - digits_before_point, 0))
