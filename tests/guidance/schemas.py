"""JSON schemas of varied keywords, and values that satisfy them or nearly do."""

import itertools
import random

STRING, INTEGER, NUMBER, OBJECT, ARRAY = ({"type": t} for t in ("string", "integer", "number", "object", "array"))
NAMES = ("a", "b", "c")

WRITTEN = [
    True,
    {},
    *({"type": t} for t in ("null", "boolean", "integer", "number", "string", "array", "object")),
    {"type": ["string", "null"]},
    {"type": ["integer", "array"], "minimum": 2, "maxItems": 1},
    {"enum": [1, "a", None, True, [1, 2], {"a": 1}]},
    {"const": "ab"},
    {"const": 1},
    {"const": False},
    {"type": "integer", "enum": [1, "a", 2, 3], "minimum": 2},
    {"minLength": 2},
    {"type": "string", "minLength": 1, "maxLength": 2},
    {"type": "string", "pattern": "^a+$", "maxLength": 2},
    {"type": "string", "pattern": "b"},
    {"type": "string", "pattern": "^(?!a)"},
    {"type": "string", "allOf": [{"pattern": "^a"}, {"pattern": "b$"}]},
    {"type": "string", "pattern": "^a", "not": {"pattern": "b$"}},
    {"minimum": 2},
    {"type": "integer", "minimum": -2, "maximum": 3},
    {"type": "integer", "exclusiveMinimum": -2, "exclusiveMaximum": 3},
    {"type": "integer", "multipleOf": 3},
    {"type": "number", "multipleOf": 0.5},
    {"type": "number", "multipleOf": 0.25, "minimum": -1},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1.5},
    {"type": "integer", "allOf": [{"multipleOf": 2}, {"multipleOf": 3}]},
    {"type": "integer", "not": {"multipleOf": 2}},
    {"type": "array", "items": INTEGER},
    {"type": "array", "items": INTEGER, "minItems": 1, "maxItems": 2},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "items": {"enum": [1, 2, True, "1"]}, "uniqueItems": True, "maxItems": 3},
    {"type": "array", "uniqueItems": False},
    {"type": "array", "prefixItems": [INTEGER, STRING]},
    {"type": "array", "prefixItems": [INTEGER, STRING], "items": False},
    {"type": "array", "prefixItems": [INTEGER], "items": STRING, "minItems": 2},
    {"type": "array", "contains": INTEGER},
    {"type": "array", "contains": {"minimum": 2}, "minContains": 2},
    {"type": "array", "contains": STRING, "maxContains": 1},
    {"type": "array", "contains": STRING, "minContains": 0},
    {"type": "array", "items": {"type": "array", "items": INTEGER, "uniqueItems": True}},
    {"type": "object", "properties": {"a": INTEGER}},
    {"type": "object", "properties": {"a": INTEGER, "b": STRING}, "required": ["a"]},
    {"type": "object", "properties": {"a": INTEGER, "b": STRING}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"a": INTEGER}, "required": ["b", "c"]},
    {"type": "object", "additionalProperties": INTEGER},
    {"type": "object", "additionalProperties": INTEGER, "required": ["a"]},
    {"type": "object", "properties": {"a": True, "b": False}},
    {"type": "object", "minProperties": 2},
    {"type": "object", "maxProperties": 1},
    {"type": "object", "properties": {"a": INTEGER}, "minProperties": 2},
    {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "maxProperties": 1, "additionalProperties": False},
    {"type": "object", "properties": {"a": INTEGER}, "required": ["a"], "maxProperties": 2},
    {"type": "object", "patternProperties": {"^a": INTEGER}},
    {"type": "object", "patternProperties": {"^a": INTEGER}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^a": INTEGER, "b$": {"minimum": 2}}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^(?!a)": INTEGER}, "additionalProperties": STRING},
    {"type": "object", "properties": {"a": INTEGER}, "patternProperties": {"a": {"minimum": 2}}},
    {"type": "object", "propertyNames": {"maxLength": 1}},
    {"type": "object", "propertyNames": {"enum": ["a", "c"]}},
    {"type": "object", "propertyNames": False},
    {"type": "object", "dependentRequired": {"a": ["b"], "b": ["c"]}},
    {"type": "object", "dependentSchemas": {"a": {"required": ["b"], "properties": {"b": INTEGER}}}},
    {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "not": {"required": ["a", "b"]}},
    {"not": STRING},
    {"not": {"type": ["string", "object", "array", "number"]}},
    {"not": {"not": INTEGER}},
    {"type": "string", "not": {"enum": ["a", "ab"]}},
    {"type": "array", "items": {"not": INTEGER}},
    {"anyOf": [STRING, {"type": "integer", "minimum": 2}]},
    {"anyOf": [{"minimum": 2}, STRING], "type": ["number", "string"]},
    {"oneOf": [STRING, INTEGER]},
    {"oneOf": [INTEGER, {"minimum": 2}], "type": "number"},
    {"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}], "type": "integer"},
    {"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}], "properties": {"a": INTEGER, "b": INTEGER}},
    {
        "oneOf": [
            {"type": "object", "properties": {"a": {"const": 1}, "b": INTEGER}, "required": ["a"]},
            {"type": "object", "properties": {"a": {"const": 2}, "c": STRING}, "required": ["a", "c"]},
        ]
    },
    {"anyOf": [{"oneOf": [INTEGER, {"minimum": 2}]}, STRING], "type": ["integer", "string"]},
    {"allOf": [{"type": "object", "properties": {"a": INTEGER}}, {"required": ["a"]}]},
    {"allOf": [{"minimum": 1}, {"maximum": 3}], "type": "integer"},
    {"if": STRING, "then": {"minLength": 2}, "else": INTEGER},
    {"type": "integer", "if": {"minimum": 2}, "then": {"multipleOf": 2}},
    {"type": "integer", "if": {"minimum": 2}, "else": {"maximum": 0}},
    {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {}},
        "if": {"properties": {"a": {"const": 1}}, "required": ["a"]},
        "then": {"required": ["b"]},
    },
    {"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer", "minimum": 2}}},
    {"$ref": "#/$defs/x", "maximum": 3, "$defs": {"x": {"type": "integer", "minimum": 2}}},
    {"$ref": "#x", "$defs": {"y": {"$anchor": "x", "type": "integer"}}},
    {"$ref": "#/$defs/a~1b", "$defs": {"a/b": STRING}},
    {"type": "array", "items": {"$ref": "#"}},
    {"type": "object", "properties": {"a": {"$ref": "#"}, "b": {"not": {"$ref": "#"}}}, "additionalProperties": False},
    {"$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/x"}, "uniqueItems": True}}, "$ref": "#/$defs/x"},
    {"title": "t", "description": "d", "default": 1, "examples": [1], "$comment": "c", "x-mine": 1, "type": "integer"},
]  # fmt: skip

