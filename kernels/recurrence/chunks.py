"""The algebra of chunks in plain torch: what the chunked forms of linear attention and of the delta rule share.

A chunk is CHUNK tokens; everything inside is matrix products. Decays enter as exp(g_i - g_j) with i >= j only, which is
at most 1; the sums g are kept in float64, for a difference of large float32 sums would not be exact.
"""

import torch
from torch.nn import functional

CHUNK = 64
PIECE = 16 * CHUNK  # tokens whose temporaries are in memory at a time


def split(x: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """x [B, T, H, D] -> [B, heads, chunks, CHUNK, D] of `dtype`; heads repeated, the end padded with zeros."""
    B, T, H, D = x.shape
    x = functional.pad(x.to(dtype).transpose(1, 2), (0, 0, 0, -T % CHUNK))
    return x.repeat_interleave(heads // H, dim=1).reshape(B, heads, -1, CHUNK, D)


def join(x: torch.Tensor, T: int) -> torch.Tensor:
    """The inverse of `split`: [B, H, chunks, CHUNK, D] -> [B, T, H, D]."""
    return x.flatten(2, 3)[:, :, :T].transpose(1, 2)


def summed_decay(decay: torch.Tensor | None, like: torch.Tensor, heads: int) -> torch.Tensor:
    """The sum of log decays from the beginning of each chunk, that of the token itself included:
    [B or 1, heads, chunks, CHUNK, K or 1], float64.

    `like` is [B, T, ...]. The padding has no decay, so that the last sum of a ragged chunk is that of its true length.
    """
    if decay is None:
        decay = like.new_zeros(1, like.shape[1], heads, 1, dtype=torch.float64)
    elif decay.dim() == 1:
        decay = decay.expand(1, like.shape[1], heads)
    decay = decay if decay.dim() == 4 else decay[..., None]
    return split(decay.clamp(min=-1e4), heads, torch.float64).cumsum(
        -2
    )  # exp(-1e4) is 0; infinities have no difference


def decayed(exponent: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """exp(exponent) * x in the dtype of x."""
    return exponent.exp().to(x.dtype) * x


def pair_products(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """A[i, j] = sum_c q[i, c] k[j, c] exp(g[i, c] - g[j, c]) for i >= j, else 0: q, k [..., C, K], g
    [..., C, K or 1] -> [..., C, C].

    Decays per component do not factor out of the sum. Halving: between the second and the first half of a block they
    do, relative to the end of the first half, where neither factor exceeds 1; the two halves are blocks of their own.
    """
    C = q.shape[-2]
    if g.shape[-1] == 1:
        exponent = (g - g.transpose(-1, -2)).masked_fill(g.new_ones(C, C, dtype=torch.bool).triu(1), -torch.inf)
        return decayed(exponent, q @ k.transpose(-1, -2))
    A = torch.diag_embed((q * k).sum(-1))
    g = g.expand(*q.shape)
    half = C // 2
    while half:
        blocks = C // (2 * half)
        q2, k1, g2, g1 = (x.unflatten(-2, (blocks, 2, half))[..., i, :, :] for x, i in ((q, 1), (k, 0), (g, 1), (g, 0)))
        anchor = g1[..., -1:, :]
        products = decayed(g2 - anchor, q2) @ decayed(anchor - g1, k1).transpose(-1, -2)
        below = A.unflatten(-2, (blocks, 2, half)).unflatten(-1, (blocks, 2, half))[..., :, 1, :, :, 0, :]
        below.diagonal(dim1=-4, dim2=-2).copy_(products.movedim(-3, -1))
        half //= 2
    return A
