"""Feynman-Kac correctors: sampled moments and normalisers against closed forms that plain guidance misses, and the
resampling by itself.
"""

import functools
import math

import pytest
import torch

from hasten.guidance.diffusion.feynman_kac import (
    FeynmanKacCorrector,
    guidance_increment,
    log_weight_increment,
    sample_exploding,
)
from hasten.guidance.smc import effective_sample_size, log_mean_weight, systematic

# Of each case: (mean, variance) of the Gaussians q_i, and their exponents.
CASES = {
    "guidance": ([(0.0, 9.0), (4.0, 1.0)], [-1.0, 2.0]),
    "annealing": ([(1.0, 2.0)], [2.0]),
    "product": ([(0.0, 9.0), (4.0, 1.0)], [1.0, 1.0]),
}
GROUPS, PARTICLES, SIGMA_MAX = 24, 4000, 3.0


def tilted(case, alpha, sigma):
    """Mean, variance and log normaliser of prod_i N(alpha mean_i, alpha^2 variance_i + sigma^2)^exponent_i."""
    terms = [
        (b, alpha * mean, alpha**2 * variance + sigma**2) for (mean, variance), b in zip(*CASES[case], strict=True)
    ]
    precision = sum(b / v for b, _, v in terms)
    mean = sum(b * m / v for b, m, v in terms) / precision
    log_z = sum(-0.5 * b * (math.log(2 * math.pi * v) + m * m / v) for b, m, v in terms)
    return mean, 1 / precision, log_z + 0.5 * math.log(2 * math.pi / precision) + 0.5 * mean**2 * precision


def score(gaussian):
    mean, variance = gaussian
    return lambda x, sigma: (mean - x) / (variance + sigma**2)


@functools.cache
def run(case, steps, corrector):
    """Samples and log weights [GROUPS, PARTICLES], from the exact density at SIGMA_MAX."""
    gaussians, exponents = CASES[case]
    generator = torch.Generator().manual_seed(steps)
    mean, variance, _ = tilted(case, 1.0, SIGMA_MAX)
    x = mean + math.sqrt(variance) * torch.randn(GROUPS * PARTICLES, 1, dtype=torch.float64, generator=generator)
    sigmas = [SIGMA_MAX * (1 - i / steps) ** 2 for i in range(steps + 1)]
    scores = [score(gaussian) for gaussian in gaussians]
    x, log_weights = sample_exploding(scores, exponents, sigmas, x, corrector, GROUPS, generator)
    return x.reshape(GROUPS, PARTICLES), log_weights


def measured(case, steps, corrector, weighted):
    """Per group: mean, variance, and the ratio of the estimated normaliser to the exact one, [3, GROUPS]."""
    x, log_weights = run(case, steps, corrector)
    weights = log_weights.softmax(dim=1) if weighted else torch.full_like(x, 1 / PARTICLES)
    mean = (weights * x).sum(dim=1)
    variance = (weights * x.square()).sum(dim=1) - mean**2
    log_ratio = tilted(case, 1.0, 0.0)[2] - tilted(case, 1.0, SIGMA_MAX)[2]
    return torch.stack([mean, variance, (log_mean_weight(log_weights) - log_ratio).exp()])


def errors(case, corrector, weighted=True):
    """Of mean, variance and normaliser in standard errors (those over the groups), [3]; two step sizes are extrapolated
    to none.
    """
    extrapolated = 2 * measured(case, 80, corrector, weighted) - measured(case, 40, corrector, weighted)
    exact = torch.tensor([*tilted(case, 1.0, 0.0)[:2], 1.0], dtype=torch.float64)
    return (extrapolated.mean(dim=1) - exact) / (extrapolated.std(dim=1) / math.sqrt(GROUPS))


WEIGHTS, RESAMPLED = FeynmanKacCorrector(threshold=0.0), FeynmanKacCorrector(threshold=0.5)


@pytest.mark.parametrize("corrector", [WEIGHTS, RESAMPLED], ids=["weights", "resampled"])
@pytest.mark.parametrize("case", CASES)
def test_samples_follow_the_tilted_density(case, corrector):
    off = errors(case, corrector)
    assert (off.abs() < 4).all(), off