UNSATISFIABLE = [
    False,
    {"enum": []},
    {"type": "string", "minLength": 3, "maxLength": 1},
    {"type": "integer", "minimum": 3, "maximum": 2},
    {"allOf": [STRING, INTEGER]},
    {"type": "object", "properties": {"a": False}, "required": ["a"]},
    {"type": "object", "required": ["a"], "additionalProperties": False},
    {"not": {}},
    {"type": "object", "properties": {"a": {"not": True}}, "required": ["a"]},
]

STRINGS = ("", "a", "b", "ab", "aab", "é")
NUMBERS = (-3, -2, -1, 0, 1, 2, 3, 4, 6, 0.5, 1.5, 0.25, -0.5)


def schema(draw: random.Random, depth: int = 2):
    """A schema of random keywords."""
    kind = draw.choice(("string", "number", "integer", "array", "object", "mixed"))
    if depth == 0:
        kind = draw.choice(("string", "number", "integer"))
    made = {} if kind == "mixed" else {"type": kind}

    def inner():
        return schema(draw, depth - 1)

    options = {
        "string": {
            "minLength": lambda: draw.randrange(3),
            "maxLength": lambda: draw.randrange(1, 4),
            "pattern": lambda: draw.choice(("^a", "b$", "^[ab]*$", "^(?!ab)", "a|b")),
            "enum": lambda: draw.sample(STRINGS, 3),
            "not": lambda: {"enum": draw.sample(STRINGS, 2)},
        },
        "number": {
            "minimum": lambda: draw.choice(NUMBERS),
            "maximum": lambda: draw.choice(NUMBERS),
            "exclusiveMinimum": lambda: draw.choice(NUMBERS),
            "multipleOf": lambda: draw.choice((2, 3, 0.5, 0.25)),
            "not": lambda: {"maximum": draw.choice(NUMBERS)},
        },
        "array": {
            "items": inner,
            "prefixItems": lambda: [inner() for _ in range(draw.randrange(1, 3))],
            "minItems": lambda: draw.randrange(3),
            "maxItems": lambda: draw.randrange(1, 4),
            "uniqueItems": lambda: draw.random() < 0.8,
            "contains": inner,
        },
        "object": {
            "properties": lambda: {name: inner() for name in sorted(draw.sample(NAMES, draw.randrange(1, 4)))},
            "required": lambda: draw.sample(NAMES, draw.randrange(3)),
            "additionalProperties": lambda: draw.choice((True, False, inner())),
            "patternProperties": lambda: {draw.choice(("^a", "b", "^(?!c)")): inner()},
            "propertyNames": lambda: {"pattern": draw.choice(("a|b", "^[abc]$"))},
            "minProperties": lambda: draw.randrange(3),
            "maxProperties": lambda: draw.randrange(1, 3),
            "dependentRequired": lambda: {draw.choice(NAMES): draw.sample(NAMES, 1)},
            "dependentSchemas": lambda: {draw.choice(NAMES): {"required": draw.sample(NAMES, 1)}},
        },
        "mixed": {
            "anyOf": lambda: [inner(), inner()],
            "oneOf": lambda: [inner(), inner()],
            "allOf": lambda: [inner(), {"not": inner()}],
            "not": inner,
            "if": inner,
            "then": inner,
            "else": inner,
            "enum": lambda: draw.sample([1, 2, "a", "ab", True, None, [1]], 4),
        },
    }
    options["integer"] = options["number"] | {"multipleOf": lambda: draw.choice((2, 3))}
    chosen = draw.sample(sorted(options[kind]), draw.randrange(1, 4 if kind != "mixed" else 3))
    return made | {keyword: options[kind][keyword]() for keyword in chosen}


