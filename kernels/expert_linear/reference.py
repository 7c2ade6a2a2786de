"""The definition of expert_linear."""

import torch
from torch.nn.functional import linear


def expert_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    cutoff: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, K] or [T, P, K], weight [E, N, K], ids [T, P], bias [E, N], cutoff [E, K] -> [T, P, N].

    The rows of one expert share the columns that are active in some of them. An id outside [0, E) gives a row of zeros.
    """
    if x.dim() == 2:
        x = x[:, None].expand(-1, ids.shape[1], -1)
    y = x.new_zeros(*ids.shape, weight.shape[1])
    for e in ids[(ids >= 0) & (ids < len(weight))].unique().tolist():
        picked = ids == e  # [T, P]
        rows = x[picked]  # [rows, K]
        if cutoff is not None:
            active = ~(rows.abs() <= cutoff[e])  # a NaN is active
            rows = torch.where(active.any(0), rows, 0)
        y[picked] = linear(rows, weight[e], None if bias is None else bias[e])
    return y
