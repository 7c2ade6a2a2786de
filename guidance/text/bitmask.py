"""Sets of token ids as bits: an int32 mask [..., W] with W = ceil(V / 32) words holds token t in bit t % 32 of word t
// 32.

The CPU fills them, as numpy arrays; a device unpacks or applies them, as tensors. llguidance's matchers fill the same
layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

Tokens = Sequence[int] | np.ndarray


def words(size: int) -> int:
    """How many int32 words hold the bits of `size` tokens."""
    return -(-size // 32)


def allocate(size: int, rows: int | None = None) -> np.ndarray:
    """Empty masks for a vocabulary of `size` tokens: int32 zeros [W], or [rows, W]."""
    return np.zeros(words(size) if rows is None else (rows, words(size)), dtype=np.int32)


def add(mask: np.ndarray, tokens: Tokens) -> None:
    """Sets the bits of `tokens` in a mask [W], in place."""
    tokens = np.asarray(tokens, dtype=np.int64)
    np.bitwise_or.at(mask.view(np.uint32), tokens >> 5, _bit(tokens))


def remove(mask: np.ndarray, tokens: Tokens) -> None:
    """Clears the bits of `tokens` in a mask [W], in place."""
    tokens = np.asarray(tokens, dtype=np.int64)
    np.bitwise_and.at(mask.view(np.uint32), tokens >> 5, ~_bit(tokens))


def contains(mask: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """bool [N]: which of the token ids int64 [N] a mask [W] holds."""
    return (mask.view(np.uint32)[tokens >> 5] & _bit(tokens)) != 0


def members(mask: np.ndarray, size: int) -> np.ndarray:
    """The token ids below `size` that a mask [W] holds, int64, ascending."""
    filled = np.flatnonzero(mask)
    sparse = 2 * len(filled) < len(mask)
    octets = (mask[filled] if sparse else mask).view(np.uint8)
    bits = np.flatnonzero(np.unpackbits(octets, bitorder="little").view(bool))
    tokens = 32 * filled[bits >> 5] + (bits & 31) if sparse else bits
    return tokens[: np.searchsorted(tokens, size)]


def unpack(mask: torch.Tensor, size: int) -> torch.Tensor:
    """bool [R, size] from a mask [R, W], on its device."""
    bits = mask[..., None] >> torch.arange(32, dtype=torch.int32, device=mask.device)
    return (bits & 1).bool().flatten(-2)[:, :size]


def apply(logits: torch.Tensor, mask: np.ndarray, size: int) -> torch.Tensor:
    """Logits [R, V] with -inf for every token that a mask [R, W] of `size` tokens does not hold, and for all beyond
    them.
    """
    held = unpack(torch.from_numpy(mask).to(logits.device), size)
    masked = torch.full_like(logits, -torch.inf)
    masked[:, :size] = logits[:, :size].masked_fill(~held, -torch.inf)
    return masked


def _bit(tokens: np.ndarray) -> np.ndarray:
    """Each token's bit in its word, uint32."""
    return np.left_shift(np.uint32(1), (tokens & 31).astype(np.uint32))
