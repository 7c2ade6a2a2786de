"""Bit masks against sets of token ids, on widths beside and between the borders of words."""

import numpy as np
import pytest
import torch

from hasten.guidance.text import bitmask

SIZES = [1, 31, 32, 33, 64, 200]


def random_sets(size):
    draw = np.random.default_rng(size)
    return [np.flatnonzero(draw.random(size) < share).tolist() for share in (0, 0.02, 0.5, 1)]


def held(mask):
    """The set bits, read word by word."""
    return {32 * place + bit for place, word in enumerate(mask.tolist()) for bit in range(32) if word >> bit & 1}


@pytest.mark.parametrize("size", SIZES)
def test_a_mask_is_a_set_of_tokens(size):
    for first in random_sets(size):
        for second in random_sets(size):
            mask = bitmask.allocate(size)
            assert mask.dtype == np.int32 and mask.shape == (bitmask.words(size),) == (-(-size // 32),)
            bitmask.add(mask, first)
            assert held(mask) == set(first)
            assert bitmask.members(mask, size).tolist() == first
            assert bitmask.contains(mask, np.arange(size)).tolist() == [token in first for token in range(size)]
            bitmask.add(mask, np.array([*second, *second], dtype=np.int64))
            assert held(mask) == {*first, *second}
            bitmask.remove(mask, second)
            assert held(mask) == {*first} - {*second}


@pytest.mark.parametrize("size", SIZES)
def test_members_are_below_the_size(size):
    mask = np.full(bitmask.words(size) + 1, -1, np.int32)
    assert bitmask.members(mask, size).tolist() == list(range(size))
    mask[1:] = 0
    assert bitmask.members(mask, size).tolist() == list(range(min(size, 32)))


@pytest.mark.parametrize("size", SIZES)
def test_a_device_unpacks_and_applies_the_rows(size):
    sets = random_sets(size)
    mask = bitmask.allocate(size, rows=len(sets))
    for row, tokens in zip(mask, sets, strict=True):
        bitmask.add(row, tokens)
    bits = bitmask.unpack(torch.from_numpy(mask), size)
    assert bits.shape == (len(sets), size) and bits.dtype == torch.bool
    assert [row.nonzero()[:, 0].tolist() for row in bits] == sets
    logits = torch.randn(len(sets), size + 3, dtype=torch.bfloat16)  # three rows of padding
    masked = bitmask.apply(logits, mask, size)
    assert torch.equal(masked[:, :size].isfinite(), bits) and (masked[:, size:] == -torch.inf).all()
    assert torch.equal(masked[:, :size][bits], logits[:, :size][bits]) and masked.dtype == logits.dtype
