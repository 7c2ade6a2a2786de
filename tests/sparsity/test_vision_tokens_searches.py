import itertools
import math
import sys

import pytest

from hasten.sparsity.vision_tokens import (
    FastV,
    LayerShape,
    PSigmoid,
    Pyramid,
    Stages,
    g_search,
    grid,
    p_sigmoid_search,
    prefill_cost,
)

METHODS = ["gp", "sobol"]


def shortfall(needs):
    """A metric that no surplus raises: minus the most that a layer lacks."""
    return lambda shares: -max(max(0.0, need - share) for need, share in zip(needs, shares, strict=True))


class Interrupted(Exception):
    pass


def stopping(evaluate, after):
    """`evaluate`, which raises once it has run `after` times."""
    count = itertools.count()

    def evaluated(shares):
        if next(count) == after:
            raise Interrupted
        return evaluate(shares)

    return evaluated


# ---- G-Search


def test_the_grid_falls_by_equal_ratios():
    shares = grid(7, least=1 / 64)
    assert shares == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64], rel=1e-15)
    assert shares[0] == 1 and shares[-1] == 1 / 64 and grid(2, 0.3) == (1, 0.3)


@pytest.mark.parametrize(
    "needs", [(1, 0.9, 0.5, 0.5, 0.1), (1, 0.2, 0.2, 0.1, 0.05), (1, 1, 1, 1, 1), (0,) * 5], ids=str
)
@pytest.mark.parametrize("tolerance", [0, 0.15])
def test_g_search_is_optimal_where_needs_fall(needs, tolerance):
    """No schedule of the grid that is within the tolerance keeps less at any layer: by trying all of them."""
    layers, levels, evaluate = 5, (1.0, 0.7, 0.5, 0.2, 0.1), shortfall(needs)
    found = g_search(evaluate, layers, tolerance=tolerance, levels=levels)
    schedules = itertools.combinations_with_replacement(levels, layers - 1)
    within = [(1.0, *shares) for shares in schedules if evaluate((1.0, *shares)) >= evaluate((1.0,) * 5) - tolerance]
    assert found.shares == tuple(map(min, zip(*within, strict=True)))
    assert found.metric == evaluate(found.shares) >= found.full - tolerance
    assert found.schedule.shares(layers) == found.shares


def test_g_search_takes_a_logarithm_of_a_sweep():
    layers, levels = 32, 16
    needs = [1 / (1 + math.exp(0.4 * (layer - 10))) for layer in range(layers)]
    seen = []
    found = g_search(lambda shares: seen.append(shares) or shortfall(needs)(shares), layers, tolerance=0, levels=levels)
    assert found.sweep == 31 * 16
    assert found.evaluations == len(seen) == len(set(seen)) == len(found.history)
    assert found.evaluations <= 1 + 31 * math.ceil(math.log2(levels)) < found.sweep / 3.9
    assert [shares for shares, _ in found.history] == seen
    assert all(after <= before for shares in seen for before, after in itertools.pairwise(shares))


def test_g_search_touches_only_the_layers_that_it_may():
    layers, needs = 12, [1 - layer / 12 for layer in range(12)]
    late = g_search(shortfall(needs), layers, tolerance=0, start=4)
    assert late.shares[:4] == (1, 1, 1, 1) and late.schedule.stages(layers)[4] < 1
    few = g_search(shortfall(needs), layers, tolerance=0, stages=(3, 8))
    assert set(few.schedule.stages(layers)) == {3, 8} and few.sweep == 2 * 16
    assert few.shares[3] == min(share for share in grid(16) if share >= needs[3])
    assert few.shares[8] == min(share for share in grid(16) if share >= needs[8])
    none = g_search(shortfall([1.0] * 12), layers, tolerance=0)
    assert none.shares == (1.0,) * 12 and none.schedule == Stages({1: 1.0})


