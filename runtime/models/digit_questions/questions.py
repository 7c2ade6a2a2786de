"""Questions about scenes of digits, and the seeded generator of questions with their pictures and answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hasten.models.digit_questions.scenes import DIGIT, draw_scenes, handwritten

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
KINDS = ("place", "where", "count", "count_of", "sum")
ABSENT = 0.25  # the share of questions of kind count_of that ask for a digit that is not there


@dataclass(frozen=True)
class PlacedDigit:
    """A digit of a picture. place: one of PLACES. box: left, top, right, bottom in pixels, the last two
    excluded.
    """

    value: int
    place: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Sample:
    """A question about a picture.

    image: uint8 [72, 72, 3], grey. kind: "place" (which digit is there), "where" (the place of a digit that is there
        once), "count" (of all digits), "count_of" (of one value) or "sum". digits: row by row from the top left.
    """

    image: np.ndarray
    question: str
    answer: str
    kind: str
    digits: tuple[PlacedDigit, ...]

    @cached_property
    def prompt(self) -> str:
        """The text for the processor, with the picture before the question."""
        return f"<image>\n{self.question}"


def ask(kind: str, values: np.ndarray, rng: np.random.Generator) -> tuple[str, str] | None:
    """A question of a kind about one scene, values [9] as in Scenes, and its answer; None where the kind has none."""
    present = np.flatnonzero(values >= 0)
    counts = np.bincount(values[present], minlength=10)
    if kind == "place":
        place = rng.choice(present)
        return f"which digit is {PLACES[place]} ?", str(values[place])
    if kind == "where":
        unique = np.flatnonzero(counts == 1)
        if not len(unique):
            return None
        value = rng.choice(unique)
        return f"where is the {value} ?", PLACES[int(np.flatnonzero(values == value)[0])]
    if kind == "count":
        return "how many digits are there ?", str(len(present))
    if kind == "count_of":  # each number of copies that occurs is as likely as every other
        copies = 0 if rng.random() < ABSENT else rng.choice(np.unique(counts[counts > 0]))
        return f"how many {rng.choice(np.flatnonzero(counts == copies))} are there ?", str(copies)
    if kind == "sum":
        return "what is the sum of the digits ?", str(values[present].sum())
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")


def digit_questions(count: int, seed: int, held_out: bool = True) -> list[Sample]:
    """`count` questions with their pictures, the kinds in turn. Question i depends on seed, i and held_out alone.

    Args:
        count: of questions.
        seed: not negative.
        held_out: of the digits that the embedded model "digits-llava" has never seen, otherwise of those of its
            training.

    Raises:
        ImportError: scikit-learn, which brings the digits, is not installed.
    """
    return [_question(KINDS[i % len(KINDS)], np.random.default_rng([seed, i]), held_out) for i in range(count)]


def _question(kind: str, rng: np.random.Generator, held_out: bool) -> Sample:
    while True:
        scene = draw_scenes(1, rng, handwritten(held_out))
        values = scene.values[0]
        if asked := ask(kind, values, rng):
            break
    digits = []
    for place in np.flatnonzero(values >= 0):
        top, left = map(int, scene.corners[0, place])
        digits.append(PlacedDigit(int(values[place]), PLACES[place], (left, top, left + DIGIT, top + DIGIT)))
    return Sample(np.repeat(scene.images[0][..., None], 3, axis=-1), *asked, kind, tuple(digits))
