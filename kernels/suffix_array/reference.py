"""The definition of suffix_array."""

import torch


def suffix_array(text: torch.Tensor) -> torch.Tensor:
    """text [N] uint8 -> [N] int32, by doubling (Manber and Myers 1993):
    ranks of the first k bytes give ranks of the first 2 k."""
    count = text.numel()
    rank, length = text.long() + 1, 1  # 0 stands for what lies behind the end
    while True:
        ahead = torch.zeros_like(rank)
        ahead[: max(count - length, 0)] = rank[length:]
        keys, rank = torch.unique(rank * (count + 257) + ahead, return_inverse=True)
        if len(keys) == count:
            return rank.argsort().int()
        rank, length = rank + 1, 2 * length
