"""Linear attention in chunks, in plain torch: matrix products inside a chunk, a state between chunks."""

import torch

from ...sequence import state_dtype
from .. import chunks


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None,
    scale: float,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as in `reference`, for sequences that are not packed and without a normaliser."""
    B, T, _, K = q.shape
    Hv, V, dtype = v.shape[2], v.shape[3], state_dtype(q)
    S = q.new_zeros(B, Hv, K, V, dtype=dtype) if initial_state is None else initial_state
    outputs = []
    for begin in range(0, T, chunks.PIECE):
        own = slice(begin, begin + chunks.PIECE)
        piece_decay = decay if decay is None or decay.dim() == 1 else decay[:, own]
        o, S = _piece(q[:, own], k[:, own], v[:, own], piece_decay, S, dtype)
        outputs.append((scale * o).to(v.dtype))
    return torch.cat(outputs, 1), S


def _piece(q, k, v, decay, S, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    T, Hv = v.shape[1:3]
    g = chunks.summed_decay(decay, v, Hv)
    q, k, v = (chunks.split(x, Hv, dtype) for x in (q, k, v))
    end = g[..., -1:, :]
    added = chunks.decayed(end - g, k).transpose(-1, -2) @ v  # [B, Hv, chunks, K, V]
    kept = end.transpose(-1, -2).exp().to(dtype)  # [B, Hv, chunks, K or 1, 1]
    states = []
    for n in range(q.shape[2]):
        states.append(S)
        S = kept[:, :, n] * S + added[:, :, n]
    o = chunks.pair_products(q, k, g) @ v + chunks.decayed(g, q) @ torch.stack(states, 2)
    return chunks.join(o, T), S
