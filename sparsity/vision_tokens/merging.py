"""Merging: image tokens that are alike become one, instead of some being dropped."""

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize


@dataclass(frozen=True, slots=True)
class Merging:
    """Which T tokens of a row become which n.

    Args:
        columns: int64 [n], rising: the tokens that remain.
        into: int64 [T]: the place in `columns` of the token that each token went into, its own where it remains.
        sizes: int64 [n]: of how many tokens each is made.
    """

    columns: torch.Tensor
    into: torch.Tensor
    sizes: torch.Tensor

    def average(self, x: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor:
        """The merged rows of x: averages weighted by size, computed in float32 and in the dtype of x.

        Args:
            x: [T, D].
            sizes: [T], of how many tokens each was made before; ones where None.
        """
        weights = torch.ones_like(self.into) if sizes is None else sizes
        total = torch.zeros(len(self.columns), x.shape[1], device=x.device)
        total.index_add_(0, self.into, x.float() * weights[:, None])
        return (total / self.sizes[:, None]).to(x.dtype)


def bipartite_merging(
    x: torch.Tensor, count: int | torch.Tensor, mask: torch.Tensor | None = None, sizes: torch.Tensor | None = None
) -> list[Merging]:
    """Bipartite soft matching (ToMe, Bolya et al. 2022, arXiv 2210.09461), in rounds until `count` tokens remain.

    A round parts the tokens that take part into those at even and at odd places. Each even one is paired with the odd
    one of the highest cosine, and as many of the best pairs as there are too many tokens, at most half of the tokens,
    merge into their odd token, whose features become the average weighted by size.

    Args:
        x: features by which tokens are alike [B, T, D]: hidden states, or the mean of keys over the heads.
        count: how many of the tokens that take part remain, at least 1; an int, or int64 [B] for each row. A row that
            has no more is left as it is.
        mask: bool [B, T], True for the tokens that take part (image tokens); the others remain as they are. All where
            None.
        sizes: integers [B, T], of how many tokens each is already made; ones where None.

    Returns:
        one `Merging` for each row. Attention in which merged tokens count as the tokens that they were made of adds
        log(sizes) to the scores of their keys; that is left to the caller.

    Raises:
        ValueError: shapes do not fit, or a count under 1.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D], got {list(x.shape)}")
    B, T, _ = x.shape
    counts = [count] * B if isinstance(count, int) else count.tolist()
    mask = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask is None else mask
    sizes = torch.ones(B, T, dtype=torch.int64, device=x.device) if sizes is None else sizes
    for name, got, expected in (
        ("count", [len(counts)], [B]),
        ("mask", list(mask.shape), [B, T]),
        ("sizes", list(sizes.shape), [B, T]),
    ):
        if got != expected:
            raise ValueError(f"{name} must be {expected}, got {got}")
    if min(counts, default=1) < 1:
        raise ValueError(f"at least one token must remain of each row, got {counts}")
    return [_merged(*row) for row in zip(x.float(), counts, mask, sizes, strict=True)]


def _merged(features: torch.Tensor, count: int, mask: torch.Tensor, sizes: torch.Tensor) -> Merging:
    """`bipartite_merging` of one row: features [T, D], mask and sizes [T]."""
    T, device = len(features), features.device
    features, sizes = features.clone(), sizes.clone()
    target = torch.arange(T, device=device)  # the column that each token went into
    left = mask.nonzero().flatten()
    while len(left) > count:
        even, odd = left[::2], left[1::2]
        merging = min(len(left) - count, len(left) // 2)
        cosines = normalize(features[even], dim=-1) @ normalize(features[odd], dim=-1).mT
        best, partner = cosines.max(1)
        best_first = best.argsort(descending=True, stable=True)[:merging]
        source, into = even[best_first], odd[partner[best_first]]
        weighted = features[odd] * sizes[odd, None]
        weighted.index_add_(0, partner[best_first], features[source] * sizes[source, None])
        sizes.index_add_(0, into, sizes[source])
        features[odd] = weighted / sizes[odd, None]
        target[source] = into
        target = target[target]
        alone = torch.ones(T, dtype=torch.bool, device=device)
        alone[source] = False
        left = left[alone[left]]
    columns = (target == torch.arange(T, device=device)).nonzero().flatten()
    return Merging(columns, torch.searchsorted(columns, target), sizes[columns])