def generated(count: int, seed: int = 0) -> list:
    """Schemas of random keywords."""
    draw = random.Random(seed)
    return [schema(draw) for _ in range(count)]


def values(schema, draw: random.Random, count: int = 60) -> list:
    """Distinct values that look like the schema: what it names, what it nearly allows, and what it does not."""
    found = {}
    for _ in range(count):
        value = _value(schema, draw, 3)
        found[repr(value)] = value
    return [None, True, 1, "a", [], {}, *found.values()]


def _value(schema, draw, depth):
    if isinstance(schema, bool) or depth == 0 or draw.random() < 0.1:
        return draw.choice([None, True, *STRINGS, *NUMBERS])
    if "const" in schema:
        return schema["const"]
    if schema.get("enum") and draw.random() < 0.8:
        return draw.choice(schema["enum"])
    for keyword in ("anyOf", "oneOf", "allOf"):
        if keyword in schema and draw.random() < 0.6:
            return _value(draw.choice(schema[keyword]), draw, depth)
    for keyword in ("$ref", "not", "if", "then", "else"):
        if keyword in schema and draw.random() < 0.4:
            target = schema[keyword] if keyword != "$ref" else next(iter(schema.get("$defs", {"": True}).values()))
            return _value(target, draw, depth - 1)
    kinds = schema.get("type", ["string", "number", "array", "object"])
    kind = kinds if isinstance(kinds, str) else draw.choice(kinds)
    if kind == "array":
        first, rest = schema.get("prefixItems", []), schema.get("items", schema.get("contains", True))
        if isinstance(rest, list):
            first, rest = rest, schema.get("additionalItems", True)
        length = draw.randrange(4)
        items = [_value(first[i] if i < len(first) else rest, draw, depth - 1) for i in range(length)]
        return [*items, items[0]] if items and draw.random() < 0.2 else items
    if kind == "object":
        names = [name for name in (*NAMES, "ab", "x") if draw.random() < (0.6 if name in NAMES else 0.15)]
        extra = schema.get("additionalProperties", next(iter(schema.get("patternProperties", {}).values()), True))
        known = schema.get("properties", {})
        return {name: _value(known.get(name, extra), draw, depth - 1) for name in names}
    if kind == "string":
        return draw.choice(STRINGS)
    if kind in ("integer", "number"):
        return draw.choice([n for n in NUMBERS if kind == "number" or isinstance(n, int)])
    return {"null": None, "boolean": draw.random() < 0.5}[kind]


def orders(value, limit: int = 4000) -> list:
    """The value with the properties of its objects in every order, `limit` at most; a grammar fixes one of them."""
    return list(itertools.islice(_orders(value), limit))


def _orders(value):
    if isinstance(value, list):
        yield from (list(items) for items in itertools.product(*map(orders, value)))
    elif isinstance(value, dict):
        for parts in itertools.product(*map(orders, value.values())):
            inner = dict(zip(value, parts, strict=True))
            yield from ({name: inner[name] for name in names} for names in itertools.permutations(value))
    else:
        yield value
