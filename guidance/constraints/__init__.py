"""What generated text must satisfy."""

from .base import BoundConstraint, Conjunction, Constraint, UnsatisfiableError
from .grammar import Grammar, Regex
from .predicate import InconsistentPredicateError, Predicate, PredicateError
from .strings import Choice, OneOf, Place, Substring

__all__ = [
    "BoundConstraint",
    "Choice",
    "Conjunction",
    "Constraint",
    "Grammar",
    "InconsistentPredicateError",
    "OneOf",
    "Place",
    "Predicate",
    "PredicateError",
    "Regex",
    "Substring",
    "UnsatisfiableError",
]
