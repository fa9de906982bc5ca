"""Cases of the JSON Schema Test Suite (draft 2020-12, required keywords; MIT licence), by its names."""

from __future__ import annotations

from typing import Any

# Name, schema, some values that fit (names in the order of the schema) and some that do not.
KEPT: list[tuple[str, Any, list[Any], list[Any]]] = [
    (
        "additionalProperties: additionalProperties being false does not allow other properties",
        {"properties": {"foo": {}, "bar": {}}, "patternProperties": {"^v": {}}, "additionalProperties": False},
        [12, [1, 2, 3], {"foo": 1}],
        [{"foo": 1, "bar": 2, "quux": "boom"}],
    ),
    (
        "additionalProperties: additionalProperties with schema",
        {"properties": {"foo": {}, "bar": {}}, "additionalProperties": {"type": "boolean"}},
        [{"foo": 1}, {"foo": 1, "bar": 2, "quux": True}],
        [{"foo": 1, "bar": 2, "quux": 12}],
    ),
    (
        "additionalProperties: additionalProperties are allowed by default",
        {"properties": {"foo": {}, "bar": {}}},
        [{"foo": 1, "bar": 2, "quux": True}],
        [],
    ),
    (
        "additionalProperties: additionalProperties does not look in applicators",
        {"allOf": [{"properties": {"foo": {}}}], "additionalProperties": {"type": "boolean"}},
        [{"foo": True, "bar": True}],
        [{"foo": 1, "bar": True}],
    ),
    (
        "allOf: allOf with base schema",
        {
            "properties": {"bar": {"type": "integer"}},
            "required": ["bar"],
            "allOf": [
                {"properties": {"foo": {"type": "string"}}, "required": ["foo"]},
                {"properties": {"baz": {"type": "null"}}, "required": ["baz"]},
            ],
        },
        [{"bar": 2, "foo": "quux", "baz": None}],
        [{"bar": 2}, {"bar": 2, "baz": None}, {"foo": "quux", "bar": 2}, {"foo": "quux", "baz": None}],
    ),
    ("allOf: allOf simple types", {"allOf": [{"maximum": 30}, {"minimum": 20}]}, [25], [35]),
    (
        "allOf: allOf combined with anyOf, oneOf",
        {"allOf": [{"multipleOf": 2}], "anyOf": [{"multipleOf": 3}], "oneOf": [{"multipleOf": 5}]},
        [30],
        [1, 5, 3, 2],
    ),
    (
        "anchor: Location-independent identifier",
        {"$ref": "#foo", "$defs": {"A": {"$anchor": "foo", "type": "integer"}}},
        [1],
        ["a"],
    ),
    ("anyOf: anyOf", {"anyOf": [{"type": "integer"}, {"minimum": 2}]}, [1, 3, 2.5], [1.5]),
    (
        "anyOf: anyOf with base schema",
        {"type": "string", "anyOf": [{"maxLength": 2}, {"minLength": 4}]},
        ["foobar"],
        [3, "foo"],
    ),
    (
        "anyOf: anyOf complex types",
        {
            "anyOf": [
                {"properties": {"bar": {"type": "integer"}}, "required": ["bar"]},
                {"properties": {"foo": {"type": "string"}}, "required": ["foo"]},
            ]
        },
        [{"bar": 2}, {"foo": "baz"}, {"foo": "baz", "bar": 2}],
        [{"foo": 2, "bar": "quux"}],
    ),
    ("boolean_schema: boolean schema 'true'", True, [1, {}, []], []),
    (
        "const: const with object",
        {"const": {"foo": "bar", "baz": "bax"}},
        [{"foo": "bar", "baz": "bax"}],
        [[1, 2], {"foo": "bar"}],
    ),
    ("const: const with array", {"const": [{"foo": "bar"}]}, [[{"foo": "bar"}]], [[2], [1, 2, 3]]),
    (
        'const: const with {"a": false} does not match {"a": 0}',
        {"const": {"a": False}},
        [{"a": False}],
        [{"a": 0}, {"a": 0.0}],
    ),
    (
        "default: the default keyword does not do anything if the property is missing",
        {"type": "object", "properties": {"alpha": {"type": "number", "maximum": 3, "default": 5}}},
        [{}, {"alpha": 1}],
        [{"alpha": 5}],
    ),
    ("enum: heterogeneous enum-with-null validation", {"enum": [6, None]}, [6, None], ["test"]),
    (
        "enum: enums in properties",
        {"type": "object", "properties": {"foo": {"enum": ["foo"]}, "bar": {"enum": ["bar"]}}, "required": ["bar"]},
        [{"bar": "bar"}, {"foo": "foo", "bar": "bar"}],
        [{}, {"foo": "foo"}, {"foo": "foot", "bar": "bar"}, {"foo": "foo", "bar": "bart"}],
    ),
    ("enum: enum with escaped characters", {"enum": ["foo\nbar", "foo\rbar"]}, ["foo\nbar", "foo\rbar"], ["abc"]),
    ("enum: enum with 0 does not match false", {"enum": [0]}, [0], [False]),
    ("exclusiveMaximum: exclusiveMaximum validation", {"exclusiveMaximum": 3.0}, [2.2, "x"], [3.0, 3.5]),
    ("exclusiveMinimum: exclusiveMinimum validation", {"exclusiveMinimum": 1.1}, [1.2, "x"], [1.1, 0.6]),
    ("format: uuid format", {"format": "uuid"}, [12, {}, []], []),
    (
        "infinite-loop-detection: evaluating the same schema location against the same data location twice is not a "
        "sign of an infinite loop",
        {
            "$defs": {"int": {"type": "integer"}},
            "allOf": [
                {"properties": {"foo": {"$ref": "#/$defs/int"}}},
                {"additionalProperties": {"$ref": "#/$defs/int"}},
            ],
        },
        [{"foo": 1}],
        [{"foo": "a string"}],
    ),
    (
        "items: a schema given for items",
        {"items": {"type": "integer"}},
        [[1, 2, 3], {"foo": "bar"}, {"0": "invalid", "length": 1}],
        [[1, "x"]],
    ),
    (
        "items: items and subitems",
        {
            "$defs": {
                "item": {
                    "type": "array",
                    "items": False,
                    "prefixItems": [{"$ref": "#/$defs/sub-item"}, {"$ref": "#/$defs/sub-item"}],
                },
                "sub-item": {"type": "object", "required": ["foo"]},
            },
            "type": "array",
            "items": False,
            "prefixItems": [{"$ref": "#/$defs/item"}, {"$ref": "#/$defs/item"}, {"$ref": "#/$defs/item"}],
        },
        [
            [[{"foo": None}], [{"foo": None}]],
            [[{"foo": None}, {"foo": None}], [{"foo": None}, {"foo": None}], [{"foo": None}, {"foo": None}]],
        ],
        [
            [{"foo": None}, [{"foo": None}, {"foo": None}], [{"foo": None}, {"foo": None}]],
            [[{}, {"foo": None}], [{"foo": None}, {"foo": None}], [{"foo": None}, {"foo": None}]],
            [
                [{"foo": None}, {"foo": None}, {"foo": None}],
                [{"foo": None}, {"foo": None}],
                [{"foo": None}, {"foo": None}],
            ],
            [
                [{"foo": None}, {"foo": None}],
                [{"foo": None}, {"foo": None}],
                [{"foo": None}, {"foo": None}],
                [{"foo": None}, {"foo": None}],
            ],
        ],
    ),
    (
        "items: prefixItems with no additional items allowed",
        {"prefixItems": [{}, {}, {}], "items": False},
        [[], [1], [1, 2]],
        [[1, 2, 3, 4]],
    ),
    ("maxItems: maxItems validation", {"maxItems": 2}, [[1], [1, 2], "foobar"], [[1, 2, 3]]),
    ("maxLength: maxLength validation", {"maxLength": 2}, ["f", 100, "fo"], ["foo"]),
    (
        "maxProperties: maxProperties validation",
        {"maxProperties": 2},
        [12, "foobar", [1, 2, 3]],
        [{"foo": 1, "bar": 2, "baz": 3}],
    ),
    ("maximum: maximum validation", {"maximum": 3.0}, [2.6, 3.0, "x"], [3.5]),
    ("minItems: minItems validation", {"minItems": 1}, ["", [1], [1, 2]], [[]]),
    ("minLength: minLength validation", {"minLength": 2}, [1, "fo", "foo"], ["f", "💩"]),
    ("minProperties: minProperties validation", {"minProperties": 1}, [[], "", 12], [{}]),
    ("minimum: minimum validation with signed integer", {"minimum": -2}, [0, -1, -2], [-3, -2.0001]),
    ("multipleOf: by int", {"multipleOf": 2}, [10, "foo"], [7]),
    ("oneOf: nested oneOf, to check validation semantics", {"oneOf": [{"oneOf": [{"type": "null"}]}]}, [None], [123]),
    ("pattern: pattern validation", {"pattern": "^a*$"}, [{}, [], 123], ["abc"]),
    ("pattern: pattern is not anchored", {"pattern": "a+"}, ["xxaayy"], []),
    (
        "patternProperties: patternProperties validates properties matching a regex",
        {"patternProperties": {"f.*o": {"type": "integer"}}},
        [12, "foo", ["foo"]],
        [{"foo": "bar", "fooooo": 2}, {"foo": "bar", "foooooo": "baz"}],
    ),
    (
        "prefixItems: a schema given for prefixItems",
        {"prefixItems": [{"type": "integer"}, {"type": "string"}]},
        [[], [1], [1, "foo"]],
        [["foo", 1]],
    ),
    (
        "properties: object properties validation",
        {"properties": {"foo": {"type": "integer"}, "bar": {"type": "string"}}},
        [[], 12, {"quux": []}],
        [{"foo": 1, "bar": {}}, {"foo": [], "bar": {}}],
    ),
    (
        "properties: properties, patternProperties, additionalProperties interaction",
        {
            "properties": {"foo": {"type": "array", "maxItems": 3}, "bar": {"type": "array"}},
            "patternProperties": {"f.o": {"minItems": 2}},
            "additionalProperties": {"type": "integer"},
        },
        [{"bar": []}, {"foo": [1, 2]}, {"fxo": [1, 2]}],
        [{"foo": []}, {"fxo": []}, {"quux": "foo"}, {"foo": [1, 2, 3, 4]}],
    ),
    (
        "properties: properties with escaped characters",
        {
            "properties": {
                "foo\nbar": {"type": "number"},
                'foo"bar': {"type": "number"},
                "foo\\bar": {"type": "number"},
                "foo\rbar": {"type": "number"},
                "foo\tbar": {"type": "number"},
                "foo\x0cbar": {"type": "number"},
            }
        },
        [{"foo\nbar": 1, 'foo"bar': 1, "foo\\bar": 1, "foo\rbar": 1, "foo\tbar": 1, "foo\x0cbar": 1}],
        [{"foo\nbar": "1", 'foo"bar': "1", "foo\\bar": "1", "foo\rbar": "1", "foo\tbar": "1", "foo\x0cbar": "1"}],
    ),
    (
        "ref: root pointer ref",
        {"properties": {"foo": {"$ref": "#"}}, "additionalProperties": False},
        [{"foo": False}, {"foo": {"foo": False}}],
        [{"bar": False}, {"foo": {"bar": False}}],
    ),
    (
        "ref: relative pointer ref to object",
        {"properties": {"foo": {"type": "integer"}, "bar": {"$ref": "#/properties/foo"}}},
        [{"bar": 3}],
        [{"bar": True}],
    ),
    (
        "ref: escaped pointer ref",
        {
            "$defs": {
                "tilde~field": {"type": "integer"},
                "slash/field": {"type": "integer"},
                "percent%field": {"type": "integer"},
            },
            "properties": {
                "tilde": {"$ref": "#/$defs/tilde~0field"},
                "slash": {"$ref": "#/$defs/slash~1field"},
                "percent": {"$ref": "#/$defs/percent%25field"},
            },
        },
        [{"slash": 123}, {"tilde": 123}, {"percent": 123}],
        [{"slash": "aoeu"}, {"tilde": "aoeu"}, {"percent": "aoeu"}],
    ),
    (
        "ref: nested refs",
        {
            "$defs": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/a"}, "c": {"$ref": "#/$defs/b"}},
            "$ref": "#/$defs/c",
        },
        [5],
        ["a"],
    ),
    (
        "ref: ref applies alongside sibling keywords",
        {"$defs": {"reffed": {"type": "array"}}, "properties": {"foo": {"$ref": "#/$defs/reffed", "maxItems": 2}}},
        [{"foo": []}],
        [{"foo": "string"}, {"foo": [1, 2, 3]}],
    ),
    (
        "ref: property named $ref that is not a reference",
        {"properties": {"$ref": {"type": "string"}}},
        [{"$ref": "a"}],
        [{"$ref": 2}],
    ),
    (
        "required: required validation",
        {"properties": {"foo": {}, "bar": {}}, "required": ["foo"]},
        [[], "", 12],
        [{"bar": 1}],
    ),
    (
        "required: required with escaped characters",
        {"required": ["foo\nbar", 'foo"bar', "foo\\bar", "foo\rbar", "foo\tbar", "foo\x0cbar"]},
        [{"foo\nbar": 1, 'foo"bar': 1, "foo\\bar": 1, "foo\rbar": 1, "foo\tbar": 1, "foo\x0cbar": 1}],
        [{"foo\nbar": "1", 'foo"bar': "1"}],
    ),
    ("type: integer type matches integers", {"type": "integer"}, [1], [{}, [], 1.1, "1"]),
    (
        "type: multiple types can be specified in an array",
        {"type": ["integer", "string"]},
        [1, "foo"],
        [{}, [], 1.1, True],
    ),
    (
        "type: type: array, object or null",
        {"type": ["array", "object", "null"]},
        [None, [1, 2, 3], {"foo": 123}],
        [123, "foo"],
    ),
    ("uniqueItems: uniqueItems=false validation", {"uniqueItems": False}, [[1, 2], [1, 1], [1, True]], []),
]

