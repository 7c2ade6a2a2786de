"""Scores that say which inputs of a projection matter, and the cutoffs that turn a score threshold into one comparison per input.

A projection y = W x, W [N, K], may skip column j when its score is small. WINA scores |x_j| * ||W[:, j]||_2 (Chen et al. 2025, arXiv 2505.19427),
TEAL scores |x_j| (Liu et al. 2024, arXiv 2408.14690). Both are |x_j| times a weight per column, so a threshold t on the score is a
cutoff t / weight_j on |x_j|, which is all that the kernels know.
"""

import torch


def column_norms(weight: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of every column of `weight` [N, K], in float32: [K]."""
    return torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)


def cutoffs(threshold: float, column_weights: torch.Tensor) -> torch.Tensor:
    """The cutoff on |x_j| at which the score |x_j| * column_weights_j reaches `threshold`.

    Args:
        threshold: the score up to which a column is skipped, at least 0.
        column_weights: [K] float32, at least 0.

    Returns:
        [K] float32. Infinite where the column's weight is 0 (it never counts), 0 where only exact zeros are skipped.
    """
    return torch.where(column_weights > 0, threshold / column_weights, torch.inf).float()
