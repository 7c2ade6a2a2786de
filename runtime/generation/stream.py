"""Text that is given away while it grows, in pieces that nothing takes back."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from hasten.generation.results import Generated, refuse_dead, results_of
from hasten.guidance.text.constraints import Constraint
from hasten.guidance.text.particles import ParticleFilter
from hasten.guidance.text.stops import Stops


class Printer:
    """Turns growing bytes into pieces of text that no later byte changes."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._printed = 0

    def print(self, text: bytes, certain: int, final: bool = False) -> str:
        """What has become certain since the last call."""
        piece = self._decoder.decode(text[self._printed : certain], final)
        self._printed = max(self._printed, certain)
        return piece


class Stream:
    """Pieces of text as they become certain. After the last one, `result` is the whole `Generated`."""

    def __init__(self, texts: ParticleFilter, constraint: Constraint | None, stops: tuple[str, ...], on_dead: str):
        self.result: Generated | None = None
        self._pieces = self._run(texts, constraint, Stops(stops), on_dead)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self, texts: ParticleFilter, constraint: Constraint | None, stops: Stops, on_dead: str) -> Iterator[str]:
        printer, particle = Printer(), texts.particles[0]
        for _ in texts:
            certain = stops.certain(particle.text) if particle.status is None else len(particle.text)
            if piece := printer.print(particle.text, certain):
                yield piece
        if piece := printer.print(particle.text, len(particle.text), final=True):
            yield piece
        results = results_of(texts, constraint)
        self.result = results[0]
        refuse_dead(results, on_dead)