def test_the_closed_form_is_that_of_a_known_case():
    """Guidance with scale 2 from N(0, 9) to N(4, 1), computed by hand: precision 2 - 1 / 9."""
    mean, variance, _ = tilted("guidance", 1.0, 0.0)
    assert (mean, variance) == (pytest.approx(8 / (17 / 9)), pytest.approx(9 / 17))


def test_plain_guidance_misses_mean_and_variance():
    off = errors("guidance", WEIGHTS, weighted=False)
    assert (off[:2].abs() > 10).all(), off


@pytest.mark.parametrize("case", ["annealing", "product"])
def test_without_weights_the_variance_is_missed(case):
    off = errors(case, WEIGHTS, weighted=False)
    assert off[1].abs() > 10, off


def test_clamped_increments_miss_it_and_their_fraction_is_reported():
    off = errors("guidance", FeynmanKacCorrector(threshold=0.5, clamp=0.02))
    assert off[0].abs() > 4 and off[2].abs() > 10, off
    increment = torch.tensor([-3.0, 0.0, 0.5, 2.5, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    updated = FeynmanKacCorrector(threshold=0.0, clamp=1.0).update(torch.zeros(2, 4).double(), increment, 1.0)
    assert updated.clipped.tolist() == [0.5, 0.0]
    assert updated.log_weights.tolist() == [[-1.0, 0.0, 0.5, 1.0], [1.0] * 4]


def test_equal_variances_weigh_all_particles_alike():
    x = torch.randn(100, 3, dtype=torch.float64)
    conditional, unconditional = score((4.0, 2.0))(x, 1.5), score((-1.0, 2.0))(x, 1.5)
    for increment in (
        guidance_increment(conditional, unconditional, 3.0, 0.2),
        log_weight_increment([unconditional, conditional], [-2.0, 3.0], 0.2),
    ):
        assert increment.std() < 1e-13
        assert increment.mean().item() == pytest.approx(0.5 * 0.2 * 3 * 2 * 3 * (5 / (2 + 1.5**2)) ** 2)


def test_every_increment_is_a_case_of_the_general_one():
    a, b, c = torch.randn(3, 10, 2, 4, dtype=torch.float64)
    square, dot = (lambda s: s.square().sum(dim=(1, 2))), (lambda s, t: (s * t).sum(dim=(1, 2)))
    close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(log_weight_increment([b, a], [1 - 2.5, 2.5], 0.3), guidance_increment(a, b, 2.5, 0.3))
    close(log_weight_increment([a], [1.7], 0.3, -0.2), 0.5 * 0.3 * 1.7 * 0.7 * square(a) - 0.7 * 0.2)
    pairs = dot(a, b) + dot(a, c) + dot(b, c)
    close(log_weight_increment([a, b, c], [1.0, 1.0, 1.0], 0.3, -0.2), 0.3 * pairs - 2 * 0.2)
    close(log_weight_increment([a], [1.0], 0.3, -0.2), torch.zeros(10, dtype=torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_the_mean_increment_is_the_change_of_the_normaliser_with_a_drift_too(case):
    """Variance preserving, dx = -x / 2 dt + dW with alpha = e^(-t / 2): d log Z / d tau is the increment's mean over
    the tilted density, by quadrature.
    """
    level = lambda t: (math.exp(-t / 2), math.sqrt(1 - math.exp(-t)))  # noqa: E731
    t, h = 0.8, 1e-4
    mean, variance, _ = tilted(case, *level(t))
    x = torch.linspace(mean - 12 * math.sqrt(variance), mean + 12 * math.sqrt(variance), 4001, dtype=torch.float64)
    density = torch.exp(-((x - mean) ** 2) / (2 * variance))
    alpha, sigma = level(t)
    scores = [((alpha * m - x) / (alpha**2 * v + sigma**2))[:, None] for m, v in CASES[case][0]]
    rate = log_weight_increment(scores, CASES[case][1], variance=1.0, divergence=-0.5)
    expected = (tilted(case, *level(t - h))[2] - tilted(case, *level(t + h))[2]) / (2 * h)
    assert float((density * rate).sum() / density.sum()) == pytest.approx(expected, abs=1e-7)


def uniforms(rows):
    return torch.rand(rows, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_systematic_resampling_draws_each_within_one_of_its_share_and_that_on_average():
    weights = torch.tensor([0.05, 0.4, 0.0, 0.125, 0.3, 0.125], dtype=torch.float64)
    draws = 20000
    indices = systematic(weights.log().expand(draws, 6), uniforms(draws))
    counts = torch.nn.functional.one_hot(indices, 6).sum(dim=1).double()
    share = 6 * weights
    assert (counts >= share.floor()).all() and (counts <= share.ceil()).all()
    standard_error = (counts.var(dim=0) / draws).sqrt()
    assert ((counts.mean(dim=0) - share).abs() <= 4 * standard_error).all()
    assert (indices[:, 1:] >= indices[:, :-1]).all()
    equal = systematic(torch.zeros(5, 7), uniforms(5))
    assert equal.tolist() == [list(range(7))] * 5


def test_effective_sample_size():
    weights = torch.tensor([[0.0] * 4, [0.0, -math.inf, -math.inf, -math.inf], [0.0, 0.0, -math.inf, -math.inf]])
    torch.testing.assert_close(effective_sample_size(weights), torch.tensor([4.0, 1.0, 2.0]))


def test_only_a_group_in_need_is_resampled_and_everything_follows_its_indices():
    log_weights = torch.tensor([[0.0, 0.1, 0.0, -0.1], [5.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    corrector = FeynmanKacCorrector(threshold=0.5, window=(0.1, 10.0))
    nothing = torch.zeros(8, dtype=torch.float64)
    updated = corrector.update(log_weights, nothing, level=1.0, generator=torch.Generator().manual_seed(0))
    assert updated.resampled.tolist() == [False, True]
    assert updated.indices.tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert torch.equal(updated.log_weights[0], log_weights[0])
    torch.testing.assert_close(log_mean_weight(updated.log_weights), log_mean_weight(log_weights), rtol=1e-14, atol=0)
    assert updated.log_weights[1].unique().numel() == 1
    assert updated.clipped.tolist() == [0.0, 0.0]
    for level in (0.05, 11.0):
        outside = corrector.update(log_weights, nothing, level)
        assert not outside.resampled.any() and outside.indices.tolist() == list(range(8))
        assert torch.equal(outside.log_weights, log_weights)


def test_bad_input_is_refused():
    x, broken = torch.zeros(6, 1), lambda x, sigma: torch.full_like(x, math.nan if sigma == 2.0 else 0.0)
    with pytest.raises(ValueError, match=r"threshold must be a finite number in \[0, 1\], got 2"):
        FeynmanKacCorrector(threshold=2)
    with pytest.raises(ValueError, match="clamp must be a finite number"):
        FeynmanKacCorrector(clamp=-1.0)
    with pytest.raises(ValueError, match=r"window must be \(low, high\)"):
        FeynmanKacCorrector(window=(2.0, 1.0))
    for window in (("a", 1.0), 3, (0.0, math.nan), (1.0,)):
        with pytest.raises(ValueError, match=r"window must be \(low, high\)"):
            FeynmanKacCorrector(window=window)
    with pytest.raises(ValueError, match="one exponent for each score, got 1 scores and 2 exponents"):
        sample_exploding([broken], [1.0, 2.0], [3.0, 2.0], x, RESAMPLED)
    with pytest.raises(ValueError, match="groups must be an integer of at least 1, got 0"):
        sample_exploding([broken], [1.0], [3.0, 2.0], x, RESAMPLED, groups=0)
    with pytest.raises(ValueError, match="one exponent for each score, got 1 scores and 2 exponents"):
        log_weight_increment([x], [1.0, 2.0], 0.1)
    with pytest.raises(ValueError, match="6 particles do not divide into 4 groups"):
        sample_exploding([broken], [2.0], [3.0, 2.0], x, RESAMPLED, groups=4)
    with pytest.raises(ValueError, match="sigmas must fall"):
        sample_exploding([broken], [2.0], [2.0, 3.0], x, RESAMPLED)
    with pytest.raises(ValueError, match="NaN or infinite prediction at step 1 of 2"):
        sample_exploding([broken], [2.0], [3.0, 2.0, 1.0], x, RESAMPLED)
