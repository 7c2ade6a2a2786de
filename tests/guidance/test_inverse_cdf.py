"""The inverse of a cumulative distribution: every index on its own share of [0, 1], and never one without weight."""

import pytest
import torch

from hasten.guidance.inverse_cdf import inverse_cdf, uniforms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_index_has_its_share_of_the_points(dtype):
    """On points in the middle of equal steps the counts are the weights themselves."""
    weights = torch.tensor([[3, 0, 1, 4, 0], [0, 0, 5, 0, 3]], dtype=dtype)
    points = (torch.arange(80, dtype=torch.float64) + 0.5) / 80
    found = inverse_cdf(weights, points.expand(2, -1))
    assert found.dtype == torch.int64 and (found.diff() >= 0).all()
    assert torch.equal(torch.nn.functional.one_hot(found, 5).sum(1), 10 * weights.long())


def test_the_ends_of_the_interval_never_give_an_index_without_weight():
    weights = torch.tensor([[0.0, 1.0, 0.0, 1e-30, 0.0], [0.0, 0.0, 1e-300, 0.0, 0.0]], dtype=torch.float64)
    points = torch.tensor([[0.0, 2.0**-54, 1 - 2.0**-53, 1.0]], dtype=torch.float64).expand(2, -1)
    assert inverse_cdf(weights, points).tolist() == [[1, 1, 1, 1], [2, 2, 2, 2]]


def test_rows_without_a_law_give_some_index():
    weights = torch.tensor([[0.0] * 4, [torch.nan] * 4])
    found = inverse_cdf(weights, torch.rand(2, 9, dtype=torch.float64))
    assert ((found >= 0) & (found < 4)).all()


def test_every_row_has_numbers_of_its_own_generator():
    together = uniforms(3, 5, [torch.Generator().manual_seed(row) for row in range(3)])
    for row in range(3):
        assert torch.equal(uniforms(1, 5, torch.Generator().manual_seed(row))[0], together[row])
    assert ((together > 0) & (together < 1)).all()
    with pytest.raises(ValueError, match="generator must be one, or one per row: got 2 for 3 rows"):
        uniforms(3, 5, [torch.Generator()] * 2)
