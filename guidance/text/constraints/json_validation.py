"""JSON Schema as a judge of values: draft 2020-12, and what older drafts wrote otherwise.

Validation of finished values, https://json-schema.org/draft/2020-12/json-schema-validation. The grammar that guides
generation leaves out what it cannot express; this does not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from typing import Any

from llguidance import LLMatcher

from hasten.guidance.text.constraints.json_keywords import Schema, resolve
from hasten.guidance.text.vocabulary import BYTES


class Validator:
    """Judges values by a schema that `json_keywords.check` let through. Values are as `json.loads` makes them."""

    def __init__(self, root: Schema):
        self.root = root

    def valid(self, value: Any, schema: Schema) -> bool:
        if isinstance(schema, bool):
            return schema
        return all(
            _ASSERTIONS[keyword](self, value, argument, schema)
            for keyword, argument in schema.items()
            if keyword in _ASSERTIONS
        )

    def together(self, schema: Schema) -> Iterator[dict]:
        """The schema and those that hold whenever it does, through `allOf` and `$ref`."""
        if isinstance(schema, bool):
            return
        yield schema
        for part in schema.get("allOf", ()):
            yield from self.together(part)
        if "$ref" in schema:
            yield from self.together(resolve(self.root, schema["$ref"]))

    def of_property(self, schema: dict, name: str) -> Iterator[Schema]:
        """The schemas that one object schema itself has for a property."""
        known = name in schema.get("properties", {})
        if known:
            yield schema["properties"][name]
        for pattern, part in schema.get("patternProperties", {}).items():
            if re.search(pattern, name):
                known = True
                yield part
        if not known and "additionalProperties" in schema:
            yield schema["additionalProperties"]

    def of_item(self, schema: dict, index: int) -> Iterator[Schema]:
        """The schema that one array schema itself has for an item.

        `items` as an array is `prefixItems` of old, `additionalItems` its `items`.
        """
        items = schema.get("items")
        first, rest = (
            (items, "additionalItems") if isinstance(items, list) else (schema.get("prefixItems", []), "items")
        )
        if index < len(first):
            yield first[index]
        elif rest in schema:
            yield schema[rest]

    def _items(self, value, argument, schema):
        return not isinstance(value, list) or all(
            self.valid(item, part) for index, item in enumerate(value) for part in self.of_item(schema, index)
        )

    def _properties(self, value, argument, schema):
        return not isinstance(value, dict) or all(
            self.valid(item, part) for name, item in value.items() for part in self.of_property(schema, name)
        )

    def _contains(self, value, argument, schema):
        if not isinstance(value, list):
            return True
        found = sum(self.valid(item, argument) for item in value)
        return schema.get("minContains", 1) <= found <= schema.get("maxContains", math.inf)

    def _one_of(self, value, argument, schema):
        return sum(self.valid(value, part) for part in argument) == 1

    def _if(self, value, argument, schema):
        return self.valid(value, schema.get("then" if self.valid(value, argument) else "else", True))

    def _dependent(self, value, argument, schema):
        return not isinstance(value, dict) or all(
            all(other in value for other in needed) if isinstance(needed, list) else self.valid(value, needed)
            for name, needed in argument.items()
            if name in value
        )


def frozen(value: Any) -> Any:
    """Something hashable that is equal for equal JSON values: 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, list):
        return ("array", *map(frozen, value))
    if isinstance(value, dict):
        return frozenset((name, frozen(item)) for name, item in value.items())
    return value


@cache
def _format_matcher(name: str) -> LLMatcher:
    """A matcher of JSON strings of a format, over single bytes."""
    grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "format": name}))
    return LLMatcher(BYTES.llguidance, grammar)


def _format(validator, value, argument, schema):
    if not isinstance(value, str):
        return True
    matcher = _format_matcher(argument).deep_copy()
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting()


def _type(validator, value, argument, schema):
    return any(_IS[name](value) for name in (argument if isinstance(argument, list) else [argument]))


def _multiple_of(validator, value, argument, schema):
    """Exact on decimals as they are written: 0.3 is a multiple of 0.1."""
    return not _is_number(value) or (math.isfinite(value) and Fraction(str(value)) % Fraction(str(argument)) == 0)


def _minimum(validator, value, argument, schema):
    strict = schema.get("exclusiveMinimum") is True
    return not _is_number(value) or (value > argument if strict else value >= argument)


def _maximum(validator, value, argument, schema):
    strict = schema.get("exclusiveMaximum") is True
    return not _is_number(value) or (value < argument if strict else value <= argument)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_IS: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "number": _is_number,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def _counted(kind: type, holds: Callable[[int, int], bool]):
    return lambda validator, value, argument, schema: not isinstance(value, kind) or holds(len(value), argument)


def _at_least(length: int, bound: int) -> bool:
    return length >= bound


def _at_most(length: int, bound: int) -> bool:
    return length <= bound


# keyword -> (validator, value, the keyword's argument, its schema) -> whether the keyword holds
_ASSERTIONS: dict[str, Callable[[Validator, Any, Any, dict], bool]] = {
    "type": _type,
    "enum": lambda validator, value, argument, schema: frozen(value) in set(map(frozen, argument)),
    "const": lambda validator, value, argument, schema: frozen(value) == frozen(argument),
    "multipleOf": _multiple_of,
    "minimum": _minimum,
    "maximum": _maximum,
    "exclusiveMinimum": lambda v, value, argument, s: (
        argument is True or not _is_number(value) or value > argument or argument is False
    ),
    "exclusiveMaximum": lambda v, value, argument, s: (
        argument is True or not _is_number(value) or value < argument or argument is False
    ),
    "minLength": _counted(str, _at_least),
    "maxLength": _counted(str, _at_most),
    "pattern": lambda v, value, argument, s: not isinstance(value, str) or re.search(argument, value) is not None,
    "format": _format,
    "minItems": _counted(list, _at_least),
    "maxItems": _counted(list, _at_most),
    "uniqueItems": lambda v, value, argument, s: (
        not argument or not isinstance(value, list) or len(set(map(frozen, value))) == len(value)
    ),
    "prefixItems": Validator._items,
    "items": Validator._items,
    "contains": Validator._contains,
    "minProperties": _counted(dict, _at_least),
    "maxProperties": _counted(dict, _at_most),
    "required": lambda v, value, argument, s: not isinstance(value, dict) or all(name in value for name in argument),
    "properties": Validator._properties,
    "patternProperties": Validator._properties,
    "additionalProperties": Validator._properties,
    "propertyNames": lambda v, value, argument, s: (
        not isinstance(value, dict) or all(v.valid(n, argument) for n in value)
    ),
    "dependentRequired": Validator._dependent,
    "dependentSchemas": Validator._dependent,
    "dependencies": Validator._dependent,
    "allOf": lambda v, value, argument, s: all(v.valid(value, part) for part in argument),
    "anyOf": lambda v, value, argument, s: any(v.valid(value, part) for part in argument),
    "oneOf": Validator._one_of,
    "not": lambda v, value, argument, s: not v.valid(value, argument),
    "if": Validator._if,
    "$ref": lambda v, value, argument, s: v.valid(value, resolve(v.root, argument)),
}
