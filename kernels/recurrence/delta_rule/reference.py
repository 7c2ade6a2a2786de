"""The definition of the delta rule: the recurrence, token by token."""

from functools import partial

import torch

from ...sequence import per_sequence, state_dtype
from ..linear_attention.reference import factor

EPSILON = 1e-6  # added to the squared length of q and k


def unit(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] over its length sqrt(x . x + EPSILON)."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPSILON)


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    decay: torch.Tensor | None,
    scale: float,
    initial_state: torch.Tensor | None,
    l2_norm: bool,
    bounds: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [B, T, H, K], v [B, T, Hv, V], beta [B, T, Hv], decay None, [Hv], [B, T, Hv] or [B, T, Hv, K] -> o
    [B, T, Hv, V], states [N, Hv, K, V].

    S~ = Diag(exp(decay_t)) S_{t-1}, S_t = S~ + k_t (beta_t (v_t - S~^T k_t))^T, o_t = scale * S_t^T q_t; with `l2_norm`
    q and k are made unit vectors first. `bounds` are where packed sequences begin and end.
    """
    if bounds is not None:
        alone = partial(delta_rule, scale=scale, l2_norm=l2_norm, bounds=None)
        return per_sequence(alone, (q, k, v, beta), decay, initial_state, bounds)
    B, T, H, K = q.shape
    Hv, dtype = v.shape[2], state_dtype(q)
    q, k = (x.to(dtype) for x in (q, k))
    if l2_norm:
        q, k = unit(q), unit(k)
    q, k = (x.repeat_interleave(Hv // H, dim=2) for x in (q, k))
    values, beta = v.to(dtype), beta.to(dtype)
    S = q.new_zeros(B, Hv, K, v.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(T):
        if decay is not None:
            S = S * factor(decay, t, dtype)
        predicted = (S * k[:, t, :, :, None]).sum(-2)
        u = beta[:, t, :, None] * (values[:, t] - predicted)
        S = S + k[:, t, :, :, None] * u[:, :, None, :]
        outputs.append((S * q[:, t, :, :, None]).sum(-2))
    return (scale * torch.stack(outputs, 1)).to(v.dtype), S
