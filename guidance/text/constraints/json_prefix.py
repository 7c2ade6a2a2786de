"""Which values are finished in the beginning of a JSON text, and whether they satisfy a schema.

What no grammar expresses (`not`, `uniqueItems`, ...) is checked where it can first be known: a value when it ends, a
repeated item when it ends, a property's name when it ends. Only schemas that must hold are asked, those on the way
through `properties`, `items`, `allOf` and `$ref`; the alternatives of `anyOf` are judged with the value that they
belong to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hasten.guidance.text.constraints.json_keywords import Schema
from hasten.guidance.text.constraints.json_validation import Validator, frozen

ENDING = frozenset(b'",]} \t\n\r')  # the bytes that a value may end with or before
SPACE = b" \t\n\r"
_NEVER = object()


@dataclass(frozen=True, slots=True)
class _Container:
    """An open object or array: where it begins, the schemas that hold for it, its current property, its items' number.

    items: its items so far, where they must be distinct.
    """

    begin: int
    is_object: bool
    schemas: tuple[Schema, ...]
    name: str | None = None
    count: int = 0
    items: frozenset | None = None


@dataclass(frozen=True, slots=True)
class Prefix:
    """The beginning of a valid JSON text. scalar: where the unfinished string, number or literal begins, or -1."""

    text: bytes = b""
    open: tuple[_Container, ...] = ()
    scalar: int = -1
    in_string: bool = False
    escaped: bool = False


def feed(validator: Validator, prefix: Prefix, more: bytes) -> Prefix | None:
    """The prefix with more bytes behind it; None if a value or name that ends in them breaks the schema."""
    text = prefix.text + more
    open_, scalar, in_string, escaped = prefix.open, prefix.scalar, prefix.in_string, prefix.escaped
    for at in range(len(prefix.text), len(text)):
        byte = text[at : at + 1]
        if in_string:
            if escaped or byte == b"\\":
                escaped = not escaped
            elif byte == b'"':
                in_string = False
                open_ = _end(validator, open_, text[scalar : at + 1])
                scalar = -1
        elif byte == b'"':
            in_string, scalar = True, at
        elif byte in (b",", b"]", b"}") or byte in SPACE:
            if scalar >= 0:
                open_ = _end(validator, open_, text[scalar:at])
                scalar = -1
            if open_ is not None and byte in (b"]", b"}"):
                open_ = _end(validator, open_[:-1], text[open_[-1].begin : at + 1])
            elif open_ is not None and byte == b",":
                open_ = (*open_[:-1], replace(open_[-1], name=None))
        elif byte in (b"{", b"["):
            open_ = (*open_, _container(validator, open_, at, byte == b"{"))
        elif byte != b":" and scalar < 0:
            scalar = at
        if open_ is None:
            return None
    return Prefix(text, open_, scalar, in_string, escaped)


def accepts(validator: Validator, text: bytes) -> bool:
    """Whether a whole JSON text satisfies the schema."""
    value = _parse(text)
    return value is not _NEVER and validator.valid(value, validator.root)


def _parse(text: bytes) -> Any:
    """The value of a JSON text; `_NEVER`, which no schema accepts, for 1e999 and integers of thousands of digits."""
    try:
        return json.loads(text, parse_float=_finite)
    except (ValueError, RecursionError):
        return _NEVER


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large for a float")
    return value


def _end(validator: Validator, open_: tuple[_Container, ...], text: bytes) -> tuple[_Container, ...] | None:
    """What is open after a value, or a property's name, that has just ended; None if it breaks a schema."""
    value = _parse(text)
    if value is _NEVER:
        return None
    inner = open_[-1] if open_ else None
    if inner is not None and inner.is_object and inner.name is None:
        inner = replace(inner, name=value)
        names = [part["propertyNames"] for part in _together(validator, inner.schemas) if "propertyNames" in part]
        if not all(validator.valid(value, part) for part in names) or False in _of_value(validator, inner):
            return None
        return (*open_[:-1], inner)
    if not all(validator.valid(value, part) for part in _of_value(validator, inner)):
        return None
    if inner is None or inner.is_object:
        return open_
    if inner.items is None:
        return (*open_[:-1], replace(inner, count=inner.count + 1))
    item = frozen(value)
    return (
        None
        if item in inner.items
        else (*open_[:-1], replace(inner, count=inner.count + 1, items=inner.items | {item}))
    )


def _container(validator: Validator, open_: tuple[_Container, ...], at: int, is_object: bool) -> _Container:
    schemas = tuple(_of_value(validator, open_[-1] if open_ else None))
    distinct = not is_object and any(part.get("uniqueItems") for part in _together(validator, schemas))
    return _Container(at, is_object, schemas, items=frozenset() if distinct else None)


def _of_value(validator: Validator, inner: _Container | None) -> Iterator[Schema]:
    """The schemas that hold for the value that comes next, or is just ending, in the innermost container."""
    if inner is None:
        yield validator.root
        return
    for part in _together(validator, inner.schemas):
        if inner.is_object:
            yield from validator.of_property(part, inner.name)
        else:
            yield from validator.of_item(part, inner.count)


def _together(validator: Validator, schemas: tuple[Schema, ...]) -> Iterator[dict]:
    for schema in schemas:
        yield from validator.together(schema)
