"""Uniform numbers, and draws from weights by the inverse of their cumulative distribution (CDF)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Generators = torch.Generator | Sequence[torch.Generator]


def uniforms(rows: int, count: int, generator: Generators) -> torch.Tensor:
    """float64 [rows, count] in (0, 1), on the CPU. A sequence of generators gives row r its numbers from generator r.

    Raises:
        ValueError: another number of generators than rows.
    """
    if isinstance(generator, torch.Generator):
        numbers = torch.rand(rows, count, dtype=torch.float64, generator=generator)
    elif len(generator) != rows:
        raise ValueError(f"generator must be one, or one per row: got {len(generator)} for {rows} rows")
    else:
        numbers = torch.stack([torch.rand(count, dtype=torch.float64, generator=own) for own in generator])
    return numbers.clamp_(min=2.0**-54)


def inverse_cdf(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The index at which the cumulative weights of a row pass each point, in float64.

    Args:
        weights: [R, V], 0 or more, any float dtype and device; a row need not sum to 1.
        points: float64 [R, N] in [0, 1], fractions of a row's sum.

    Returns:
        int64 [R, N] on the weights' device; never an index of weight 0 where another of its row is above 0. Where a row
        has no law (weights of 0 alone, or NaN), some index.
    """
    cdf = weights.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))
    found = torch.searchsorted(cdf, torch.minimum(points.to(cdf.device) * total, below), right=True)
    return found.clamp_(max=weights.shape[1] - 1)
