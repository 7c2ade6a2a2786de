"""The definition of the short depthwise causal convolution."""

from functools import partial

import torch
from torch.nn import functional

from ..sequence import per_sequence, state_dtype


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial_state: torch.Tensor | None,
    bounds: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, D, T], weight [D, W], bias [D], initial_state [N, D, W - 1] -> y [B, D, T] and the last
    W - 1 inputs, [N, D, W - 1].

    y[d, t] = bias[d] + sum_w weight[d, w] x[d, t - (W - 1) + w],
    where inputs before the first token are `initial_state`, or 0.
    """
    if bounds is not None:
        y, state = per_sequence(partial(_rows, weight, bias, silu), (x.transpose(1, 2),), None, initial_state, bounds)
        return y.transpose(1, 2), state
    y, state = _rows(weight, bias, silu, x.transpose(1, 2), None, initial_state)
    return y.transpose(1, 2), state


def _rows(weight, bias, silu, rows, decay, initial_state):
    x, dtype, (D, W) = rows.transpose(1, 2), state_dtype(rows), weight.shape
    before = x.new_zeros(x.shape[0], D, W - 1) if initial_state is None else initial_state
    whole = torch.cat([before, x], -1)
    y = functional.conv1d(
        whole.to(dtype), weight.to(dtype)[:, None], None if bias is None else bias.to(dtype), groups=D
    )
    y = functional.silu(y) if silu else y
    return y.to(x.dtype).transpose(1, 2), whole[..., whole.shape[-1] - (W - 1) :]