@pytest.mark.parametrize("after", [0, 1, 5, 20])
def test_g_search_goes_on_where_it_was_interrupted(after):
    layers, evaluate = 9, shortfall([1 - layer / 9 for layer in range(9)])
    whole = g_search(evaluate, layers, tolerance=0.05)
    saved = {}
    with pytest.raises(Interrupted):
        g_search(stopping(evaluate, after), layers, tolerance=0.05, on_evaluation=saved.__setitem__)
    assert len(saved) == after
    rest = g_search(evaluate, layers, tolerance=0.05, known=saved, on_evaluation=saved.__setitem__)
    assert rest.evaluations == whole.evaluations - after
    assert (rest.shares, rest.metric, rest.full, rest.history) == (
        whole.shares,
        whole.metric,
        whole.full,
        whole.history,
    )
    again = g_search(stopping(evaluate, 0), layers, tolerance=0.05, known=saved)
    assert again.evaluations == 0 and again.history == whole.history


def test_a_full_metric_that_is_given_is_not_evaluated():
    evaluate = shortfall([1, 0.5, 0.5])
    found = g_search(evaluate, 3, tolerance=0, full=0.0)
    assert (1.0, 1.0, 1.0) not in dict(found.history)
    assert found.shares == g_search(evaluate, 3, tolerance=0).shares
    assert g_search(evaluate, 3, tolerance=0, full=1.0).shares == (1, 1, 1), "nothing reaches it"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerance": -0.1}, "tolerance must be at least 0, got -0.1"),
        ({"tolerance": math.nan}, "tolerance must be at least 0, got nan"),
        ({"levels": 1}, "levels must be an integer of at least 2, got 1"),
        ({"levels": (0.5, 0.0)}, r"levels must be in \(0, 1\], got \[0.5, 0.0\]"),
        ({"start": 0}, "stages must be layers from 1 to 7, got"),
        ({"start": 8}, r"stages must be layers from 8 to 7, got \[\]"),
        ({"stages": (2, 8)}, r"stages must be layers from 1 to 7, got \[2, 8\]"),
        ({"stages": (4, 4)}, r"stages must rise, got \[4, 4\]"),
        ({"stages": ()}, r"stages must be layers from 1 to 7, got \[\]"),
        ({"evaluate": lambda shares: math.nan}, r"evaluate must return a number, got NaN for the shares \(1.0, "),
    ],
)
def test_g_search_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        g_search(**({"evaluate": shortfall([0.5] * 8), "layers": 8, "tolerance": 0} | change))


# ---- P-Sigmoid

LAYERS = 16
TARGET = PSigmoid.within(0.3, 14, 0.12, LAYERS)  # the best there is, by the metric below


