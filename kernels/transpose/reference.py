"""The definition of a transposed copy."""

import torch


def transpose(x: torch.Tensor) -> torch.Tensor:
    """x [..., R, C] -> [..., C, R], contiguous."""
    return x.mT.contiguous()
