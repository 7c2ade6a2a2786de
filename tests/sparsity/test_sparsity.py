import itertools

import pytest
import torch

from hasten.sparsity.allocation import HIGHEST, greedy, spread
from hasten.sparsity.cats import cats
from hasten.sparsity.histogram import ScoreHistogram
from hasten.sparsity.teal import teal
from hasten.sparsity.threshold import cutoffs, masked, past_first, scores
from hasten.sparsity.union import largest_union
from hasten.sparsity.wina import wina


@pytest.mark.parametrize("shape", [(37, 11), (3, 37, 11), (1000, 600), (1, 5), (5, 1)], ids=str)
def test_factors(shape):
    weight = torch.randn(shape, dtype=torch.bfloat16)
    expected = weight.double().pow(2).sum(-2).sqrt()
    torch.testing.assert_close(wina(weight).double(), expected, rtol=1e-5, atol=0)
    by_columns = wina(weight.mT.contiguous().mT)
    torch.testing.assert_close(by_columns.double(), expected, rtol=1e-5, atol=0)
    assert wina(weight).dtype == by_columns.dtype == torch.float32
    for ones in (teal(weight), cats(weight)):
        assert ones.dtype == torch.float32 and torch.equal(ones, torch.ones(ones.shape))
    assert teal(weight).shape == wina(weight).shape
    assert cats(weight).shape == weight.shape[-1:]


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_a_cutoff_decides_as_the_score_does(threshold):
    torch.manual_seed(0)
    x, norms = torch.randn(1000), torch.rand(1000)
    norms[::7] = 0
    x[::5] = 0
    assert torch.equal(x.abs() > cutoffs(threshold, norms), (x.abs() * norms > threshold) & (norms > 0))
    assert cutoffs(threshold, norms)[::7].isposinf().all(), "not NaN, above which kernels take everything to be"


@pytest.mark.parametrize(
    "draw",
    [torch.randn, lambda n: torch.randn(n).exp() ** 3, lambda n: torch.randn(n).relu()],
    ids=["normal", "heavy", "relu"],
)
@pytest.mark.parametrize("sparsity", [0.05, 0.25, 0.5, 0.65, 0.99])
def test_threshold_is_the_quantile(draw, sparsity):
    torch.manual_seed(0)
    scores = draw(60_001).abs()
    histogram = ScoreHistogram()
    for part in scores.split(1000):
        histogram.add(part)
    assert histogram.total == scores.numel()
    threshold = histogram.threshold(sparsity)
    zeros = float((scores == 0).float().mean())
    assert float((scores <= threshold).float().mean()) == pytest.approx(max(sparsity, zeros), abs=2e-3)


def test_threshold_grows_with_sparsity_and_starts_at_nought():
    histogram = ScoreHistogram()
    histogram.add(torch.randn(5000).abs())
    thresholds = [histogram.threshold(i / 100) for i in range(100)]
    assert thresholds[0] == 0 and thresholds == sorted(thresholds)


def test_a_threshold_lies_within_its_bin():
    """Of scores that are spread evenly over an octave, the threshold is the very quantile."""
    histogram = ScoreHistogram()
    histogram.add(2.0 ** ((torch.arange(100_000) + 0.5) / 100_000))
    for sparsity in (0.001, 0.1234, 0.5, 0.9, 0.9999):
        assert histogram.threshold(sparsity) == pytest.approx(2.0**sparsity, rel=1e-4)


def test_scores_beyond_the_range_are_counted():
    histogram = ScoreHistogram()
    histogram.add(torch.tensor([1e-30, 0.0, 2.0**-40, 1.0, 1e9]))
    assert (histogram.zeros, histogram.total) == (2, 5)


def test_sparsity_is_spread_by_names_endings_and_patterns():
    names = ["layers.0.up", "layers.0.group_up", "layers.1.up", "up"]
    assert spread(0.5, names) == dict.fromkeys(names, 0.5)
    assert spread({"up": 0.5}, names) == dict(zip(names, [0.5, 0.0, 0.5, 0.5], strict=True))
    assert spread({"layers.*": 0.5, "layers.1.up": 0.2}, names) == dict(zip(names, [0.5, 0.5, 0.2, 0.0], strict=True))
    assert spread({"layers.1.up": 0.2, "*up": 0.0}, names) == dict.fromkeys(names, 0.0), "the last match counts"
    for pattern in ("p", "layers", "0.UP"):
        with pytest.raises(ValueError, match=f"'{pattern}', which is no module .*nearest name is"):
            spread({pattern: 0.5}, names)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_scores_are_refused(value):
    with pytest.raises(ValueError, match="finite"):
        ScoreHistogram().add(torch.tensor([1.0, value]))


def test_greedy_spends_the_budget_where_it_costs_least():
    sizes = {"q": 100, "k": 20, "up": 400}
    costs = {"q": 1.0, "k": 10.0, "up": 3.0}
    tried = []

    def error(sparsity):
        tried.append(dict(sparsity))
        return sum(costs[name] * sizes[name] * value**2 for name, value in sparsity.items())

    for target in (0.0, 0.1, 0.5, 0.9, HIGHEST):
        sparsity = greedy(sizes, error, target)
        assert sum(sizes[n] * s for n, s in sparsity.items()) / sum(sizes.values()) == pytest.approx(target)
        assert all(0 <= s <= HIGHEST + 1e-9 for s in sparsity.values())
    budgets = sorted({0.0, *(sum(sizes[name] * s for name, s in trial.items()) for trial in tried)})
    assert max(b - a for a, b in itertools.pairwise(budgets)) <= 0.05 * 520 / 3 + 1e-6, "a step is small"
    half = greedy(sizes, error, 0.5)
    assert half["q"] > half["up"] > half["k"]
    assert error(half) < error(dict.fromkeys(sizes, 0.5))
    assert all(0 <= s < 1 for trial in tried for s in trial.values())


def test_greedy_refuses_what_it_cannot_reach():
    with pytest.raises(ValueError, match=r"0\.95.*0\.99"):
        greedy({"q": 4}, lambda sparsity: 0.0, 0.99)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores(dtype):
    x, factors = torch.randn(5, 11).to(dtype), torch.rand(11)
    assert torch.equal(scores(x, factors), x.float().abs() * factors)


def test_the_first_position_does_not_count():
    x = torch.randn(1, 6, 4)
    assert torch.equal(past_first(x), x[0, 1:])
    assert torch.equal(past_first(x[0]), x[0, 1:])
    cutoff = torch.full((4,), 0.7)
    expected = torch.where(x.abs() > 0.7, x, 0)
    expected[:, 0] = x[:, 0]
    assert torch.equal(masked(x, cutoff), expected)
    x[0, 3, 2] = 0.7
    assert masked(x, cutoff)[0, 3, 2] == 0, "an input at its cutoff is skipped"


def test_the_union_of_a_batch():
    """The largest batch that leaves at least 15 % of the inputs out, were its rows independent."""
    for percent in range(1, 100):
        sparsity = percent / 100
        batch = largest_union(sparsity, 8)
        assert 1 <= batch <= 8
        assert batch == 1 or sparsity**batch >= 0.15 - 1e-9
        assert batch == 8 or sparsity ** (batch + 1) < 0.15
    assert [largest_union(sparsity, 3) for sparsity in (0.5, 0.99)] == [2, 3]
