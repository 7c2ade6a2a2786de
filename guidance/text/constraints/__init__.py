"""What generated text must satisfy."""

from .base import BoundConstraint, Conjunction, Constraint, UnsatisfiableError
from .grammar import Grammar, Regex
from .json_schema import JsonSchema
from .predicate import InconsistentPredicateError, Predicate, PredicateError
from .strings import Choice, OneOf, Place, Substring

__all__ = [
    "BoundConstraint",
    "Choice",
    "Conjunction",
    "Constraint",
    "Grammar",
    "InconsistentPredicateError",
    "JsonSchema",
    "OneOf",
    "Place",
    "Predicate",
    "PredicateError",
    "Regex",
    "Substring",
    "UnsatisfiableError",
]
