"""JSON schemas: accepted is what jsonschema accepts, over hundreds of schemas; what cannot be enforced is refused."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import Annotated, Any, Literal

import jsonschema
import pytest
import schemas
import walks

from hasten.guidance.text.constraints import JsonSchema, UnsatisfiableError, json_schema
from hasten.guidance.text.constraints.json_prefix import feed

GENERATED = schemas.generated(260)
VOCABULARY = walks.vocabulary()


def bind(schema, **options):
    return JsonSchema(schema, **options).bind(VOCABULARY)


def accepts(bound, value, orders=4000) -> bool:
    """Whether the value, with its properties in one of these many orders, is accepted."""
    texts = (json.dumps(value, ensure_ascii=False) for value in islice(schemas.orders(value), orders))
    return any(walks.accepts(bound, text) for text in texts)


def check_enforced(schema, validator, seed):
    draw = random.Random(seed)
    values = schemas.values(schema, draw)
    try:
        bound = bind(schema)
    except UnsatisfiableError:
        assert not any(map(validator.is_valid, values))
        return
    for value in values:
        if validator.is_valid(value):
            assert accepts(bound, value), f"{value!r} is valid and refused"
        else:
            assert not accepts(bound, value, orders=24), f"{value!r} is invalid and accepted"
    for _ in range(4):
        text = walks.random_text(bound, draw)
        assert text is None or validator.is_valid(json.loads(text)), f"{text!r} was generated"


@pytest.mark.parametrize("index", range(len(schemas.WRITTEN)))
def test_written_schemas_are_enforced(index):
    check_enforced(schemas.WRITTEN[index], jsonschema.Draft202012Validator(schemas.WRITTEN[index]), index)


@pytest.mark.parametrize("index", range(len(GENERATED)))
def test_generated_schemas_are_enforced(index):
    check_enforced(GENERATED[index], jsonschema.Draft202012Validator(GENERATED[index]), index)


def test_there_are_enough_schemas_and_walks_end():
    assert len(schemas.WRITTEN) + len(GENERATED) >= 340
    draw = random.Random(0)
    texts = [walks.random_text(bind(schema), draw) for schema in schemas.WRITTEN for _ in range(2)]
    assert sum(text is not None for text in texts) > 0.75 * len(texts)


@pytest.mark.parametrize(
    ("schema", "draft"),
    [
        ({"type": "array", "items": [schemas.INTEGER, schemas.STRING], "additionalItems": False}, 7),
        ({"type": "array", "items": [schemas.INTEGER], "additionalItems": schemas.STRING}, 7),
        ({"type": "object", "dependencies": {"a": ["b"], "b": {"required": ["c"]}}}, 7),
        ({"definitions": {"x": schemas.INTEGER}, "type": "array", "items": {"$ref": "#/definitions/x"}}, 7),
        ({"type": "integer", "minimum": 1, "exclusiveMinimum": True, "maximum": 4, "exclusiveMaximum": False}, 4),
        ({"type": "number", "maximum": 1, "exclusiveMaximum": True, "minimum": -2, "exclusiveMinimum": False}, 4),
    ],
)
def test_older_drafts(schema, draft):
    validator = {4: jsonschema.Draft4Validator, 7: jsonschema.Draft7Validator}[draft](schema)
    check_enforced(schema, validator, seed=draft)


@pytest.mark.parametrize("schema", schemas.UNSATISFIABLE, ids=str)
def test_unsatisfiable_schemas_are_refused_when_bound(schema):
    with pytest.raises(UnsatisfiableError):
        bind(schema)


@pytest.mark.parametrize(
    ("schema", "keyword", "where"),
    [
        ({"properties": {"a": {"unevaluatedProperties": False}}}, "'unevaluatedProperties'", "#/properties/a"),
        ({"items": {"$dynamicRef": "#x"}}, "'$dynamicRef'", "#/items"),
        ({"anyOf": [{}, {"$ref": "https://example.org/x"}]}, "'$ref'", "https://example.org/x"),
        ({"$ref": "#/$defs/none"}, "'$ref'", "'$defs'"),
        ({"maxLenght": 3}, "'maxLenght'", "#"),
        ({"properties": {"a/b": {"format": "iri"}}}, "'format'", "#/properties/a~1b"),
        ({"pattern": "("}, "'pattern'", "#"),
        ({"patternProperties": {"[": {}}}, "'patternProperties'", "#"),
        ({"type": "text"}, "'type'", "#"),
        ({"not": {"minimum": "3"}}, "'minimum'", "#/not"),
        ({"multipleOf": 0}, "'multipleOf'", "#"),
        ({"minItems": -1}, "'minItems'", "#"),
        ({"required": "a"}, "'required'", "#"),
        ({"anyOf": []}, "'anyOf'", "#"),
        ({"properties": []}, "'properties'", "#"),
        ({"if": 3}, "'if'", "#"),
        ({"x-guidance": {"whitespace_flexible": True}}, "'x-guidance'", "#"),
        ({"allOf": [{"$ref": "#"}]}, "'$ref'", "without end"),
        ({"anyOf": [{"enum": [["a\x01"]]}]}, "'enum'", "control characters"),
        ({"properties": {"\x7f": {}}}, "'properties'", "control characters"),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_refused_by_name(schema, keyword, where):
    with pytest.raises(ValueError, match="JSON schema") as refused:
        bind(schema)
    assert keyword in str(refused.value) and where in str(refused.value)


def test_nesting_without_measure():
    schema = {}
    for _ in range(450):
        schema = {"items": schema}
    with pytest.raises(ValueError, match="nested too deeply"):
        bind(schema)


@pytest.mark.parametrize("schema", ["{", "3", 3, None, int, {"enum": [1j]}, {"const": float("nan")}], ids=str)
def test_no_schema(schema):
    with pytest.raises(ValueError, match="JSON"):
        bind(schema)


@pytest.mark.parametrize(
    ("schema", "prefix", "refused", "taken"),
    [
        ({"type": "array", "uniqueItems": True}, "[1, 2, 1", b"]", b"2"),
        ({"type": "array", "uniqueItems": True}, '["a", "a', b'"', b"b"),
        ({"type": "object", "propertyNames": {"maxLength": 2}}, '{"aab', b'"', None),
        ({"type": "object", "properties": {"a": {"not": {"const": "b"}}}}, '{"a":"b', b'"', b"b"),
        ({"type": "array", "items": {"oneOf": [schemas.INTEGER, {"minimum": 2}]}}, "[1, 3", b",", b"."),
        ({"type": "object", "properties": {"a": schemas.INTEGER}, "not": {"required": ["a"]}}, '{"a":1', b"}", b"2"),
        ({"type": "object", "minProperties": 2}, '{"a":1,"a":1', b"}", b","),
        ({"type": "object", "properties": {"a": {"not": {}}}, "additionalProperties": False}, "{", b'"', b"}"),
    ],
)
def test_a_keyword_is_checked_as_soon_as_its_value_ends(schema, prefix, refused, taken):
    bound = bind(schema)
    state = bound.start()
    for byte in prefix.encode():
        assert bound.check(state, byte)
        state = bound.advance(state, byte)
    assert not bound.check(state, refused[0])
    assert taken is None or bound.check(state, taken[0])
    assert walks.mask_of(bound, state) == walks.allowed(bound, state)
    with pytest.raises(ValueError, match="JSON schema"):
        bound.advance(state, refused[0])


@pytest.mark.parametrize(
    ("name", "valid", "invalid"),
    [
        ("date", "2024-02-29", "2024-2-29"),
        ("time", "12:30:00Z", "25:00:00Z"),
        ("date-time", "2024-01-31T12:30:00Z", "2024-01-31"),
        ("duration", "P1DT2H", "1D"),
        ("email", "a@b.org", "a.b.org"),
        ("hostname", "a-b.org", "-a.org"),
        ("ipv4", "127.0.0.1", "127.0.0.256"),
        ("ipv6", "::1", ":1"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123e4567"),
        ("uri", "https://a.org/b?c", "a.org"),
    ],
)
def test_formats_are_enforced_also_where_only_a_check_can(name, valid, invalid):
    plain, refused = bind({"type": "string", "format": name}), bind({"type": "string", "not": {"format": name}})
    assert accepts(plain, valid) and not accepts(plain, invalid)
    assert accepts(refused, invalid) and not accepts(refused, valid)


def test_whitespace_is_bounded():
    bound = bind({"type": "array", "items": {"type": "integer"}})
    for text, expected in (("[ 1 ]", True), ("[\n  1\n]", True), ("[  1]", False), ("[\n\n1]", False), (" [1]", False)):
        assert walks.accepts(bound, text) is expected, text
    assert not walks.accepts(bind({"type": "array"}, whitespace=""), "[ ]")


def test_a_property_given_twice_cannot_pass_its_schema():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    bound = bind(schema)
    assert walks.accepts(bound, '{"a":1,"b":"x"}')
    for name in ('"a"', r'"\u0061"'):
        assert not walks.accepts(bound, f'{{"a":1,{name}:"x"}}')
    assert not walks.accepts(bind({"type": "string"}), r'"\u0061"')  # one string, one spelling


@pytest.mark.parametrize(
    "schema",
    [
        {"contains": {"type": "integer"}, "items": {"$ref": "#/contains"}},
        {"properties": {"a": {"$ref": "#/not/not"}}, "not": {"not": {"type": "object"}}},
        {"type": "object", "dependentSchemas": {"x": schemas.INTEGER}, "additionalProperties": {"$ref": "#/dependentSchemas/x"}},
    ],
    ids=str,
)  # fmt: skip
def test_references_into_what_only_a_check_knows(schema):
    check_enforced(schema, jsonschema.Draft202012Validator(schema), seed=1)


def test_within_a_string_only_tokens_with_a_quote_are_followed(monkeypatch):
    bound = bind({"type": "array", "uniqueItems": True})
    state = bound.start()
    for byte in b'["a':
        state = bound.advance(state, byte)
    followed = []
    monkeypatch.setattr(
        json_schema, "feed", lambda validator, prefix, text: followed.append(text) or feed(validator, prefix, text)
    )
    assert walks.mask_of(bound, state) == walks.allowed(bound, state)
    assert followed and all(b'"' in text for text in followed)


def test_escapes_are_followed():
    bound = bind({"type": "array", "uniqueItems": True})
    texts = ['"\\""', r'"\\"', r'"\\\""', r'"\n"', '"n"', '"]"', '",["']
    assert walks.accepts(bound, f"[{','.join(texts)}]")
    for text in texts:
        assert not walks.accepts(bound, f"[{text},{text}]"), text
    assert walks.accepts(bind({"enum": ["a\n\t\\u0001"]}), r'"a\n\t\\u0001"')


def test_numbers_that_python_cannot_hold_are_refused():
    for schema in ({"type": "number"}, {"not": {"type": "string"}}):
        bound = bind(schema)
        assert walks.accepts(bound, "1e99") and not walks.accepts(bound, "1e999")
    assert not walks.accepts(bind({"not": {"type": "string"}}), "1" * 5000)


def test_multiples_are_exact_on_decimals():
    bound = bind({"type": "number", "multipleOf": 0.01})
    assert walks.accepts(bound, "19.99") and not walks.accepts(bound, "19.999")


class Color(Enum):
    RED = "red"
    BLUE = 3


@dataclass
class Inner:
    inner: "Inner | None" = None


@dataclass
class Outer:
    text: str
    count: Annotated[int, "at least one"]
    color: Color
    kind: Literal["x", 2]
    pair: tuple[int, str]
    distinct: set[bool] = field(default_factory=set)
    numbers: Sequence[float] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    nested: Inner | None = None


def test_dataclasses():
    bound = bind(Outer)
    valid = {"text": "a", "count": 1, "color": 3, "kind": "x", "pair": [1, "a"], "distinct": [True, False],
             "numbers": [0.5], "extra": {"a": None}, "nested": {"inner": {"inner": None}}}  # fmt: skip
    assert accepts(bound, valid, orders=1)
    assert accepts(bound, {name: valid[name] for name in ("text", "count", "color", "kind", "pair")}, orders=1)
    wrong = {"text": 1, "count": 0.5, "color": "green", "kind": "y", "pair": [1], "distinct": [True, True],
             "numbers": ["a"], "extra": [], "nested": {"other": 1}}  # fmt: skip
    for name, value in wrong.items():
        assert not accepts(bound, valid | {name: value}, orders=1), name
        assert name in ("distinct", "numbers", "extra", "nested") or not accepts(
            bound, {other: valid[other] for other in valid if other != name}, orders=1
        )
    assert not accepts(bound, valid | {"other": 1}, orders=1)


def test_a_dataclass_with_a_type_without_schema_is_refused_with_the_field():
    @dataclass
    class Holder:
        value: complex

    with pytest.raises(ValueError, match=r"Holder\.value.*complex"):
        bind(Holder)


def test_pydantic_models():
    pydantic = pytest.importorskip("pydantic")

    class Person(pydantic.BaseModel):
        name: str = pydantic.Field(min_length=1, max_length=3)
        age: int | None = None
        tags: set[str] | None = None

    bound = bind(Person)
    assert accepts(bound, {"name": "é", "age": None, "tags": ["a", "b"]})
    for wrong in ({}, {"name": ""}, {"name": "aaaa"}, {"name": "a", "age": 0.5}, {"name": "a", "tags": ["a", "a"]}):
        assert not accepts(bound, wrong)


def test_a_schema_with_tuples():
    assert accepts(bind({"type": "object", "properties": {"a": {"enum": (1, 2)}}, "required": ("a",)}), {"a": 2})


def test_a_schema_as_json_text():
    assert walks.accepts(bind('{"enum": [1, 2]}'), "2")
