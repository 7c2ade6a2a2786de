"""AWRS is exact: every claim on the estimator holds in fractions, over every order in which tokens can be drawn."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
import torch

from hasten.guidance.text import bitmask
from hasten.guidance.text.categorical import GumbelRace, LazyOrder, sample
from hasten.guidance.text.rejection import draw, walk, weight

F = Fraction
LAWS = {
    "five": ([F(1, 2), F(1, 4), F(1, 8), F(1, 16), F(1, 16)], [False, True, False, True, False]),
    "likely-refused": ([F(9, 10), F(1, 20), F(1, 40), F(1, 40)], [False, True, True, False]),
    "likely-accepted": ([F(9, 10), F(1, 20), F(1, 40), F(1, 40)], [True, False, False, True]),
    "one-valid": ([F(1, 3), F(1, 3), F(1, 5), F(2, 15)], [False, False, False, True]),
    "all-valid": ([F(1, 7), F(2, 7), F(4, 7)], [True, True, True]),
    "none-valid": ([F(1, 7), F(2, 7), F(4, 7)], [False, False, False]),
    "valid-but-impossible": ([F(0), F(1, 2), F(1, 2)], [True, False, True]),
    "six": ([F(1, 21), F(2, 21), F(3, 21), F(4, 21), F(5, 21), F(6, 21)], [True, False, True, False, False, True]),
}
CASES = [(law, checks, extra) for law in LAWS for checks in (None, 1, 2, 3, 4, 6) for extra in (0, 1, 2, 6)]


def orders(p):
    """Every order of the possible tokens, with its probability as draws without replacement (Plackett-Luce)."""
    for order in itertools.permutations([token for token, mass in enumerate(p) if mass]):
        probability, left = F(1), sum(p)
        for token in order:
            probability *= p[token] / left
            left -= p[token]
        yield order, probability


def expectation(p, valid, max_checks, extra_checks, estimator=weight):
    """E[w * 1{x = t}] for every t."""
    totals = [F(0)] * len(p)
    for order, probability in orders(p):
        walked = walk(order, valid.__getitem__, max_checks, extra_checks)
        if walked.end == "accepted":
            tested = [p[token] for token in walked.tokens]
            token = walked.tokens[walked.valid.index(True)]
            totals[token] += probability * estimator(tested, walked.valid, sum(p) - sum(tested))
    return totals


@pytest.mark.parametrize(("law", "max_checks", "extra_checks"), CASES)
def test_the_weight_is_proper_in_fractions(law, max_checks, extra_checks):
    p, valid = LAWS[law]
    assert expectation(p, valid, max_checks, extra_checks) == [
        mass if ok else 0 for mass, ok in zip(p, valid, strict=True)
    ]


MUTANTS = {
    "no-tail": lambda p, valid, untested: sum(q for q, ok in zip(p, valid, strict=True) if ok),
    "tail-always": lambda p, valid, untested: sum(q for q, ok in zip(p, valid, strict=True) if ok) + untested,
    "refused-mass-counted": lambda p, valid, untested: sum(p) + untested if valid[-1] else sum(p),
    "unweighted": lambda p, valid, untested: F(1),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_estimator_is_found(mutant):
    p, valid = LAWS["five"]
    exact = [mass if ok else 0 for mass, ok in zip(p, valid, strict=True)]
    assert expectation(p, valid, None, 0, MUTANTS[mutant]) != exact


def test_more_checks_lower_the_variance():
    p, valid = LAWS["six"]

    def second_moment(extra):
        return sum(expectation(p, valid, None, extra, lambda *tested: weight(*tested) ** 2))

    moments = [second_moment(extra) for extra in range(5)]
    mass = sum(q for q, ok in zip(p, valid, strict=True) if ok)
    assert moments == sorted(moments, reverse=True) and moments[0] > moments[-1] == mass**2


def rows_of(p, rows):
    return torch.tensor(p, dtype=torch.float64).log().expand(rows, -1)


def test_draw_uses_the_estimator():
    p, valid = LAWS["five"]
    for extra, checks in ((0, None), (2, None), (0, 2)):
        drawn = draw(
            rows_of(p, 200),
            lambda row, token: valid[token],
            generator=torch.Generator().manual_seed(1),
            extra_checks=extra,
            max_checks=checks,
        )
        possible = {
            (walked.tokens[walked.valid.index(True)], w)
            for order, _ in orders(p)
            if (walked := walk(order, valid.__getitem__, checks, extra)).end == "accepted"
            for tested in [[p[token] for token in walked.tokens]]
            for w in [weight(tested, walked.valid, sum(p) - sum(tested))]
        }
        for token, log_weight, end in zip(drawn.token.tolist(), drawn.log_weight.tolist(), drawn.end, strict=True):
            if end == "accepted":
                assert min(abs(math.exp(log_weight) - w) for t, w in possible if t == token) < 1e-12
            else:
                assert (end, token, log_weight) == ("budget_spent", -1, -math.inf)


@pytest.mark.parametrize("width", [3, 64, 65, 1000])
@pytest.mark.parametrize("rate", [0.02, 1.0])
def test_the_lazy_order_is_that_of_draws_without_replacement(width, rate):
    """First and second token against their joint law. Of 1000 tokens of nearly equal mass few are in the first race."""
    logits = (-rate * torch.arange(width, dtype=torch.float64) ** 0.5)[None]
    p = logits[0].softmax(-1)
    runs = 20_000
    generator = torch.Generator().manual_seed(width)
    race = GumbelRace(logits.expand(runs, -1), 64, generator, False)
    bins = torch.arange(width) * 3 // width
    pairs = torch.zeros(3, 3, dtype=torch.float64)
    for run in range(runs):
        order = iter(LazyOrder(logits, race, run, generator))
        pairs[bins[next(order)], bins[next(order)]] += 1
    joint = p[:, None] * p[None, :] / (1 - p[:, None])
    joint.fill_diagonal_(0)
    member = torch.nn.functional.one_hot(bins, 3).double()
    expected = member.T @ joint @ member * runs
    kept = expected > 5
    chi_square = ((pairs - expected)[kept] ** 2 / expected[kept]).sum()
    assert not pairs[expected == 0].any() and chi_square < 26  # 8 degrees of freedom: 0.999 lies at 26.1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_whole_order_is_that_of_draws_without_replacement(size):
    """A first race smaller than the vocabulary: all 24 orders through the others' common key and the next race."""
    p = [F(8, 20), F(6, 20), F(5, 20), F(1, 20)]
    runs = 10_000
    logits = rows_of(p, 1)
    generator = torch.Generator().manual_seed(size)
    race = GumbelRace(logits.expand(runs, -1), size, generator, False)
    seen = Counter(tuple(LazyOrder(logits, race, run, generator)) for run in range(runs))
    expected = {order: runs * float(probability) for order, probability in orders(p)}
    assert set(seen) <= set(expected)
    assert sum((seen[order] - e) ** 2 / e for order, e in expected.items()) < 49.7  # 23 degrees of freedom, 0.999


