import dataclasses
import itertools
import json
import math
from fractions import Fraction

import pytest

from hasten.sparsity.vision_tokens import FastV, PSigmoid, Pyramid, Schedule, Stages, kept, schedule

SCHEDULES = [
    FastV(),
    FastV(layer=3, keep=1),
    FastV(layer=1, keep=1e-3),
    Pyramid(),
    Pyramid(0.7, parts=3),
    Pyramid(parts=(2, 5)),
    Stages({2: 0.5, 8: 0.25}),
    Stages({8: 0.25, 2: 0.5, 3: 0.5}),
    PSigmoid(10, 0.3, 0.1),
    PSigmoid(1, -2.0, levels=1),
    PSigmoid(50, 0.5, 0.0, levels=100, first=3),
    PSigmoid(1e6, 0.001),
]


@pytest.mark.parametrize("given", SCHEDULES, ids=str)
@pytest.mark.parametrize("layers", [9, 10, 32, 33])
def test_shares_fall_within_bounds_and_stages_tell_them(given, layers):
    shares = given.shares(layers)
    assert len(shares) == layers and shares[0] == 1
    assert all(type(share) is float and 0 < share <= 1 for share in shares)
    assert all(after <= before for before, after in itertools.pairwise(shares))
    share, rebuilt, stages = 1.0, [], given.stages(layers)
    for layer in range(layers):
        share = stages.get(layer, share)
        rebuilt.append(share)
    assert tuple(rebuilt) == shares
    assert len(set(shares[1:]) | {1.0}) == len(stages) + 1, "a stage only where the share falls"


def test_the_shares_of_each_kind():
    assert FastV(2, 0.5).shares(4) == (1, 1, 0.5, 0.5)
    assert Pyramid().stages(32) == {8: 0.5, 16: 0.25, 24: 0.125}
    assert Pyramid(0.5, parts=(1, 3)).shares(4) == (1, 0.5, 0.5, 0.25)
    assert Pyramid(parts=3).stages(7) == {2: 0.5, 4: 0.25}
    assert Stages({3: 0.25, 1: 0.5}).shares(5) == (1, 0.5, 0.5, 0.25, 0.25)
    assert FastV(keep=1).stages(32) == Pyramid(ratio=1).stages(32) == Stages({5: 1.0}).stages(32) == {}


@dataclasses.dataclass(frozen=True)
class Holder:
    schedule: Schedule


@pytest.mark.parametrize("given", SCHEDULES, ids=str)
def test_what_holds_a_schedule_is_saved_by_its_fields(given):
    assert schedule(given) is given
    assert schedule(given.to_dict()) == given
    saved = json.loads(json.dumps(dataclasses.asdict(Holder(given))))
    read = schedule(saved["schedule"])
    assert read == given and repr(read) == repr(given) and hash(read) == hash(given)
    assert eval(repr(given)) == given


def test_a_mapping_is_stages():
    expected = Stages({2: 0.5, 8: 0.25})
    assert schedule({8: 0.25, 2: 0.5}) == schedule({"2": 0.5, "8": 0.25}) == expected
    assert expected.by_layer == ((2, 0.5), (8, 0.25))


def sigmoid(given: PSigmoid, layers: int) -> list[float]:
    return [
        given.floor + (1 - given.floor) / (1 + math.exp(given.steepness * (layer / layers - given.middle)))
        for layer in range(layers)
    ]


@pytest.mark.parametrize("steepness", [1, 10, 50])
@pytest.mark.parametrize("layers", [8, 23, 32])
def test_a_sigmoid_in_enough_steps_is_the_sigmoid(steepness, layers):
    given = PSigmoid(steepness, 0.4, 0.1, levels=layers, first=2)
    assert given.shares(layers)[:2] == (1, 1)
    assert given.shares(layers)[2:] == pytest.approx(sigmoid(given, layers)[2:], abs=1e-6)


@pytest.mark.parametrize("levels", [1, 2, 3, 6])
@pytest.mark.parametrize("first", [1, 3])
def test_few_steps_have_the_mean_of_the_sigmoid_at_the_least_distance(levels, first):
    layers = 11
    given = PSigmoid(12, 0.45, 0.05, levels=levels, first=first)
    shares, curve = given.shares(layers)[first:], sigmoid(given, layers)[first:]
    assert len(given.stages(layers)) <= levels
    assert sum(shares) == pytest.approx(sum(curve), rel=1e-14)

    def distance(cuts):
        ends = zip((0, *cuts), (*cuts, len(curve)), strict=True)
        runs = [[Fraction(value) for value in curve[start:end]] for start, end in ends]
        return sum(sum((value - sum(run) / len(run)) ** 2 for value in run) for run in runs)

    least = min(distance(cuts) for cuts in itertools.combinations(range(1, len(curve)), levels - 1))
    assert sum((a - b) ** 2 for a, b in zip(shares, curve, strict=True)) == pytest.approx(float(least), rel=1e-9)


