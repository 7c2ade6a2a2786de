"""Any Python function as a constraint."""

from __future__ import annotations

import codecs
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hasten.guidance.text.constraints.base import BoundConstraint, Constraint, UnsatisfiableError
from hasten.guidance.text.vocabulary import Vocabulary

CACHED = 1 << 16


class PredicateError(RuntimeError):
    """A predicate raised; its own error is the cause."""


class InconsistentPredicateError(ValueError):
    """A predicate refused a text and accepted a longer one that begins with it."""


@dataclass(frozen=True)
class Predicate(Constraint):
    """A function of the generated text must return True.

    Args:
        function: from text (str) to bool. Must be a function of the text alone: its answers are remembered.
        on: "prefix": asked for the text after every token. It must be monotone: what it refuses, it refuses with every
            continuation, because a refused text is never continued; where an answer is seen to break this,
            InconsistentPredicateError says with which texts. "boundary": asked wherever whitespace follows a word, for
            the text up to and without that whitespace, and for the whole text at its end; monotone in the same sense,
            which cannot be seen to break. "complete": asked for the whole text at its end alone.

    A character whose bytes are not all there yet is not part of the text that the function sees; bytes that no
    continuation makes UTF-8 are refused.

    Raises (while generating):
        PredicateError: the function raised; its error is the cause, and the message holds the text.
        TypeError: the function returned something else than a bool.
    """

    function: Callable[[str], bool]
    on: Literal["prefix", "boundary", "complete"] = "prefix"

    def __post_init__(self):
        if self.on not in ("prefix", "boundary", "complete"):
            raise ValueError(f"on={self.on!r}: expected 'prefix', 'boundary' or 'complete'")
        if not callable(self.function):
            raise ValueError(f"a predicate is a function from str to bool, got {self.function!r}")

    def bind(self, vocabulary: Vocabulary) -> BoundConstraint:
        return _BoundPredicate(self, vocabulary)


@dataclass(frozen=True, slots=True)
class _Decoded:
    """text: the characters so far; rest: the bytes of a character that is not finished."""

    text: str = ""
    rest: bytes = b""


class _BoundPredicate(BoundConstraint):
    def __init__(self, predicate: Predicate, vocabulary: Vocabulary):
        super().__init__(vocabulary)
        self._function, self._on = predicate.function, predicate.on
        self._answers: OrderedDict[str, bool] = OrderedDict()
        if self._on == "prefix" and not self._holds(""):
            raise UnsatisfiableError(f"predicate {self._name} refuses the empty text, and so every text")

    def start(self):
        return _Decoded()

    def complete(self, state):
        return not state.rest and self._holds(state.text)

    def _accepts(self, state, token, text):
        after = _decode(state, text)
        if after is None:
            return False
        if self._on == "complete" or after.text == state.text:
            return True
        if self._on == "prefix":
            return self._holds(after.text) and self._is_consistent(state.text, after.text)
        known = max(len(state.text) - 1, 0)
        ends = re.finditer(r"(?<=\S)(?=\s)", after.text[known:])
        return all(self._holds(after.text[: known + end.start()]) for end in ends)

    def _advance(self, state, token, text):
        after = _decode(state, text)
        if after is None:
            raise ValueError(f"token {token} ({text!r}) makes no UTF-8 after {state.text!r} and {state.rest!r}")
        return after

    @property
    def _name(self) -> str:
        return getattr(self._function, "__qualname__", repr(self._function))

    def _holds(self, text: str) -> bool:
        """The function's answer."""
        if text in self._answers:
            self._answers.move_to_end(text)
            return self._answers[text]
        try:
            answer = self._function(text)
        except Exception as error:
            raise PredicateError(
                f"predicate {self._name} raised {type(error).__name__} for the text {text!r}"
            ) from error
        if not isinstance(answer, (bool, np.bool_)):
            raise TypeError(f"predicate {self._name} must return a bool, got {answer!r} for the text {text!r}")
        self._answers[text] = bool(answer)
        if len(self._answers) > CACHED:
            self._answers.popitem(last=False)
        return bool(answer)

    def _is_consistent(self, text: str, longer: str) -> bool:
        """True; raises where a text between the two, which the function accepts, is known to be refused."""
        for end in range(len(text) + 1, len(longer)):
            if self._answers.get(longer[:end]) is False:
                raise InconsistentPredicateError(
                    f"predicate {self._name} refuses {longer[:end]!r} and accepts {longer!r}: what it refuses it must "
                    "refuse with every continuation, or be asked at the end alone (on='complete')"
                )
        return True


def _decode(state: _Decoded, text: bytes) -> _Decoded | None:
    """The state after more bytes; None where they cannot become UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        more = decoder.decode(state.rest + text)
    except UnicodeDecodeError:
        return None
    return _Decoded(state.text + more, decoder.getstate()[0])
