import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hasten.sparsity.vision_tokens import FastV, LayerShape, Pyramid, kept, prefill_cost

LAYERS = 6
SHAPE = LayerShape(macs=1000, heads=4, kv_heads=2, head_dim=8)
SHAPES = [SHAPE] * LAYERS


def test_operations_are_those_that_torch_counts():
    """Of a layer with grouped heads; torch counts all pairs of attention, of which the causal ones are a part."""
    T, D, F = 12, 32, 40
    shape = LayerShape(macs=2 * D * D + 2 * D * 16 + 3 * D * F, heads=4, kv_heads=2, head_dim=8)
    x = torch.randn(T, D)
    weights = [nn.Linear(D, out, bias=False) for out in (D, 16, 16, D, F, F)] + [nn.Linear(F, D, bias=False)]
    q, k = torch.randn(4, T, 8), torch.randn(4, T, 8)
    with FlopCounterMode(display=False) as projections:
        for weight in weights:
            weight(x if weight.in_features == D else torch.randn(T, F))
    with FlopCounterMode(display=False) as attention:
        (q @ k.mT) @ k
    causal = attention.get_total_flops() * (T * (T + 1) // 2) // T**2
    assert shape.operations(T) == projections.get_total_flops() + causal


def test_the_cost_of_no_image_is_that_of_the_text():
    nothing = prefill_cost([0.5] * LAYERS, 30, 0, SHAPES)
    assert nothing == prefill_cost([1.0] * LAYERS, 30, 0, SHAPES)
    assert nothing.image_operations == 0 and nothing.operations == LAYERS * SHAPE.operations(30)


@pytest.mark.parametrize("given", [FastV(2, 0.25), Pyramid(parts=3)], ids=str)
def test_layers_cost_as_if_their_tokens_were_all(given):
    text, image, shares = 31, 97, given.shares(LAYERS)
    cost = prefill_cost(shares, text, image, SHAPES, element_bytes=4)
    lengths = [text + kept(share, image) for share in shares]
    assert cost.operations == sum(map(SHAPE.operations, lengths))
    assert cost.image_operations == cost.operations - LAYERS * SHAPE.operations(text)
    assert cost.kv_bytes == 4 * sum(2 * length * 2 * 8 for length in lengths)
    assert cost.decode_bytes - cost.kv_bytes == 4 * LAYERS * 1000


def test_every_cost_rises_with_every_share():
    image = 20
    for layer in range(LAYERS):
        shares = [0.5] * LAYERS
        costs = []
        for count in range(1, image + 1):
            shares[layer] = count / image
            costs.append(dataclasses.astuple(prefill_cost(shares, 7, image, SHAPES)))
        for before, after in itertools.pairwise(costs):
            assert all(less < more for less, more in zip(before, after, strict=True))


def test_layers_may_differ():
    other = LayerShape(macs=7, heads=2, kv_heads=2, head_dim=4)
    cost = prefill_cost([1.0, 0.5], 3, 4, [SHAPE, other])
    assert cost.operations == SHAPE.operations(7) + other.operations(5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerShape(0, 4, 2, 8), "macs must be an integer of at least 1, got 0"),
        (lambda: LayerShape(10, 4, True, 8), "kv_heads must be an integer of at least 1, got True"),
        (lambda: LayerShape(10, 4, 2, 8.0), "head_dim must be an integer of at least 1, got 8.0"),
        (lambda: prefill_cost([1.0] * 5, 3, 4, SHAPES), "got 5 shares and 6 layers"),
        (lambda: prefill_cost([1.0] * 6, -1, 4, SHAPES), "text_tokens must be at least 0, got -1"),
        (lambda: prefill_cost([1.0] * 6, 3, -4, SHAPES), "image_tokens must be at least 0, got -4"),
        (lambda: prefill_cost([1.0] * 6, 3, 4, SHAPES, 0), "element_bytes must be at least 1, got 0"),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