@pytest.mark.parametrize("greedy", [False, True])
def test_every_possible_token_comes_once(greedy):
    logits = torch.randn(1, 3000).masked_fill_(torch.arange(3000) % 3 == 0, -torch.inf)
    generator = torch.Generator().manual_seed(0)
    order = LazyOrder(logits, GumbelRace(logits, 64, generator, greedy), 0, generator, greedy)
    came = list(order)
    assert sorted(came) == [token for token in range(3000) if token % 3]
    assert order.log_remaining() == -math.inf
    torch.testing.assert_close(
        torch.tensor(order.log_probabilities, dtype=torch.float64), logits.double().log_softmax(-1)[0, came]
    )
    if greedy:
        assert came == logits[0].argsort(descending=True)[:2000].tolist()


@pytest.mark.parametrize("count", [1, 5, 200, 2500])
def test_the_remaining_mass_has_no_cancellation(count):
    logits = -torch.linspace(0, 60, 3000, dtype=torch.float64)[None].clone()
    generator = torch.Generator().manual_seed(0)
    order = LazyOrder(logits, GumbelRace(logits, 64, generator, False), 0, generator)
    came = list(itertools.islice(order, count))
    left = logits.log_softmax(-1)[0].index_fill(0, torch.tensor(came), -torch.inf).logsumexp(-1)
    assert order.log_remaining() == pytest.approx(float(left), abs=1e-9)


