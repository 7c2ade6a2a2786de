"""Activation sparsity by magnitude, TEAL (Liu et al. 2024, arXiv 2408.14690): input j scores |x_j|."""

import torch


def teal(weight: torch.Tensor) -> torch.Tensor:
    """The factor of every input in its score, 1.

    weight [..., N, K] -> float32 [..., K].
    """
    return torch.ones(*weight.shape[:-2], weight.shape[-1], device=weight.device)
