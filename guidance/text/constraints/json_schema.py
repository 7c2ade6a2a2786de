"""JSON Schema: a grammar for what grammars express, and checks of values for the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any

import numpy as np
from llguidance import LLMatcher

from hasten.guidance.text import bitmask
from hasten.guidance.text.constraints import json_keywords
from hasten.guidance.text.constraints.base import BoundConstraint, Constraint, UnsatisfiableError
from hasten.guidance.text.constraints.dataclass_schema import schema_of_dataclass
from hasten.guidance.text.constraints.grammar import NO_FORCING, BoundGrammar
from hasten.guidance.text.constraints.json_keywords import Schema
from hasten.guidance.text.constraints.json_prefix import ENDING, Prefix, accepts, feed
from hasten.guidance.text.constraints.json_validation import Validator
from hasten.guidance.text.vocabulary import Vocabulary

# Keywords that llguidance 1.9 refuses; they are checked on values.
CHECKED = frozenset(
    [
        "not",
        "uniqueItems",
        "if",
        "then",
        "else",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "contains",
        "minContains",
        "maxContains",
        "propertyNames",
    ]
)
# No \\u: one string, one spelling. `{"a": 1, "\\u0061": "x"}` would give a property twice, once past its schema.
ESCAPES = '"\\bfnrt'


@dataclass(frozen=True)
class JsonSchema(Constraint):
    r"""The text is JSON that a schema accepts.

    Every keyword of draft 2020-12 is either enforced (older spellings too: `definitions`, `dependencies`, `items` as an
    array, `additionalItems`, boolean `exclusiveMinimum`) or refused by name: `unevaluatedItems`,
    `unevaluatedProperties`, `$dynamicRef`, references out of the schema, unknown keywords, unknown formats. `format` is
    enforced. What llguidance's grammars do not express is checked on each value as soon as it ends.

    Of the spellings of a value one is generated: properties in the schema's order and then others, no `\u` escapes (and
    so no control characters but `\b \f \n \r \t`), integers without a point, no exponents where a number has bounds, at
    most `whitespace` between two tokens. Classes in patterns (`\w`, `\d`) mean ASCII, as in ECMAScript.

    Args:
        schema: a dict, a boolean, the JSON text of one, a pydantic model or a dataclass.
        whitespace: a regular expression of what may stand between two tokens of JSON. It must be bounded, or a model
            may never stop.

    Raises (from bind):
        UnsatisfiableError: no value satisfies the schema.
        ValueError: no valid schema, or one with something that cannot be enforced; the message names the keyword and
            where it stands.
    """

    schema: Any
    whitespace: str = r"[ ]?|\n[ ]{0,16}"

    def bind(self, vocabulary: Vocabulary) -> BoundConstraint:
        schema = self.to_dict()
        try:
            json_keywords.check(schema)
            relaxed = _relaxed(schema, coerce=False)
            coerced = _relaxed(schema, coerce=True)
        except RecursionError:
            raise ValueError("JSON schema: schemas are nested too deeply") from None
        try:
            grammar = BoundGrammar(self._lark(relaxed), vocabulary, "JSON schema")
        except UnsatisfiableError:
            raise
        except ValueError:
            relaxed = coerced
            grammar = BoundGrammar(self._lark(relaxed), vocabulary, "JSON schema")
        # a grammar counts a property twice that is given twice
        counted = any(isinstance(part, dict) and "minProperties" in part for _, part in json_keywords.walk(schema))
        return _BoundJsonSchema(grammar, schema, followed=counted or relaxed != schema)

    def value(self, text: str) -> Any:
        """The parsed JSON."""
        return json.loads(text)

    def to_dict(self) -> Schema:
        """The schema as JSON Schema writes it."""
        schema = self.schema
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise ValueError(f"JSON schema: no JSON: {error}") from error
        elif isinstance(schema, type) and hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        elif isinstance(schema, type) and is_dataclass(schema):
            schema = schema_of_dataclass(schema)
        if not isinstance(schema, (dict, bool)):
            raise ValueError(
                "JSON schema: expected a dict, a boolean, JSON text, a pydantic model or a dataclass, "
                f"got {schema!r:.60}"
            )
        try:
            return json.loads(json.dumps(schema, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"JSON schema: {schema!r:.60} cannot be written as JSON: {error}") from error

    def _lark(self, schema: Schema) -> str:
        options = {"whitespace_pattern": self.whitespace, "json_allowed_escapes": ESCAPES}
        schema = {"x-guidance": options} | (schema if isinstance(schema, dict) else {} if schema else {"enum": []})
        return f"start: %json {json.dumps(schema)}{NO_FORCING}"


class _BoundJsonSchema(BoundConstraint):
    """The state is the matcher and the prefix; what the grammar does not express is checked value by value on the
    prefix.
    """

    can_fill_mask = True

    def __init__(self, grammar: BoundGrammar, schema: Schema, followed: bool):
        super().__init__(grammar.vocabulary)
        self._grammar, self._followed = grammar, followed
        self._validator = Validator(schema)
        texts = [text if followed and text is not None else b"" for text in self._texts]
        self._ending = [not ENDING.isdisjoint(text) for text in texts]
        self._ending_tokens = np.flatnonzero(self._ending)
        self._quoting_tokens = np.array(
            [token for token in self._ending_tokens if b'"' in texts[token]], dtype=np.int64
        )
        self._refuse_if_unsatisfiable("JSON schema")

    def start(self):
        return self._grammar.start(), Prefix()

    def fork(self, state):
        return self._grammar.fork(state[0]), state[1]

    def complete(self, state):
        matcher, prefix = state
        return self._grammar.complete(matcher) and accepts(self._validator, prefix.text)

    def _accepts(self, state, token, text):
        matcher, prefix = state
        if not self._grammar._accepts(matcher, token, text):
            return False
        if not self._ending[token] or (prefix.in_string and b'"' not in text):
            return True
        return feed(self._validator, prefix, text) is not None

    def _advance(self, state, token, text):
        matcher, prefix = state
        after = feed(self._validator, prefix, text) if self._followed else Prefix(prefix.text + text)
        if after is None:
            raise ValueError(f"JSON schema: {text!r} after {prefix.text!r} ends a value that the schema refuses")
        return self._grammar._advance(matcher, token, text), after

    def _allow(self, state, mask):
        matcher, prefix = state
        self._grammar._allow(matcher, mask)
        ending = self._quoting_tokens if prefix.in_string else self._ending_tokens  # only a quote ends a string
        allowed = ending[bitmask.contains(mask, ending)].tolist()
        refused = [token for token in allowed if feed(self._validator, prefix, self._texts[token]) is None]
        if refused:
            bitmask.remove(mask, refused)


def _relaxed(schema: Schema, coerce: bool) -> Schema:
    """The whole schema relaxed, without references to what was left out."""
    relaxed = _relax(schema, coerce)
    for _, part in list(json_keywords.walk(relaxed)):
        if isinstance(part, dict) and "$ref" in part:
            try:
                json_keywords.resolve(relaxed, part["$ref"])
            except ValueError:
                del part["$ref"]
    return relaxed


def _relax(schema: Schema, coerce: bool) -> Schema:
    """A schema that llguidance compiles and that accepts whatever `schema` accepts; `schema` itself if nothing had to
    go.

    coerce: also what llguidance only takes in some forms goes: `oneOf` becomes `anyOf`; the numbers of properties, and
    `patternProperties` with the `additionalProperties` that rest on them, are left out.
    """
    if isinstance(schema, bool):
        return schema
    if schema.get("not") in (True, {}):  # as some generators of schemas write "never"
        return False
    relaxed: dict[str, Any] = {}
    alternatives = []
    open_names = ("patternProperties", "additionalProperties") if "patternProperties" in schema else ()
    for keyword, value in schema.items():
        if keyword in CHECKED:
            continue
        if coerce and (keyword in ("minProperties", "maxProperties") or keyword in open_names):
            continue
        if keyword == "multipleOf" and not (isinstance(value, int) or value.is_integer()):
            continue  # llguidance knows 1.25 as a multiple of 0.25, and not 1.5
        if keyword == "pattern" and not _compiles(value):
            continue
        if keyword == "oneOf" and coerce:
            alternatives.append({"anyOf": _each(value, lambda part: _relax(part, coerce))})
            continue
        relaxed[keyword] = _inside(keyword, value, lambda part: _relax(part, coerce))
    if alternatives:
        relaxed["allOf"] = [*relaxed.get("allOf", []), *alternatives]
    return relaxed


def _inside(keyword: str, value: Any, change: Callable[[Schema], Schema]) -> Any:
    """The value of a keyword with its schemas changed."""
    if keyword in json_keywords.NAMED:
        return {name: change(part) for name, part in value.items()}
    if keyword in json_keywords.SEVERAL or (keyword == "items" and isinstance(value, list)):
        return _each(value, change)
    return change(value) if keyword in json_keywords.ONE or keyword == "items" else value


def _each(schemas: list[Schema], change: Callable[[Schema], Schema]) -> list[Schema]:
    return [change(part) for part in schemas]


@cache
def _compiles(pattern: str) -> bool:
    """Whether llguidance takes a pattern (it takes no look-around)."""
    grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "pattern": pattern}))
    return not LLMatcher.validate_grammar(grammar)