@pytest.mark.parametrize("mass", [1.0, 0.5, 1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_sampled_weight_has_the_mean_z(mass, dtype):
    """Ten valid tokens of mass Z among 300; at small Z they come last, and the weight is still exact to the mean."""
    valid = torch.arange(300) % 30 == 7
    p = torch.where(valid, torch.linspace(1, 2, 300).double(), torch.linspace(2, 5, 300).double())
    p = torch.where(valid, mass * p / p[valid].sum(), (1 - mass) * p / p[~valid].sum())
    runs = 600
    accepts = valid.tolist()
    drawn = draw(
        p.log().to(dtype).expand(runs, -1),
        lambda row, token: accepts[token],
        generator=torch.Generator().manual_seed(3),
    )
    weights = drawn.log_weight.exp()
    assert drawn.log_weight.dtype == torch.float64 and (weights > 0).all()
    error = weights.std() / math.sqrt(runs)
    assert abs(weights.mean() - mass) <= 4 * error + 1e-6 * mass
    assert valid[drawn.token].all()
    counts = torch.bincount(drawn.token, minlength=300)[valid].double()
    expected = runs * p[valid] / mass
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # 9 degrees of freedom, 0.999


def test_one_valid_token_has_its_own_mass_as_weight():
    logits = torch.tensor([[0.0, -30.0, 2.0]], dtype=torch.float64)
    for seed in range(20):
        drawn = draw(logits, lambda row, token: token == 1, generator=torch.Generator().manual_seed(seed))
        assert drawn.token.item() == 1
        assert drawn.log_weight.item() == pytest.approx(float(logits.log_softmax(-1)[0, 1]), abs=1e-12)


def test_a_mask_takes_over_and_its_weight_is_z():
    logits = torch.randn(400, 100, dtype=torch.float64)[:1].expand(400, -1)
    allowed = [31, 32, 63, 99]
    log_mass = float(logits[0, allowed].logsumexp(-1) - logits[0].logsumexp(-1))

    for mask_after in (0, 3):
        drawn = draw(
            logits,
            lambda row, token: token in allowed,
            generator=torch.Generator().manual_seed(0),
            fill_masks=[lambda mask: bitmask.add(mask, allowed)] * 400,
            mask_after=mask_after,
        )
        masked = drawn.masked
        assert masked.any() and (drawn.checks[masked] == mask_after).all()
        torch.testing.assert_close(
            drawn.log_weight[masked], torch.full_like(drawn.log_weight[masked], log_mass), atol=1e-12, rtol=0
        )
        assert torch.isin(drawn.token, torch.tensor(allowed)).all()
        counts = torch.bincount(drawn.token, minlength=100)[allowed].double()
        expected = 400 * logits[0, allowed].softmax(-1)
        assert ((counts - expected) ** 2 / expected).sum() < 16.3  # 3 degrees of freedom, 0.999


def test_rows_have_their_own_patience_and_do_not_depend_on_each_other():
    logits = torch.randn(4, 300)
    fill = [lambda mask: bitmask.add(mask, range(7, 300, 60))] * 4
    patience = [0, 3, 0, 16]

    def drawn(rows):
        return draw(
            logits[rows],
            lambda row, token: token % 60 == 7,
            generator=[torch.Generator().manual_seed(row) for row in rows],
            fill_masks=[fill[row] for row in rows],
            mask_after=[patience[row] for row in rows],
        )

    together = drawn([0, 1, 2, 3])
    exact = logits[:, 7::60].double().logsumexp(-1) - logits.double().logsumexp(-1)
    for row in range(4):
        alone = drawn([row])
        assert (alone.token[0], alone.log_weight[0]) == (together.token[row], together.log_weight[row])
        assert together.token[row] % 60 == 7
        if patience[row] == 0:
            assert together.masked[row] and together.checks[row] == 0
            assert together.log_weight[row] == pytest.approx(float(exact[row]), abs=1e-5)


def test_checks_are_counted():
    """k + 1 checks, and extra_checks more, unless the support ends before."""
    logits = torch.randn(50, 200)
    for extra in (0, 3):
        calls = [[] for _ in range(50)]

        def is_valid(row, token, calls=calls):
            calls[row].append(token % 5 == 0)
            return calls[row][-1]

        drawn = draw(logits, is_valid, generator=torch.Generator().manual_seed(0), extra_checks=extra)
        assert drawn.checks.tolist() == [len(row) for row in calls]
        assert all(len(row) == row.index(True) + 2 + extra for row in calls)


def test_dead_ends_are_typed_and_no_refused_token_is_given():
    logits = torch.zeros(3, 100)
    logits[2] = -torch.inf
    generator = torch.Generator().manual_seed(0)

    def nothing(row, token):
        return False

    none = draw(logits, nothing, generator=generator)
    spent = draw(logits, nothing, generator=generator, max_checks=7)
    masked = draw(logits, nothing, generator=generator, fill_masks=[lambda mask: None] * 3)
    assert none.end == ("no_support",) * 3 and none.checks.tolist() == [100, 100, 0]
    assert spent.end == ("budget_spent", "budget_spent", "no_support") and spent.checks.tolist() == [7, 7, 0]
    assert masked.end == ("no_support",) * 3 and masked.checks.tolist() == [16, 16, 0]
    for drawn in (none, spent, masked):
        assert (drawn.token == -1).all() and (drawn.log_weight == -torch.inf).all()


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 150.0), (torch.float64, 2000.0)], ids=str)
def test_a_token_far_behind_the_likeliest_is_still_found(dtype, gap, greedy):
    logits = torch.zeros(1, 200, dtype=dtype)
    logits[0, 64:] = -gap
    generator = torch.Generator().manual_seed(0)
    drawn = draw(logits, lambda row, token: token == 199, generator=generator, greedy=greedy)
    assert drawn.end == ("accepted",) and drawn.token.item() == 199
    if not greedy:
        assert drawn.log_weight.item() == pytest.approx(-gap - math.log(64))


