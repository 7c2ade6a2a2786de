"""Linear attention of every token with all others, with decay by distance: encoders and vision models.

LION (Afzal et al. 2025, arXiv 2502.16249): three forms of one map, for training (the matrix), for little memory (two
recurrences), and between (chunks).
"""

import torch

from ... import checks, sequence
from .op import linear_attention

FORMS = ("chunked", "full", "recurrent")


def bidirectional_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    decay: torch.Tensor | None = None,
    normalize: bool = True,
    form: str = "chunked",
) -> torch.Tensor:
    """q, k [B, T, H, K], v [B, T, Hv, V] -> o [B, T, Hv, V] with
    o_i = sum_j M_ij (q_i . k_j) v_j / sum_j M_ij (q_i . k_j) (LION).

    M_ij is 1 for i = j, a_j ... a_{i-1} for i > j and a_{i+1} ... a_j for i < j, with a = exp(decay): what a token
    forgets, it forgets of what it passes on. (`linear_attention` has a_{j+1} ... a_i for i > j.) Where the sum is 0 the
    result is NaN, as in the paper; positive features (`features.elu_plus_one`, `features.silu_shifted`)
    keep it from that.

    Args:
        q, k, v: as in `linear_attention`, with its feature map applied; no scale, which would cancel.
        decay: logarithms <= 0: None (LION-LIT), [Hv] (LION-D) or [B, T, Hv] (LION-S); -inf lets nothing pass.
        normalize: divide by the sum.
        form: "chunked" (two calls of `linear_attention`), "full" (the matrix, T x T) or "recurrent" (token by token in
            both directions). "full" and "recurrent" are plain torch and have gradients; they are the definition, twice.

    Raises:
        ValueError: an unknown form, or a decay of another shape or above 0.
        TypeError, ValueError, NotImplementedError: as `linear_attention`, the last in the chunked form alone.
    """
    _check(q, k, v, decay, form)
    if form == "chunked":
        o = _chunked(q, k, v, decay, normalize)
    else:
        dtype, groups = sequence.state_dtype(q), v.shape[2] // q.shape[2]
        heads = [x.to(dtype).repeat_interleave(groups, 2) for x in (q, k)]
        gates = None if decay is None else _per_token(decay, v).to(dtype)
        o = (_full if form == "full" else _recurrent)(*heads, v.to(dtype), gates, normalize)
    return o.to(v.dtype)


def _check(q, k, v, decay, form):
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    checks.check_tensors(q=q, k=k, v=v, decay=decay)
    sequence.check_heads(q, k, v)
    if decay is not None:
        B, T, Hv = v.shape[:3]
        checks.check_shape("decay", decay, [Hv], [B, T, Hv])
        sequence.check_decay(q, v, decay)
        sequence.check_signs(decay)


def _per_token(decay: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """decay as [B, T, Hv]."""
    return decay.expand(v.shape[:3])


def _full(q, k, v, decay, normalize):
    A = torch.einsum("bihk,bjhk->bhij", q, k)
    if decay is not None:
        A = A * mask(decay)
    o = torch.einsum("bhij,bjhv->bihv", A, v)
    return o / A.sum(-1).transpose(1, 2)[..., None] if normalize else o


def mask(decay: torch.Tensor) -> torch.Tensor:
    """M [B, H, T, T] of decay [B, T, H]: products of exp(decay) over k = j to i - 1 for i > j,
    over k = i + 1 to j for i < j, 1 for i = j."""
    g = decay.transpose(1, 2)  # [B, H, T]
    T = g.shape[-1]
    rows = torch.arange(T, device=g.device)
    later = rows[:, None] > rows  # i > j
    # Sums, not differences of sums: those of infinities would be NaN. Down a column from the diagonal row i adds
    # g_{i-1}, along a row column j adds g_j.
    before = _shifted(decay).transpose(1, 2)
    down = torch.where(later, before[..., :, None], 0).cumsum(-2)
    along = torch.where(later.T, g[..., None, :], 0).cumsum(-1)
    return torch.where(later, down, along).exp()


def _recurrent(q, k, v, decay, normalize):
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # z is the last column of S
    o = _direction(q, k, values, None if decay is None else _shifted(decay))
    backward = None if decay is None else _shifted_back(decay).flip(1)
    o = o + _direction(q.flip(1), k.flip(1), values.flip(1), backward).flip(1)
    return o[..., :-1] / o[..., -1:] if normalize else o[..., :-1]


def _direction(q, k, v, decay):
    """o_t = q_t^T (S_t - k_t v_t^T / 2) with S_t = exp(decay_t) S_{t-1} + k_t v_t^T: half the diagonal,
    which the other direction has the rest of."""
    outputs, S = [], 0
    for t in range(q.shape[1]):
        added = k[:, t, :, :, None] * v[:, t, :, None, :]
        S = (S if decay is None else decay[:, t, :, None, None].exp() * S) + added
        outputs.append((q[:, t, :, :, None] * (S - added / 2)).sum(-2))
    return torch.stack(outputs, 1)


def _chunked(q, k, v, decay, normalize):
    wide, groups = sequence.state_dtype(q), v.shape[2] // q.shape[2]
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1) if normalize else v
    constant = decay is None or decay.dim() == 1
    # Both directions unrounded: what is left when the diagonal is taken away may be much smaller.
    settings = {"out_dtype": wide}
    forward = linear_attention(q, k, values, decay=decay if constant else _shifted(decay), **settings)
    back = linear_attention(q, k, values, decay=decay if constant else _shifted_back(decay), reverse=True, **settings)
    diagonal = (q.to(wide) * k.to(wide)).sum(-1, keepdim=True).repeat_interleave(groups, 2) * values.to(wide)
    o = forward + back - diagonal
    return o[..., :-1] / o[..., -1:] if normalize else o


def _shifted(decay):
    """decay [B, T, H] of the token before: what token j forgets applies from token j + 1 on.
    The first token has no past, so its own is any."""
    return torch.cat([decay[:, :1], decay[:, :-1]], 1)


def _shifted_back(decay):
    """decay [B, T, H] of the token after."""
    return torch.cat([decay[:, 1:], decay[:, -1:]], 1)
