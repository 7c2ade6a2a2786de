"""Weight-informed activation sparsity, WINA (Chen et al. 2025, arXiv 2505.19427): input j scores
|x_j| * ||W[:, j]||_2."""

import torch

ROWS = 256  # summed at a time, so that little is held in float32


def wina(weight: torch.Tensor) -> torch.Tensor:
    """The factor of every input in its score: the Euclidean norm of its column, in float32.

    weight [..., N, K] -> [..., K].
    """
    return sum(rows.float().square().sum(-2) for rows in weight.split(ROWS, -2)).sqrt()