def test_without_a_check_the_law_is_the_softmax():
    logits = torch.randn(1, 6, dtype=torch.float64).expand(5000, -1)
    drawn = draw(logits, None, generator=torch.Generator().manual_seed(0))
    expected = 5000 * logits[0].softmax(-1)
    counts = torch.bincount(drawn.token, minlength=6)
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # 5 degrees of freedom, 0.999
    assert (drawn.log_weight == 0).all() and (drawn.checks == 0).all()


def test_greedy_takes_the_likeliest_valid_token():
    logits = torch.randn(4, 500)
    generator = torch.Generator().manual_seed(0)
    expected = logits[:, 7::50].argmax(-1) * 50 + 7
    for masks in (None, [lambda mask: bitmask.add(mask, range(7, 500, 50))] * 4):
        drawn = draw(
            logits, lambda row, token: token % 50 == 7, generator=generator, greedy=True, fill_masks=masks, mask_after=2
        )
        assert torch.equal(drawn.token, expected) and drawn.log_weight.isnan().all()
    assert torch.equal(draw(logits, None, generator=generator, greedy=True).token, logits.argmax(-1))


def test_rows_with_their_own_generators_do_not_depend_on_each_other():
    logits = torch.randn(5, 3000)

    def drawn(rows):
        return draw(
            logits[rows],
            lambda row, token: token % 97 == 0,
            generator=[torch.Generator().manual_seed(row) for row in rows],
        )

    together = drawn(list(range(5)))
    for row in range(5):
        alone = drawn([row])
        assert alone.token[0] == together.token[row] and alone.log_weight[0] == together.log_weight[row]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits_are_taken_as_they_are(dtype):
    logits = torch.randn(3, 500).to(dtype)

    def is_valid(row, token):
        return token % 7 == 3

    halves = draw(logits, is_valid, generator=torch.Generator().manual_seed(0))
    floats = draw(logits.float(), is_valid, generator=torch.Generator().manual_seed(0))
    assert torch.equal(halves.token, floats.token) and torch.equal(halves.log_weight, floats.log_weight)


def test_sample_never_gives_a_token_without_mass():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    edge = torch.tensor([[0.0, 2.0**-54, 0.5, 1 - 2.0**-53]], dtype=torch.float64)
    assert sample(logits, edge)[0].tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits must be floats \[R, V\]"),
        ({"logits": torch.zeros(1, 3, dtype=torch.int64)}, "logits must be floats"),
        ({"logits": torch.tensor([[0.0], [torch.nan]])}, "row 1 holds NaN"),
        ({"logits": torch.tensor([[0.0, torch.inf]])}, "row 0 holds NaN or"),
        ({"max_checks": 0}, "max_checks must be 1 or more, or None, got 0"),
        ({"extra_checks": -1}, "extra_checks must be 0 or more, got -1"),
        ({"mask_after": -1}, "mask_after must be 0 or more, got -1"),
        ({"mask_after": [3, -1]}, "mask_after must be 0 or more, got -1"),
        ({"mask_after": [3]}, "mask_after must be one, or one per row: got 1 for 2 rows"),
        ({"fill_masks": []}, "fill_masks must be one per row, got 0 for 2 rows"),
        ({"generator": [torch.Generator()]}, "got 1 for 2 rows"),
    ],
)
def test_bad_input(change, message):
    arguments = {"logits": torch.zeros(2, 5), "is_valid": lambda row, token: True, "generator": torch.Generator()}
    with pytest.raises(ValueError, match=message):
        draw(**(arguments | change))
