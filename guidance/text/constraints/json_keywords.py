"""The keywords of JSON Schema that hasten knows: which hold schemas, what their values must be, where `$ref` leads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

Schema = dict[str, Any] | bool

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
ANNOTATIONS = frozenset(
    [
        "$schema",
        "$id",
        "$comment",
        "$anchor",
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "discriminator",
    ]
)  # they assert nothing
FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
COUNTS = frozenset(
    ["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains"]
)
ONE = frozenset(["additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if", "then", "else"])
SEVERAL = frozenset(["allOf", "anyOf", "oneOf", "prefixItems"])
NAMED = frozenset(["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"])
IN_PLACE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas")  # they judge the same value


def children(schema: Schema) -> Iterator[tuple[str, Schema]]:
    """The schemas directly within a schema, each with its JSON pointer from there."""
    for keyword, value in schema.items() if isinstance(schema, dict) else ():
        if keyword in ONE or (keyword == "items" and not isinstance(value, list)):
            yield f"/{keyword}", value
        elif keyword in SEVERAL or keyword == "items":
            yield from ((f"/{keyword}/{i}", part) for i, part in enumerate(value))
        elif keyword in NAMED or keyword == "dependencies":
            for name, part in value.items():
                if not isinstance(part, list):
                    yield f"/{keyword}/{name.replace('~', '~0').replace('/', '~1')}", part


def walk(root: Schema) -> Iterator[tuple[str, Schema]]:
    """The schema and all within it, each with its JSON pointer; a schema comes before those within it."""
    todo = [("#", root)]
    while todo:
        where, schema = todo.pop()
        yield where, schema
        todo += [(where + pointer, part) for pointer, part in children(schema)]


def check(root: Schema) -> None:
    """Refuses a schema that is not wholly understood.

    Raises:
        ValueError: a keyword that is unknown or not supported, or a value that it cannot have; the message names where.
    """
    for where, schema in walk(root):
        if not isinstance(schema, (dict, bool)):
            raise ValueError(f"JSON schema: expected an object or a boolean at {where}, got {schema!r:.60}")
        for keyword, value in schema.items() if isinstance(schema, dict) else ():
            _check_keyword(root, keyword, value, where)
    _refuse_endless(root)


def resolve(root: Schema, reference: str) -> Schema:
    """The schema that a local `$ref` ("#", "#/$defs/name", "#anchor") means.

    Raises:
        ValueError: there is none, or the reference leaves the schema.
    """
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise ValueError(
            f"JSON schema: keyword '$ref' is supported within the schema alone ('#/...'), got {reference!r}"
        )
    found: Any = root
    if reference.startswith("#/") or reference == "#":
        for part in unquote(reference).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(part)] if isinstance(found, list) else found[part]
            except (LookupError, TypeError, ValueError):
                raise ValueError(f"JSON schema: '$ref' {reference!r} leads to nothing, there is no {part!r}") from None
        return found
    for _, schema in walk(root):
        if isinstance(schema, dict) and schema.get("$anchor") == reference[1:]:
            return schema
    raise ValueError(f"JSON schema: '$ref' {reference!r} leads to nothing, no schema has that '$anchor'")


def _check_keyword(root: Schema, keyword: str, value: Any, where: str) -> None:
    expected = None
    if keyword == "$id":
        if where != "#":
            raise ValueError(f"JSON schema: keyword '$id' at {where} is not supported below the root")
    elif keyword in ANNOTATIONS or (keyword.startswith("x-") and keyword != "x-guidance"):
        return
    elif keyword == "type":
        names = value if isinstance(value, list) else [value]
        expected = (
            f"one or several of {', '.join(TYPES)}" if not names or not set(map(str, names)) <= set(TYPES) else None
        )
    elif keyword in COUNTS:
        expected = "an integer of at least 0" if not _is_integer(value) or value < 0 else None
    elif keyword == "multipleOf":
        expected = "a number above 0" if not _is_number(value) or value <= 0 else None
    elif keyword in ("minimum", "maximum"):
        expected = None if _is_number(value) else "a number"
    elif keyword in ("exclusiveMinimum", "exclusiveMaximum"):
        expected = None if _is_number(value) or isinstance(value, bool) else "a number, or a boolean as in draft 4"
    elif keyword == "uniqueItems":
        expected = None if isinstance(value, bool) else "a boolean"
    elif keyword == "enum":
        expected = None if isinstance(value, list) else "an array"
    elif keyword == "required":
        expected = None if _is_strings(value) else "an array of strings"
    elif keyword == "dependentRequired":
        expected = (
            None
            if isinstance(value, dict) and all(map(_is_strings, value.values()))
            else "an object of arrays of strings"
        )
    elif keyword == "dependencies":
        parts = value.values() if isinstance(value, dict) else [None]
        expected = (
            None
            if all(_is_strings(part) or _is_schema(part) for part in parts)
            else "an object of schemas or arrays of strings"
        )
    elif keyword in NAMED:
        expected = None if isinstance(value, dict) else "an object of schemas"
        for pattern in value if keyword == "patternProperties" and expected is None else ():
            _check_pattern(pattern, keyword, where)
    elif keyword in SEVERAL:
        expected = None if isinstance(value, list) and (value or keyword == "prefixItems") else "an array of schemas"
    elif keyword == "items":
        expected = None if _is_schema(value) or isinstance(value, list) else "a schema or an array of schemas"
    elif keyword in ONE:
        expected = None if _is_schema(value) else "a schema"
    elif keyword == "pattern":
        _check_pattern(value, keyword, where)
    elif keyword == "format":
        expected = None if value in FORMATS else f"one of the supported formats {', '.join(FORMATS)}"
    elif keyword == "$ref":
        target = resolve(root, value)
        expected = None if _is_schema(target) else f"a reference to a schema, not to {target!r:.40},"
    elif keyword != "const":
        raise ValueError(
            f"JSON schema: keyword {keyword!r} at {where} is not supported, remove it or enforce it with a Predicate"
        )
    if expected:
        raise ValueError(f"JSON schema: for keyword {keyword!r} at {where} expected {expected}, got {value!r:.60}")
    if keyword in ("enum", "const", "required", "properties") and not _is_spelled(
        list(value) if keyword == "properties" else value
    ):
        raise ValueError(
            f"JSON schema: keyword {keyword!r} at {where} is not supported with control characters other than "
            f"\\b \\f \\n \\r \\t, got {value!r:.60}"
        )


def _check_pattern(pattern: Any, keyword: str, where: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"JSON schema: {keyword!r} at {where} is no regular expression: {pattern!r}: {error}"
        ) from error


def _refuse_endless(root: Schema) -> None:
    """A schema that refers to itself for the same value says nothing, and checking it would not end."""
    done: set[int] = set()

    def visit(schema: Schema, path: frozenset[int]) -> None:
        if not isinstance(schema, dict) or id(schema) in done:
            return
        if id(schema) in path:
            raise ValueError(f"JSON schema: '$ref' leads back to the same value without end, in {schema!r:.80}")
        inner = path | {id(schema)}
        if "$ref" in schema:
            visit(resolve(root, schema["$ref"]), inner)
        for pointer, part in children(schema):
            if pointer.split("/")[1] in (*IN_PLACE, "dependencies"):
                visit(part, inner)
        done.add(id(schema))

    for _, schema in walk(root):
        visit(schema, frozenset())


def _is_spelled(value: Any) -> bool:
    r"""Whether the strings in a value can be written without `\u`."""
    text = json.dumps(value, ensure_ascii=False).replace(r"\\", "")
    return r"\u" not in text and "\x7f" not in text


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_schema(value: Any) -> bool:
    return isinstance(value, (dict, bool))
