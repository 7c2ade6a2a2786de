"""Thresholds on scores. A score is |x_j| times a factor f_j that a method takes from the weight (wina, teal, cats), so
a threshold t on scores is a cutoff t / f_j on |x_j|, which is all that the kernels know."""

import torch

# The first position of a sequence is an attention sink with extreme activations, and part of the dense prefill of every
# prompt but one of one token.
FIRST = 1


def scores(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """|x| * factors in float32: x [..., K], factors [K] -> [..., K]."""
    return x.detach().abs().float() * factors


def cutoffs(threshold: float, factors: torch.Tensor) -> torch.Tensor:
    """The cutoff on |x_j| at which the score reaches `threshold`.

    Args:
        threshold: the score up to which an input is skipped, at least 0.
        factors: [..., K] float32, at least 0.

    Returns:
        float32, of the shape of `factors`. Infinite where the factor is 0 (the input never counts).
    """
    return torch.where(factors > 0, threshold / factors, torch.inf).float()


def past_first(x: torch.Tensor) -> torch.Tensor:
    """The rows of x [1, T, K] or [T, K] that count in calibration: [T - FIRST, K]."""
    return x.reshape(-1, x.shape[-1])[FIRST:]


def masked(x: torch.Tensor, cutoff: torch.Tensor) -> torch.Tensor:
    """x [..., K] with zeros for inputs at or under `cutoff` [K] at every position but the first: what decode skips, for
    all positions at once."""
    rows = x.reshape(-1, x.shape[-1])
    keep = rows.abs() > cutoff
    keep[:FIRST] = True
    return (rows * keep).view_as(x)
