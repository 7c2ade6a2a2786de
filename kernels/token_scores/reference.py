"""The definitions of token_scores and gather_tokens."""

from collections.abc import Sequence

import torch

from ..sequence import state_dtype


def token_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """query [B, Q, H, D], key [B, G, T, D], mask bool [B, T] or [B, Q, T] or None -> [B, T].

    The mean over heads and queries of softmax_t(l_t), l_t = scale * q . k_t, with a softcap c of c * tanh(l_t / c);
    queries without an allowed key are left out.
    """
    G, dtype = key.shape[1], state_dtype(query)
    grouped = query.to(dtype).unflatten(2, (G, -1))  # [B, Q, G, H / G, D]
    logits = torch.einsum("bqghd,bgtd->bgqht", scale * grouped, key.to(dtype))
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if mask is None:
        return logits.softmax(-1).mean((1, 2, 3))
    mask = (mask if mask.dim() == 3 else mask[:, None]).expand(-1, query.shape[1], -1)[:, None, :, None]
    some = mask.any(-1, keepdim=True)  # [B, 1, Q, 1, 1]
    weights = logits.masked_fill(some & ~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0)
    return weights.sum((1, 2, 3)) / (query.shape[2] * some.sum((1, 2, 3)).clamp_min(1))


def gather_tokens(tensors: Sequence[torch.Tensor], columns: torch.Tensor) -> list[torch.Tensor]:
    """tensors [B or 1, T, ...], columns [B, n] -> [B, n, ...] each: y[b, i] = x[b, columns[b, i]]."""
    same, T = columns.flatten(), tensors[0].shape[1]
    own = same  # where the columns of each row lie, rows one after the other
    if len(columns) > 1:
        own = (columns + T * torch.arange(len(columns), device=columns.device)[:, None]).flatten()
    gathered = [x.flatten(0, 1).index_select(0, same if len(x) == 1 else own) for x in tensors]
    return [y.view(*columns.shape, *y.shape[1:]) for y in gathered]
