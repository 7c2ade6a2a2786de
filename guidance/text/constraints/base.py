"""What a constraint is: written by a user without a tokenizer, bound to a vocabulary, then asked token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.guidance.text import bitmask
from hasten.guidance.text.vocabulary import Vocabulary

SHOWN = 12


class UnsatisfiableError(ValueError):
    """No text satisfies the constraint."""


class Constraint:
    """What generated text must satisfy. Constraints combine with `&`."""

    def bind(self, vocabulary: Vocabulary) -> BoundConstraint:
        """The constraint over the tokens of a vocabulary.

        Raises:
            UnsatisfiableError: it is seen at once that no text of these tokens satisfies it.
        """
        raise NotImplementedError

    def value(self, text: str) -> Any:
        """What a complete text that satisfies the constraint stands for, such as parsed JSON; None: nothing more."""
        return None

    def __and__(self, other: Constraint) -> Conjunction:
        if not isinstance(other, Constraint):
            return NotImplemented
        return Conjunction((*_parts(self), *_parts(other)))


class BoundConstraint:
    """A constraint over the tokens of a vocabulary, from state to state.

    A state belongs to one text. `advance` may move the state that it is given: use what it returns, and fork before it
    if both are needed. Kinds of constraints define `start`, `_accepts`, `_advance` and `complete`; those that can list
    the valid tokens also `_allow`, and then `can_fill_mask` is True.
    """

    can_fill_mask = False

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self._texts = vocabulary.texts
        self._eos = frozenset(vocabulary.eos)
        self._eos_mask = bitmask.allocate(len(vocabulary))
        bitmask.add(self._eos_mask, vocabulary.eos)

    def start(self) -> Any:
        """The state before the first token."""
        raise NotImplementedError

    def check(self, state: Any, token: int) -> bool:
        """Whether the text may go on with this token. The state stays as it is.

        An EOS token is valid where the text is complete; ids that are never text (special, padding, no such id) are
        never valid.
        """
        if token in self._eos:
            return self.complete(state)
        text = self._texts[token] if 0 <= token < len(self._texts) else None
        return text is not None and self._accepts(state, token, text)

    def advance(self, state: Any, token: int) -> Any:
        """The state after a token for which `check` is True. An EOS token leaves the state as it is.

        Raises:
            ValueError: a token that is never text, or that the constraint can tell to be invalid.
        """
        if token in self._eos:
            return state
        text = self._texts[token] if 0 <= token < len(self._texts) else None
        if text is None:
            raise ValueError(f"token {token} is not text, only tokens that check() accepts can be advanced over")
        return self._advance(state, token, text)

    def fork(self, state: Any) -> Any:
        """A state that goes its own way from here."""
        return state

    def complete(self, state: Any) -> bool:
        """Whether the text may end here."""
        raise NotImplementedError

    def fill_mask(self, state: Any, mask_row: np.ndarray) -> bool:
        """Sets bit `t % 32` of word `t // 32` for every valid token t, and clears every other bit.

        Args:
            mask_row: int32 [W] with W >= ceil(V / 32), contiguous.

        Returns:
            Whether the mask was filled; False, and nothing written, where `can_fill_mask` is False.
        """
        if not self.can_fill_mask:
            return False
        words = bitmask.words(len(self._texts))
        if mask_row.dtype != np.int32 or mask_row.ndim != 1 or len(mask_row) < words or not mask_row.flags.c_contiguous:
            raise ValueError(
                f"mask_row must be contiguous int32 with at least {words} words, got {mask_row.dtype} {mask_row.shape}"
            )
        mask_row[:] = 0
        mask = mask_row[:words]
        self._allow(state, mask)
        if self.complete(state):
            mask |= self._eos_mask
        else:
            mask &= ~self._eos_mask
        return True

    def fill_mask_or_check(self, state: Any, mask_row: np.ndarray) -> int:
        """As `fill_mask`, by a check of every token where the constraint cannot list them: the number of checks."""
        if self.fill_mask(state, mask_row):
            return 0
        mask_row[:] = 0
        bitmask.add(mask_row, [token for token in range(len(self._texts)) if self.check(state, token)])
        return len(self._texts)

    def allowed(self, state: Any) -> np.ndarray | None:
        """The valid token ids, ascending; None where the constraint cannot list them."""
        mask = bitmask.allocate(len(self._texts))
        return bitmask.members(mask, len(self._texts)) if self.fill_mask(state, mask) else None

    def allowed_text(self, state: Any) -> str:
        """What may come next, in words for a message."""
        tokens = self.allowed(state)
        if tokens is None:
            return "what a predicate accepts"
        texts = sorted(
            {self._texts[token].decode("utf-8", "backslashreplace") for token in tokens if token not in self._eos}
        )
        shown = [repr(text) for text in texts[:SHOWN]]
        shown += [f"{len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
        shown += ["the end of the text"] if self.complete(state) else []
        return ", ".join(shown) or "nothing"

    def _accepts(self, state: Any, token: int, text: bytes) -> bool:
        raise NotImplementedError

    def _advance(self, state: Any, token: int, text: bytes) -> Any:
        raise NotImplementedError

    def _allow(self, state: Any, mask: np.ndarray) -> None:
        """Sets the bits of the valid tokens in an int32 mask [ceil(V / 32)] of zeros; the caller sets those of EOS."""
        raise NotImplementedError

    def _refuse_if_unsatisfiable(self, what: str) -> None:
        tokens = self.allowed(self.start())
        if tokens is not None and not len(tokens):
            raise UnsatisfiableError(f"{what} is unsatisfiable: no token of the vocabulary may come first")


@dataclass(frozen=True)
class Conjunction(Constraint):
    """Every part holds. What `a & b` makes."""

    parts: tuple[Constraint, ...]

    def bind(self, vocabulary: Vocabulary) -> BoundConstraint:
        return _BoundConjunction([part.bind(vocabulary) for part in self.parts], vocabulary)

    def value(self, text: str) -> Any:
        """The value of the first part that has one."""
        return next((value for part in self.parts if (value := part.value(text)) is not None), None)


class _BoundConjunction(BoundConstraint):
    """The state is the list of the parts' states. Parts that can fill a mask are asked first: the others cost more."""

    def __init__(self, parts: list[BoundConstraint], vocabulary: Vocabulary):
        super().__init__(vocabulary)
        self.parts = sorted(parts, key=lambda part: not part.can_fill_mask)
        self.can_fill_mask = all(part.can_fill_mask for part in parts)
        self._refuse_if_unsatisfiable("the conjunction")

    def start(self):
        return [part.start() for part in self.parts]

    def fork(self, state):
        return [part.fork(own) for part, own in zip(self.parts, state, strict=True)]

    def complete(self, state):
        return all(part.complete(own) for part, own in zip(self.parts, state, strict=True))

    def allowed_text(self, state):
        if self.can_fill_mask:
            return super().allowed_text(state)
        return " and ".join(part.allowed_text(own) for part, own in zip(self.parts, state, strict=True))

    def _accepts(self, state, token, text):
        return all(part._accepts(own, token, text) for part, own in zip(self.parts, state, strict=True))

    def _advance(self, state, token, text):
        return [part._advance(own, token, text) for part, own in zip(self.parts, state, strict=True)]

    def _allow(self, state, mask):
        mask[:] = -1
        row = np.empty_like(mask)
        for part, own in zip(self.parts, state, strict=True):
            row[:] = 0
            part._allow(own, row)
            mask &= row


def _parts(constraint: Constraint) -> tuple[Constraint, ...]:
    return constraint.parts if isinstance(constraint, Conjunction) else (constraint,)
