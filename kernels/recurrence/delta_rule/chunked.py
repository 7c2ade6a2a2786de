"""The delta rule in chunks, in plain torch (WY form; Yang et al. 2024, arXiv 2406.06484 and 2412.06464)."""

import torch

from ...sequence import state_dtype
from .. import chunks
from .reference import unit


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    decay: torch.Tensor | None,
    scale: float,
    initial_state: torch.Tensor | None,
    l2_norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as in `reference`, for sequences that are not packed."""
    B, T, _, K = q.shape
    Hv, V, dtype = v.shape[2], v.shape[3], state_dtype(q)
    S = q.new_zeros(B, Hv, K, V, dtype=dtype) if initial_state is None else initial_state
    outputs = []
    for begin in range(0, T, chunks.PIECE):
        own = slice(begin, begin + chunks.PIECE)
        piece_decay = decay if decay is None or decay.dim() == 1 else decay[:, own]
        o, S = _piece(*(x[:, own] for x in (q, k, v, beta)), piece_decay, S, l2_norm, dtype)
        outputs.append((scale * o).to(v.dtype))
    return torch.cat(outputs, 1), S


def _piece(q, k, v, beta, decay, S, l2_norm, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    T, Hv = v.shape[1:3]
    g = chunks.summed_decay(decay, v, Hv)
    if l2_norm:
        q, k = unit(q.to(dtype)), unit(k.to(dtype))
    q, k, v, beta = (chunks.split(x, Hv, dtype) for x in (q, k, v, beta[..., None]))
    # What a token writes is u = beta (v - S~^T k), and S~ holds what the tokens before it in the chunk wrote: (I + A) u
    # = beta v - beta (k decayed) S.
    A = chunks.pair_products(beta * k, k, g).tril(-1)
    right = torch.cat([beta * v, beta * chunks.decayed(g, k)], -1)
    solved = torch.linalg.solve_triangular(A, right, upper=False, unitriangular=True)
    U, W = solved.split([v.shape[-1], k.shape[-1]], -1)
    end = g[..., -1:, :]
    written = chunks.decayed(end - g, k).transpose(-1, -2)
    kept = end.transpose(-1, -2).exp().to(dtype)
    read, within = chunks.decayed(g, q), chunks.pair_products(q, k, g)
    outputs = []
    for n in range(q.shape[2]):
        u = U[:, :, n] - W[:, :, n] @ S
        outputs.append(read[:, :, n] @ S + within[:, :, n] @ u)
        S = kept[:, :, n] * S + written[:, :, n] @ u
    return chunks.join(torch.stack(outputs, 2), T), S
