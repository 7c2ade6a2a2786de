"""Weight-informed activation sparsity, WINA (Chen et al. 2025, arXiv 2505.19427): input j scores
|x_j| * ||W[:, j]||_2."""

import torch


def wina(weight: torch.Tensor) -> torch.Tensor:
    """The factor of every input in its score: the Euclidean norm of its column, in float32.

    weight [..., N, K] -> [..., K].
    """
    return torch.linalg.vector_norm(weight, dim=-2, dtype=torch.float32)
