"""The JSON schema of a dataclass, from its type hints."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

PLAIN = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
    list: {"type": "array"},
    dict: {"type": "object"},
}


def schema_of_dataclass(kind: type) -> dict:
    """An object schema with a property per field, required where the field has no default, and no others.

    Fields may be str, int, float, bool, None, Any, dataclasses (also recursive ones), Enum, Literal, Optional and
    unions, list, tuple, set, Sequence, dict[str, ...] and Annotated, whose metadata is not read.

    Raises:
        ValueError: another type; the message names the field.
    """
    definitions: dict[str, dict] = {}
    reference = _dataclass(kind, definitions)
    return {**reference, "$defs": definitions}


def _dataclass(kind: type, definitions: dict[str, dict]) -> dict:
    name = kind.__qualname__
    if name not in definitions:
        definitions[name] = {}  # a field of the same class refers to it
        hints = get_type_hints(kind, include_extras=True)
        known = [field for field in fields(kind) if field.init]
        properties = {}
        for field in known:
            try:
                properties[field.name] = _schema(hints[field.name], definitions)
            except ValueError as error:
                raise ValueError(f"{name}.{field.name}: {error}") from None
        required = [field.name for field in known if field.default is MISSING and field.default_factory is MISSING]
        definitions[name].update(type="object", properties=properties, required=required, additionalProperties=False)
    return {"$ref": f"#/$defs/{name}"}


def _schema(hint: Any, definitions: dict[str, dict]) -> dict:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in PLAIN:
        return PLAIN[hint]
    if origin is Annotated:
        return _schema(arguments[0], definitions)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(argument, definitions) for argument in arguments]}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [member.value for member in hint]}
    if isinstance(hint, type) and is_dataclass(hint):
        return _dataclass(hint, definitions)
    if origin is tuple and (len(arguments) != 2 or arguments[1] is not ...):
        count = len(arguments)
        items = [_schema(argument, definitions) for argument in arguments]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": count, "maxItems": count}
    if origin in (list, tuple, Sequence):
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin in (set, frozenset):
        return {"type": "array", "items": _schema(arguments[0], definitions), "uniqueItems": True}
    if origin is dict and arguments[0] is str:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    raise ValueError(f"type {hint} has no JSON schema here; write the schema as a dict")
