"""The definitions of token_scores and gather_tokens."""

from collections.abc import Sequence

import torch

from ..sequence import state_dtype


def token_scores(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """query [B, Q, H, D], key [B, G, T, D], mask bool [B, T] or [B, Q, T] or None -> [B, T].

    The mean over heads and queries of softmax_t(scale * q . k_t); queries without an allowed key are left out.
    """
    (B, Q, H, _), G, dtype = query.shape, key.shape[1], state_dtype(query)
    keys = key.to(dtype).repeat_interleave(H // G, 1)
    logits = scale * torch.einsum("bqhd,bhtd->bhqt", query.to(dtype), keys)
    if mask is None:
        mask = logits.new_ones(B, 1, logits.shape[-1], dtype=torch.bool)
    mask = (mask if mask.dim() == 3 else mask[:, None]).expand(B, Q, -1)[:, None]  # [B, 1, Q, T]
    some = mask.any(-1, keepdim=True)
    weights = logits.masked_fill(some & ~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0)
    return weights.sum((1, 2)) / (H * some.sum((1, 2)).clamp_min(1))


def gather_tokens(tensors: Sequence[torch.Tensor], columns: torch.Tensor) -> list[torch.Tensor]:
    """tensors [B or 1, T, ...], columns [B, n] -> [B, n, ...] each: y[b, i] = x[b, columns[b, i]]."""
    B = len(columns)
    rows = torch.arange(B, device=columns.device)[:, None]
    return [x.expand(B, *x.shape[1:])[rows, columns].contiguous() for x in tensors]
