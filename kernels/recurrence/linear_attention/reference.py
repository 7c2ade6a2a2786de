"""The definition of linear attention: the recurrence, token by token."""

from functools import partial

import torch

from ...sequence import per_sequence, state_dtype

EPSILON = 1e-6  # added to the normaliser q . z


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor | None,
    decay: torch.Tensor | None,
    scale: float,
    initial_state: torch.Tensor | None,
    normalize: bool,
    skip: torch.Tensor | None,
    bounds: list[int] | None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [B, T, H, K], v [B, T, Hv, V], beta None or [B, T, Hv], decay None, [Hv], [B, T, Hv] or [B, T, Hv, K] -> o
    [B, T, Hv, V] and the final states [N, Hv, K, V (+ 1)].

    S_t = Diag(exp(decay_t)) S_{t-1} + beta_t k_t v_t^T, o_t = scale * S_t^T q_t; with `normalize` o_t is divided by
    q_t . z_t + EPSILON, where z_t = exp(decay_t) z_{t-1} + beta_t k_t is the last column of the state. `bounds` are
    where packed sequences begin and end. With
    `skip` [Hv] o_t has skip v_t beside. o is in `out_dtype`, by default that of v.
    """
    if bounds is not None:
        settings = {"scale": scale, "normalize": normalize, "skip": skip, "out_dtype": out_dtype}
        alone = partial(linear_attention, bounds=None, **settings)
        tensors = (q, k, v, v.new_ones(v.shape[:3]) if beta is None else beta)
        return per_sequence(alone, tensors, decay, initial_state, bounds)
    B, T, H, K = q.shape
    Hv, dtype, V = v.shape[2], state_dtype(q), v.shape[3]
    q, k = (x.to(dtype).repeat_interleave(Hv // H, dim=2) for x in (q, k))
    values = v.to(dtype)
    if normalize:
        values = torch.cat([values, values.new_ones(B, T, Hv, 1)], -1)
    if beta is not None:
        values = values * beta.to(dtype)[..., None]
    S = q.new_zeros(B, Hv, K, values.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(T):
        if decay is not None:
            S = S * factor(decay, t, dtype)
        S = S + k[:, t, :, :, None] * values[:, t, :, None, :]
        outputs.append((S * q[:, t, :, :, None]).sum(-2))
    o = torch.stack(outputs, 1)
    o = scale * o[..., :V] / (o[..., V:] + EPSILON) if normalize else scale * o
    if skip is not None:
        o = o + skip.to(dtype)[:, None] * v.to(dtype)
    return o.to(out_dtype or v.dtype), S


def factor(decay: torch.Tensor, t: int, dtype: torch.dtype) -> torch.Tensor:
    """exp(decay) of token t, as what a state [B, Hv, K, V] is multiplied by."""
    if decay.dim() == 1:
        return decay.to(dtype).exp()[:, None, None]
    a = decay[:, t].to(dtype).exp()
    return a[..., None, None] if a.dim() == 2 else a[..., None]
