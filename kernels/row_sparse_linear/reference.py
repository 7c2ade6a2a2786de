"""The definition of row_sparse_linear."""

import torch
from torch.nn.functional import linear


def row_sparse_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    threshold: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K], weight [N, K], gate [..., N], threshold [], bias [N] -> [..., N]:
    0 where the gate is inactive in all rows."""
    # One dimension, for a scalar tensor would be rounded to the gate's dtype before it is compared.
    active = (~(gate.abs() <= threshold.reshape(1))).reshape(-1, gate.shape[-1]).any(0)  # [N]; a NaN is active
    return torch.where(active, gate * linear(x, weight, bias), 0)