# Name, schema, what the error says.
REFUSED: list[tuple[str, Any, str]] = [
    ("allOf: allOf with boolean schemas, all false", {"allOf": [False, False]}, "at #: no value fits it"),
    ("boolean_schema: boolean schema 'false'", False, "at #: no value fits it"),
    ("contains: contains keyword validation", {"contains": {"minimum": 5}}, "at #: 'contains' is not supported"),
    (
        "dependentRequired: single dependency",
        {"dependentRequired": {"bar": ["foo"]}},
        "at #: 'dependentRequired' is not supported",
    ),
    (
        "dependentSchemas: boolean subschemas",
        {"dependentSchemas": {"foo": True, "bar": False}},
        "at #: 'dependentSchemas' is not supported",
    ),
    (
        "dynamicRef: A $dynamicRef to a $dynamicAnchor in the same schema resource behaves like a normal $ref to an "
        "$anchor",
        {
            "$id": "https://test.json-schema.org/dynamicRef-dynamicAnchor-same-schema/root",
            "type": "array",
            "items": {"$dynamicRef": "#items"},
            "$defs": {"foo": {"$dynamicAnchor": "items", "type": "string"}},
        },
        "at #/items: '$dynamicRef' is not supported",
    ),
    ("enum: empty enum", {"enum": []}, "at #/enum: it is a list of at least one value"),
    ("format: regex format", {"format": "regex"}, "at #/format: 'regex' is not supported"),
    (
        "if-then-else: if and then without else",
        {"if": {"exclusiveMaximum": 0}, "then": {"minimum": -10}},
        "at #: 'if' is not supported",
    ),
    ("multipleOf: by number", {"multipleOf": 1.5}, "at #/multipleOf: 1.5 is no whole number"),
    ("not: not", {"not": {"type": "integer"}}, "at #: 'not' is not supported"),
    ("oneOf: oneOf", {"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "at #: 'oneOf' is supported only where"),
    (
        "oneOf: oneOf complex types",
        {
            "oneOf": [
                {"properties": {"bar": {"type": "integer"}}, "required": ["bar"]},
                {"properties": {"foo": {"type": "string"}}, "required": ["foo"]},
            ]
        },
        "at #: 'oneOf' is supported only where",
    ),
    (
        "patternProperties: multiple simultaneous patternProperties are validated",
        {"patternProperties": {"a*": {"type": "integer"}, "aaa*": {"maximum": 20}}},
        "at #: patternProperty regexes /a*/ and /aaa*/ are not disjoint",
    ),
    (
        "propertyNames: propertyNames validation",
        {"propertyNames": {"maxLength": 3}},
        "at #: 'propertyNames' is not supported",
    ),
    (
        "ref: remote ref, containing refs itself",
        {"$ref": "https://json-schema.org/draft/2020-12/schema"},
        'at #: Unimplemented keys: ["$dynamicAnchor"]',
    ),
    (
        "ref: Recursive references between schemas",
        {
            "$id": "http://localhost:1234/draft2020-12/tree",
            "type": "object",
            "properties": {"meta": {"type": "string"}, "nodes": {"type": "array", "items": {"$ref": "node"}}},
            "required": ["meta", "nodes"],
            "$defs": {
                "node": {
                    "$id": "http://localhost:1234/draft2020-12/node",
                    "description": "node",
                    "type": "object",
                    "properties": {"value": {"type": "number"}, "subtree": {"$ref": "tree"}},
                    "required": ["value"],
                }
            },
        },
        "at #/$defs/node/$id: '$id' is supported in the outermost schema only",
    ),
    (
        "refRemote: remote ref",
        {"$ref": "http://localhost:1234/draft2020-12/integer.json"},
        "at #: Resource 'http://localhost:1234/draft2020-12/integer.json' is not present",
    ),
    (
        "unevaluatedItems: unevaluatedItems false",
        {"unevaluatedItems": False},
        "at #: 'unevaluatedItems' is not supported",
    ),
    (
        "unevaluatedProperties: unevaluatedProperties false",
        {"unevaluatedProperties": False},
        "at #: 'unevaluatedProperties' is not supported",
    ),
    ("uniqueItems: uniqueItems validation", {"uniqueItems": True}, "at #/uniqueItems: 'uniqueItems' is not supported"),
]
