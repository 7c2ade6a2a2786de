"""The definition of column_sparse_linear."""

import torch
from torch.nn.functional import linear


def column_sparse_linear(
    x: torch.Tensor, weight: torch.Tensor, cutoff: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., K], weight [N, K], cutoff [K], bias [N] -> [..., N]: the product over the columns active in some row."""
    if cutoff is not None:
        active = ~(x.abs() <= cutoff)  # [..., K]; a NaN is active
        x = torch.where(active.reshape(-1, x.shape[-1]).any(0), x, 0)
    return linear(x, weight, bias)
