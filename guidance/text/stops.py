"""Where the text that a constraint is about begins and ends: after a marker, and before a stop string."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.guidance.text.constraints.base import BoundConstraint


class Stops:
    """The strings that end a text. They are looked for in bytes, so that it does not matter how tokens cut them.

    Raises:
        ValueError: one that is no string, or empty.
    """

    def __init__(self, strings: tuple[str, ...]):
        for string in strings:
            if not isinstance(string, str) or not string:
                raise ValueError(f"stop must be strings that are not empty, got {string!r}")
        self._strings = tuple(string.encode() for string in strings)
        self._longest = max(map(len, self._strings), default=0)

    def find(self, text: bytes, known: int) -> int | None:
        """Where the first of them begins; None if there is none. `known`: so much of the text is known to hold none."""
        begin = max(0, known - self._longest + 1)
        found = [place for string in self._strings if (place := text.find(string, begin)) >= 0]
        return min(found, default=None)

    def certain(self, text: bytes) -> int:
        """The length of what cannot become part of one of them."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._strings):
                return len(text) - length
        return len(text)


def holds(bound: BoundConstraint, text: bytes) -> bool:
    """Whether a complete text satisfies a constraint that is bound to `vocabulary.BYTES`."""
    state = bound.start()
    for byte in text:
        if not bound.check(state, byte):
            return False
        state = bound.advance(state, byte)
    return bound.complete(state)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Before the marker; `tail` may be its beginning."""

    tail: bytes


class After(BoundConstraint):
    """A constraint on what follows the token that completes a marker. Before it every token may come but EOS.

    The state is `Waiting`, then that of the constraint.
    """

    def __init__(self, constraint: BoundConstraint, marker: str):
        super().__init__(constraint.vocabulary)
        self._constraint, self._marker = constraint, marker.encode()
        self.can_fill_mask = constraint.can_fill_mask

    def start(self) -> Any:
        return Waiting(b"")

    def check(self, state: Any, token: int) -> bool:
        if isinstance(state, Waiting):
            return token not in self._eos
        return self._constraint.check(state, token)

    def advance(self, state: Any, token: int) -> Any:
        if not isinstance(state, Waiting):
            return self._constraint.advance(state, token)
        seen = state.tail + self.vocabulary.tokens[token]
        if self._marker in seen:
            return self._constraint.start()
        return Waiting(seen[max(0, len(seen) - len(self._marker) + 1) :])

    def fork(self, state: Any) -> Any:
        return state if isinstance(state, Waiting) else self._constraint.fork(state)

    def complete(self, state: Any) -> bool:
        return not isinstance(state, Waiting) and self._constraint.complete(state)

    def fill_mask(self, state: Any, mask_row: np.ndarray) -> bool:
        if not isinstance(state, Waiting):
            return self._constraint.fill_mask(state, mask_row)
        mask_row[:] = -1
        mask_row[: len(self._eos_mask)] = ~self._eos_mask
        return True

    def allowed_text(self, state: Any) -> str:
        if isinstance(state, Waiting):
            return f"anything up to {self._marker.decode()!r}"
        return self._constraint.allowed_text(state)
