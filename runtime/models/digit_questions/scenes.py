"""Scenes: two to five handwritten digits in a square picture of 3 x 3 cells.

The digits are scikit-learn's (Alpaydin and Kaynak, UCI "Optical Recognition of Handwritten Digits", CC BY 4.0), split
by a seed into digits for training and held-out digits.

Shapes: N digits of 8 x 8 grey levels from 0 to 16; B scenes of 72 x 72 pixels, bright digits on a dark, slightly noisy
ground; 9 places, row by row from the top left.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

SIDE, DIGIT, CELLS = 72, 8, 3  # pixels of a picture and of a digit, cells along a side
CELL = SIDE // CELLS
FEWEST, MOST = 2, 5  # digits of a scene
NOISE, INK = 24, 14  # the ground is 0 to NOISE; a grey level of a digit adds INK
REPEATED = 0.4  # the share of digits that repeat one of their scene
SPLIT_SEED, HELD_OUT_SHARE = 0, 0.2


@dataclass(frozen=True, eq=False)
class Scenes:
    """images: uint8 [B, 72, 72]. values: int64 [B, 9], the digit at each place, -1 where there is none. corners: int64
    [B, 9, 2], the row and the column of each place's digit's upper left pixel.
    """

    images: np.ndarray
    values: np.ndarray
    corners: np.ndarray


@cache
def handwritten(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """The digits of one side of the split, uint8 [N, 8, 8], and their values, int64 [N]; a fifth of each value is held
    out.

    Raises:
        ImportError: scikit-learn, which brings the digits, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the questions about digits need scikit-learn: pip install scikit-learn") from error
    images, values = load_digits(return_X_y=True)
    parts = train_test_split(images, values, test_size=HELD_OUT_SHARE, stratify=values, random_state=SPLIT_SEED)
    train, held, train_values, held_values = parts
    chosen, labels = (held, held_values) if held_out else (train, train_values)
    return chosen.reshape(-1, DIGIT, DIGIT).astype(np.uint8), labels.astype(np.int64)


def draw_scenes(count: int, rng: np.random.Generator, digits: tuple[np.ndarray, np.ndarray]) -> Scenes:
    """`count` scenes of digits as `handwritten` returns them, with every value among them.

    A scene's number of digits is even over 2 to 5, its places are any, and its values are even over 0 to 9 but for
    those that repeat; a digit lies anywhere in its cell.
    """
    rows, places = np.arange(count)[:, None], CELLS * CELLS
    order = rng.permuted(np.broadcast_to(np.arange(places), (count, places)), axis=1)[:, :MOST]
    values = rng.integers(10, size=(count, MOST))
    for i in range(1, MOST):
        repeats = rng.random(count) < REPEATED
        values[repeats, i] = values[repeats, rng.integers(i, size=count)[repeats]]
    values[np.arange(MOST) >= rng.integers(FEWEST, MOST + 1, size=(count, 1))] = -1

    by_place = np.full((count, places), -1)
    by_place[rows, order] = values
    place = np.arange(places)
    corners = np.stack([place // CELLS, place % CELLS], axis=-1) * CELL
    corners = corners + rng.integers(CELL - DIGIT + 1, size=(count, places, 2))

    pictures = _pictures_of(by_place, rng, *digits)  # [B, 9, 8, 8]
    b, p = np.nonzero(by_place >= 0)
    within = np.arange(DIGIT)
    y, x = (corners[b, p, axis, None] + within for axis in (0, 1))
    images = rng.integers(NOISE + 1, size=(count, SIDE, SIDE), dtype=np.uint8)
    images[b[:, None, None], y[:, :, None], x[:, None, :]] += INK * pictures[b, p]
    return Scenes(images, by_place, corners)


def _pictures_of(values: np.ndarray, rng: np.random.Generator, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A digit for each value, any of those that have it, [*values.shape, 8, 8]; nothing for -1."""
    by_value = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=10)
    first = np.cumsum(counts) - counts
    asked = values.clip(0)
    index = first[asked] + (rng.random(values.shape) * counts[asked]).astype(np.int64)
    return images[by_value[index]] * (values >= 0).astype(np.uint8)[..., None, None]
