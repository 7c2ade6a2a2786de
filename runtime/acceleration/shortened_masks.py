"""The masks of attention over some of the tokens, cut out of those that a model makes for all of them."""

import torch

from hasten.acceleration.shortened_cache import Entries
from hasten.kernels.token_scores import gather_tokens


def along_tokens(x: torch.Tensor, tokens: torch.Tensor, dim: int) -> torch.Tensor:
    """The places `tokens` [B, n] of dimension `dim` of x [..., B or 1, ..., T, ...]; the rows are dimension 0, or, of
    what has as many dimensions more as [3, B, T] has than [B, T], the one before `dim`.
    """
    dim %= x.dim()
    if dim == 1 and not x.is_complex():
        return gather_tokens([x], tokens)[0]
    if len(tokens) == 1:
        return x.index_select(dim, tokens[0])
    shape, sizes = [1] * x.dim(), list(x.shape)
    shape[dim - 1], shape[dim] = tokens.shape
    sizes[dim - 1] = len(tokens)
    return torch.take_along_dim(x.expand(sizes), tokens.view(shape), dim)


def cut_mask(
    given: torch.Tensor | None, queries: Entries, keys: Entries, dtype: torch.dtype, flash: bool, causal: bool = True
) -> torch.Tensor | None:
    """The mask for queries and keys that are some of the tokens.

    Args:
        given: the model's: None for one that `causal` describes, bool (True: may attend) or floating (added to the
            logits) [B or 1, H or 1, T, N], or [B, N] of 0 and 1, which says which keys are no padding. Its N keys are
            the last of those that were read.
        queries: which of the last T tokens they are, counted from the first of these.
        keys: which tokens of all that were read the keys are.
        dtype: of the hidden states, for a floating mask.
        flash: whether the attention takes None or [B, N] alone.
        causal: what None stands for: whether a query sees only the keys up to its own.

    Returns:
        None, or a mask of the same kind [B, H or 1, n_queries, n_keys], or [B, n_keys].
    """
    bias = keys.bias
    if given is None:
        if bias is None:
            return None
        if flash:
            return bias > -torch.inf
        own = queries.tokens + (keys.read - queries.read if causal else keys.read)
        allowed = keys.tokens[:, None, None, :] <= own[:, None, :, None]
        return _biased(allowed, bias, dtype)
    places = keys.tokens
    if left := keys.read - given.shape[-1]:  # keys before a window, which is all that such a mask covers
        outside = places < left
        bias = torch.zeros(outside.shape, device=outside.device) if bias is None else bias
        bias, places = bias.masked_fill(outside, -torch.inf), (places - left).clamp(min=0)
    if given.dim() == 2:
        cut = along_tokens(given.bool(), places, 1)
        return cut if bias is None else cut & (bias > -torch.inf)
    cut = given if queries.tokens.shape[1] == given.shape[-2] else along_rows(given, queries.tokens)
    cut = along_columns(cut, places)
    return cut if bias is None else _biased(cut, bias, dtype)


def seen_by(
    given: torch.Tensor | None, places: torch.Tensor, queries: int, keys: int, causal: bool
) -> torch.Tensor | None:
    """Which keys some of the queries of an attention may attend to.

    Args:
        given: its mask: None, bool or floating [B or 1, H or 1, n, N] (its first head counts), or [B, N].
        places: int64 [B, Q], which of the n queries; -1 for none.
        queries, keys: n and N. The last n keys are those of the queries.
        causal: what None stands for: whether a query sees only the keys up to its own.

    Returns:
        bool [B, Q, N]; None where all of them see all keys.
    """
    if given is None and (not causal or bool((places == queries - 1).all())) and bool((places >= 0).all()):
        return None
    if given is not None and given.dim() == 4:
        allowed = along_rows(given, places.clamp(min=0))[:, 0]
        allowed = allowed if allowed.dtype == torch.bool else allowed > torch.finfo(allowed.dtype).min / 2
    else:
        order = torch.arange(keys, device=places.device)
        allowed = order <= (keys - queries + places[..., None] if causal else keys)
        if given is not None:
            allowed = allowed & given[:, None, -keys:].bool()
    return allowed.expand(*places.shape, keys) & (places >= 0)[..., None]


def along_rows(mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Queries `tokens` [B, n] of a mask [B or 1, H or 1, T, N]."""
    mask = mask.expand(len(tokens), -1, -1, -1)
    return mask.gather(2, tokens[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))


def along_columns(mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Keys `tokens` [B, n] of a mask [B or 1, H or 1, T, N]."""
    mask = mask.expand(len(tokens), -1, -1, -1)
    return mask.gather(3, tokens[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))


def _biased(mask: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask [B, H or 1, n, N], bool or floating, with a bias of its keys [B, N]; bool stays bool where it can."""
    bias = bias[:, None, None, :]
    alive = bias > -torch.inf
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        mask = mask & alive
        if not bool((alive & (bias != 0)).any()):
            return mask
        mask = torch.zeros((), dtype=dtype, device=mask.device).where(mask, lowest)
    return torch.where(alive, (mask + bias.to(mask.dtype)).clamp(min=lowest), lowest).to(mask.dtype)