@pytest.mark.parametrize("budget", [0.13, 0.25, 0.5, 0.999])
@pytest.mark.parametrize("steepness", [1, 7.5, 50])
@pytest.mark.parametrize("layers", [8, 32])
def test_the_budget_is_met(budget, steepness, layers):
    given = PSigmoid.within(budget, steepness, 0.004, layers, levels=4)
    assert sum(given.shares(layers)) / layers == pytest.approx(budget, rel=1e-12)
    assert len(given.stages(layers)) <= 4
    assert (given.steepness, given.floor, given.levels) == (steepness, 0.004, 4)


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("tokens", [10, 576])
def test_a_budget_of_the_callers_own_is_met_from_below(budget, tokens):
    """A cost in whole tokens rises in steps: the last step within the budget is taken."""
    layers = 12

    def cost(shares):
        return sum(kept(share, tokens) ** 2 for share in shares) / (layers * tokens**2)

    given = PSigmoid.within(budget, 9, 0.05, layers, cost=cost)
    wider = dataclasses.replace(given, middle=given.middle + 1e-9)
    assert cost(given.shares(layers)) <= budget < cost(wider.shares(layers))
    whole = PSigmoid.within(1, 9, 0.05, layers, cost=cost)
    assert [kept(share, tokens) for share in whole.shares(layers)] == [tokens] * layers


@pytest.mark.parametrize(("budget", "floor", "first"), [(0.125, 0, 1), (0.3, 0.3, 1), (0.3, 0, 3)])
def test_a_budget_that_cannot_be_met_is_refused(budget, floor, first):
    with pytest.raises(ValueError, match=rf"the budget must be at least 0\.\d+, .* {first} see all .* got {budget}"):
        PSigmoid.within(budget, 10, floor, 8, first=first)


@pytest.mark.parametrize("tokens", [1, 7, 30, 576, 2880])
def test_how_many_tokens_a_share_keeps(tokens):
    for count in range(1, tokens + 1):
        assert kept(count / tokens, tokens) == count
    assert kept(1e-6, tokens) == 1 and kept(1.0, tokens) == tokens
    assert [kept(0.1, 30), kept(0.101, 30), kept(0.5, 0)] == [3, 4, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FastV(keep=0), r"keep must be in \(0, 1\], got 0"),
        (lambda: FastV(keep=1.01), r"keep must be in \(0, 1\], got 1.01"),
        (lambda: FastV(keep=math.nan), r"keep must be a number in \(0, 1\], got nan"),
        (lambda: FastV(keep=True), r"keep must be a number in \(0, 1\], got True"),
        (lambda: FastV(keep="half"), "got 'half'"),
        (lambda: FastV(layer=0), r"layer must be a layer from 1 on \(.*\), got 0"),
        (lambda: FastV(layer=-2), "got -2"),
        (lambda: FastV(layer=2.0), "got 2.0"),
        (lambda: FastV(layer=True), "got True"),
        (lambda: Pyramid(ratio=-0.5), r"ratio must be in \(0, 1\], got -0.5"),
        (lambda: Pyramid(parts=1), "parts must be at least 2, got 1"),
        (lambda: Pyramid(parts=(8, 8)), r"rising layers, got \(8, 8\)"),
        (lambda: Pyramid(parts=(0, 8)), r"parts\[0\] must be a layer from 1 on"),
        (lambda: Pyramid(parts="8"), "an integer, or the layers with which parts begin, got '8'"),
        (lambda: Pyramid(parts=()), r"got \(\)"),
        (lambda: Stages({}), "by_layer is empty"),
        (lambda: Stages({0: 0.5}), "a layer from 1 on"),
        (lambda: Stages({"two": 0.5}), "got 'two'"),
        (lambda: Stages({2: 0.5, "2": 0.5}), "names layer 2 twice"),
        (lambda: Stages({2: 0.5, 8: 0.75}), "got 0.5 from layer 2 on and 0.75 from layer 8 on"),
        (lambda: Stages({2: None}), r"by_layer\[2\] must be a number in \(0, 1\], got None"),
        (lambda: Stages(0.5), "must map layers to shares, .* got 0.5"),
        (lambda: PSigmoid(0, 0.5), "steepness must be positive, got 0"),
        (lambda: PSigmoid(1, math.inf), "middle must be a finite number, got inf"),
        (lambda: PSigmoid(1, 0.5, 1.0), r"floor must be in \[0, 1\), got 1.0"),
        (lambda: PSigmoid(1, 0.5, levels=0), "levels must be an integer of at least 1, got 0"),
        (lambda: PSigmoid(1, 0.5, first=0), "first must be a layer from 1 on"),
        (lambda: schedule(0.5), "a schedule is one such as FastV.* got 0.5"),
        (
            lambda: schedule({"kind": "SlowV"}),
            "unknown kind of schedule 'SlowV', known are FastV, .*PSigmoid, Pyramid, Stages",
        ),
        (lambda: schedule({"kind": ["FastV"]}), r"unknown kind of schedule \['FastV'\]"),
        (lambda: schedule({"kind": "FastV", "share": 0.5}), "FastV has no field 'share'"),
        (lambda: schedule({"kind": "PSigmoid", "floor": 0.5}), "PSigmoid needs the field 'middle', 'steepness'"),
    ],
)
def test_a_bad_schedule_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "given", [FastV(8), Pyramid(parts=(2, 8)), Stages({8: 0.5}), PSigmoid(9, 0.5, first=8)], ids=str
)
def test_layers_that_there_are_not_are_refused(given):
    assert len(given.shares(9)) == 9
    for method in (given.shares, given.stages):
        with pytest.raises(ValueError, match="layer 8 is none of the model's 8 layers, which are 0 to 7"):
            method(8)
    with pytest.raises(ValueError, match="4 parts need as many layers, the model has 3"):
        Pyramid().shares(3)
    for layers in (0, 2.0, True):
        with pytest.raises(ValueError, match=f"layers must be an integer of at least 1, got {layers}"):
            given.shares(layers)
