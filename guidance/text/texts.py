"""Texts in the making: what a drawn token adds to one, and how it ends."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from hasten.guidance.text.constraints.base import BoundConstraint, Constraint
from hasten.guidance.text.stops import After, Stops, Waiting, holds
from hasten.guidance.text.vocabulary import BYTES, Vocabulary

Status = Literal["complete", "stopped", "length", "incomplete", "dead"]

SHOWN = 80


@dataclass(slots=True)
class Particle:
    """One text in the making.

    prompt: which of the prompts it continues.
    state: of the constraint.
    tokens: what was drawn, EOS too.
    text: the bytes that the constraint is about, without EOS and without a stop string.
    preamble: those before, if there is a marker to wait for.
    checks: how many tokens the constraint was asked about.
    status: None while it grows; then "complete" (EOS), "stopped" (a stop string), "length" (the limit of tokens),
        "incomplete" (that limit, and the constraint is not satisfied) or "dead" (no token could follow).
    reason: for the last two, in words.
    score: the critic's, with the text that it is of.
    mask_first: whether the next token is drawn by a mask at once.
    """

    prompt: int
    state: Any = None
    tokens: list[int] = field(default_factory=list)
    text: bytes = b""
    preamble: bytes = b""
    checks: int = 0
    status: Status | None = None
    reason: str = ""
    score: tuple[bytes, float] | None = None
    mask_first: bool = False

    def die(self, reason: str, status: Literal["incomplete", "dead"] = "dead") -> None:
        """Ends the text without success; the particle's `reason` is this one and the place."""
        self.status, self.reason = status, f"{self.where}: {reason}"

    @property
    def where(self) -> str:
        """How far the text has come, for a message."""
        text = (self.preamble + self.text).decode("utf-8", "replace")
        return f"at token {len(self.tokens)}, after {text if len(text) <= SHOWN else '…' + text[-SHOWN:]!r}"


class Texts:
    """How the texts of one call grow: by tokens of a vocabulary, under a constraint, up to a stop string.

    Args:
        vocabulary: the tokens.
        constraint: what the texts must satisfy; None: anything.
        start_after: the constraint is about what follows the token that completes this string.
        stops: strings that end a text, which is cut before them.

    Attributes:
        bound: the constraint over the vocabulary, from the marker on.

    Raises:
        ValueError: a constraint that is none, a marker without a constraint, an empty marker or stop string.
        UnsatisfiableError: no text satisfies the constraint.
    """

    def __init__(
        self, vocabulary: Vocabulary, constraint: Constraint | None, start_after: str | None, stops: tuple[str, ...]
    ):
        if constraint is not None and not isinstance(constraint, Constraint):
            raise ValueError(f"constraint must be a Constraint such as hasten.Regex(...), got {constraint!r:.60}")
        if start_after is not None and (constraint is None or not start_after or not isinstance(start_after, str)):
            raise ValueError(
                f"start_after={start_after!r} says where a constraint begins: give a marker and a constraint"
            )
        self._vocabulary, self._constraint, self._stops = vocabulary, constraint, Stops(stops)
        self.bound = None if constraint is None else constraint.bind(vocabulary)
        if start_after is not None:
            self.bound = After(self.bound, start_after)

    def start(self, prompt: int) -> Particle:
        """An empty text behind a prompt."""
        return Particle(prompt, None if self.bound is None else self.bound.start())

    def fork(self, particle: Particle) -> Particle:
        """The same text, to go its own way from here."""
        state = None if self.bound is None else self.bound.fork(particle.state)
        return replace(particle, state=state, tokens=list(particle.tokens))

    def append(self, particle: Particle, token: int) -> None:
        """Adds a token that the constraint accepts."""
        particle.tokens.append(token)
        if token in self._vocabulary.eos:
            particle.status = "complete"
            return
        waiting = isinstance(particle.state, Waiting)
        if self.bound is not None:
            particle.state = self.bound.advance(particle.state, token)
        if waiting:
            particle.preamble += self._vocabulary.tokens[token]
        elif token not in self._vocabulary.special:
            known = len(particle.text)
            particle.text += self._vocabulary.tokens[token]
            place = self._stops.find(particle.text, known)
            if place is not None:
                self._stop(particle, place)

    def end(self, particle: Particle, limit: int) -> None:
        """Ends a text at the limit of tokens."""
        if self.bound is None or self.bound.complete(particle.state):
            particle.status = "length"
        else:
            allowed = self.bound.allowed_text(particle.state)
            reached = f"max_new_tokens={limit} is reached and the text is not complete"
            particle.die(f"{reached}, the constraint allows {allowed}", "incomplete")

    def _stop(self, particle: Particle, place: int) -> None:
        """Ends a text before a stop string, if it satisfies the constraint there: tokens may reach
        across the border."""
        particle.text = particle.text[:place]
        if self._constraint is None or holds(self._on_bytes, particle.text):
            particle.status = "stopped"
        else:
            particle.die("a stop string, but the text does not satisfy the constraint")

    @cached_property
    def _on_bytes(self) -> BoundConstraint:
        return self._constraint.bind(BYTES)
