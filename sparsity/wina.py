"""Weight-informed activation sparsity, WINA (Chen et al. 2025, arXiv 2505.19427): input j scores
|x_j| * ||W[:, j]||_2."""

import torch

TOGETHER = 1 << 18  # elements that are held in float32 at a time


def wina(weight: torch.Tensor) -> torch.Tensor:
    """The factor of every input in its score: the Euclidean norm of its column, in float32.

    weight [..., N, K] -> [..., K].
    """
    if weight.dim() > 2:
        return torch.stack([wina(matrix) for matrix in weight])
    N, K = weight.shape
    if weight.stride(0) == 1:  # column by column
        norms, step = torch.empty(K, device=weight.device), max(1, TOGETHER // N)
        held = torch.empty(step, N, device=weight.device)
        for columns, norm in zip(weight.mT.split(step), norms.split(step), strict=True):
            torch.linalg.vector_norm(held[: len(columns)].copy_(columns), dim=-1, out=norm)
        return norms
    squares, step = torch.zeros(K, device=weight.device), max(1, TOGETHER // K)
    held = torch.empty(step, K, device=weight.device)
    for rows in weight.split(step):
        squares += held[: len(rows)].copy_(rows).square_().sum(0)
    return squares.sqrt()
