"""The definition of linear."""

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] -> x @ weight.T + bias [..., N]."""
    y = x @ weight.t()
    return y if bias is None else y + bias
