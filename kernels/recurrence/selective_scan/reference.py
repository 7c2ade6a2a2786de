"""The definition of the selective scan: the recurrence, token by token."""

from functools import partial

import torch
from torch.nn import functional

from ...sequence import per_sequence, state_dtype


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    initial_state: torch.Tensor | None,
    bounds: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, dt, z [B, T, D], A [D, N], B, C [B, T, N], D, dt_bias [D] -> y [B, T, D] and the final states [S, D, N].

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t and y_t = (C_t . h_t + D x_t) silu(z_t), channel by channel, where dt_t is
    softplus(dt_t + dt_bias) with `dt_softplus`. `bounds` are where packed sequences begin and end.
    """
    alone = partial(_rows, A=A, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)
    tensors = (x, dt, B, C) if z is None else (x, dt, B, C, z)
    return per_sequence(alone, tensors, None, initial_state, bounds)


def time_steps(dt: torch.Tensor, dt_bias: torch.Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> torch.Tensor:
    """What dt [..., D] stands for."""
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    return functional.softplus(dt) if dt_softplus else dt


def _rows(x, dt, B, C, z=None, *, A, D, dt_bias, dt_softplus, decay, initial_state):
    dtype = state_dtype(x)
    dt, wide_x = time_steps(dt, dt_bias, dt_softplus, dtype), x.to(dtype)
    A, B, C = (tensor.to(dtype) for tensor in (A, B, C))
    h = x.new_zeros(x.shape[0], *A.shape, dtype=dtype) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * wide_x[:, t])[..., None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1))
    y = torch.stack(outputs, 1)
    y = y if D is None else y + D.to(dtype) * wide_x
    y = y if z is None else y * functional.silu(z.to(dtype))
    return y.to(x.dtype), h