def nearness(shares):
    return -sum((a - b) ** 2 for a, b in zip(shares, TARGET.shares(LAYERS), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_p_sigmoid_comes_near_the_best(method):
    found = p_sigmoid_search(nearness, LAYERS, 0.3, evaluations=24, seed=0, method=method)
    assert found.method == method
    assert found.metric == nearness(found.shares) == max(metric for _, metric in found.history)
    assert found.schedule.shares(LAYERS) == found.shares
    for steepness, floor in ((1, 0.0), (2, 0.2), (50, 0.0), (50, 0.25), (5, 0.0)):
        assert found.metric > 5 * nearness(PSigmoid.within(0.3, steepness, floor, LAYERS).shares(LAYERS))
    at_budget = FastV(2, (0.3 * LAYERS - 2) / (LAYERS - 2))
    assert sum(at_budget.shares(LAYERS)) == pytest.approx(0.3 * LAYERS)
    assert found.metric > nearness(at_budget.shares(LAYERS))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [0.08, 0.25, 0.9])
def test_no_sigmoid_that_is_tried_exceeds_the_budget(method, budget):
    found = p_sigmoid_search(nearness, LAYERS, budget, evaluations=9, seed=1, method=method, levels=3, start=1)
    assert len(found.history) == 9
    for given, _ in found.history:
        shares = given.shares(LAYERS)
        assert sum(shares) / LAYERS == pytest.approx(budget, rel=1e-9)
        assert len(given.stages(LAYERS)) <= 3 and given.levels == 3
        assert 1 <= given.steepness <= 50 and 0 <= given.floor <= 0.3


def test_a_cost_of_the_callers_own_is_kept_to():
    shapes = [LayerShape(1000, 4, 4, 8)] * LAYERS
    whole = prefill_cost((1.0,) * LAYERS, 20, 60, shapes).image_operations

    def cost(shares):
        return prefill_cost(shares, 20, 60, shapes).image_operations / whole

    found = p_sigmoid_search(nearness, LAYERS, 0.35, evaluations=5, seed=0, method="sobol", start=3, cost=cost)
    for given, _ in found.history:
        assert 0.345 < cost(given.shares(LAYERS)) <= 0.35
        assert given.shares(LAYERS)[:3] == (1, 1, 1)


@pytest.mark.parametrize("method", METHODS)
def test_p_sigmoid_is_the_same_for_a_seed_and_goes_on_where_it_was_interrupted(method):
    settings = {"evaluations": 10, "first": Pyramid(), "method": method}
    saved = {}
    with pytest.raises(Interrupted):
        p_sigmoid_search(stopping(nearness, 7), LAYERS, 0.3, seed=3, on_evaluation=saved.__setitem__, **settings)
    assert len(saved) == 7
    rest = p_sigmoid_search(nearness, LAYERS, 0.3, seed=3, known=saved, on_evaluation=saved.__setitem__, **settings)
    again = p_sigmoid_search(stopping(nearness, 0), LAYERS, 0.3, seed=3, known=saved, **settings)
    assert again.evaluations == 0 and len(saved) == 7 + rest.evaluations
    assert (again.history, again.schedule) == (rest.history, rest.schedule)
    other = p_sigmoid_search(nearness, LAYERS, 0.3, seed=4, **settings)
    assert other.history[0] == rest.history[0] and other.history[1] != rest.history[1]


def test_the_first_sigmoid_is_the_nearest_to_what_is_given():
    found = p_sigmoid_search(nearness, LAYERS, 0.3, evaluations=1, seed=0, first=TARGET)
    ((given, metric),) = found.history
    assert metric > -0.003 and found.evaluations == 1
    assert given.steepness == pytest.approx(14, rel=0.2) and given.floor == pytest.approx(0.12, abs=0.02)
    steep = p_sigmoid_search(nearness, LAYERS, 0.3, evaluations=1, seed=0, first=FastV(5, 0.1)).schedule
    assert steep.steepness > 30 and steep.floor == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_a_metric_that_tells_nothing_is_searched_too(method):
    found = p_sigmoid_search(lambda shares: 0.5, LAYERS, 0.3, evaluations=9, seed=0, method=method)
    assert found.metric == 0.5 and found.schedule == found.history[0][0]
    assert len({given for given, _ in found.history}) == 9


def test_without_the_extra_points_are_spread(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    found = p_sigmoid_search(nearness, LAYERS, 0.3, evaluations=3, seed=0)
    assert found.method == "sobol"
    with pytest.raises(ImportError, match=r'needs scikit-learn: pip install "hasten\[search\]"'):
        p_sigmoid_search(nearness, LAYERS, 0.3, evaluations=3, seed=0, method="gp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "grid"}, 'method must be "auto", "gp" or "sobol", got \'grid\''),
        ({"evaluations": 0}, "evaluations must be an integer of at least 1, got 0"),
        ({"budget": 0.05}, r"the budget must be at least 0.0625, .* got 0.05"),
        ({"budget": 1.5}, r"budget must be in \(0, 1\], got 1.5"),
        ({"start": 0}, "first must be a layer from 1 on"),
        ({"first": FastV(20)}, "layer 20 is none of the model's 16 layers"),
        ({"evaluate": lambda shares: math.nan}, "evaluate must return a number, got NaN"),
    ],
)
def test_p_sigmoid_refuses(change, message):
    settings = {"evaluate": nearness, "layers": LAYERS, "budget": 0.3, "evaluations": 3, "seed": 0}
    with pytest.raises(ValueError, match=message):
        p_sigmoid_search(**(settings | change))
