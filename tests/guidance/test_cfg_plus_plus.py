"""CFG++: its samplers against their published forms, the guide against its samplers, and that the wrong form for flows
is rejected.
"""

import itertools
import math

import pytest
import torch
from mixture import KINDS, SCHEDULES, Counting, mixture, start, step_at

from hasten.guidance.diffusion.cfg_plus_plus import CFGPlusPlus
from hasten.guidance.diffusion.cfg_plus_plus_samplers import ancestral, ddim, dpmpp_2m, invert
from hasten.guidance.diffusion.classifier_free import ClassifierFreeGuidance
from hasten.guidance.diffusion.intervals import StepInterval, Within
from hasten.guidance.diffusion.sampling import sample
from hasten.guidance.diffusion.schedules import Schedule, flow

N, STRENGTH = 20, 0.6


def pairs(schedule):
    """Of each step: alpha, sigma, next_alpha, next_sigma."""
    return list(zip(schedule.alphas[:-1], schedule.sigmas[:-1], schedule.alphas[1:], schedule.sigmas[1:], strict=True))


def ddim_in_noise(model, schedule, x, strength):
    """The published DDIM: x0 from the guided noise, the unconditional noise put back."""
    for alpha, sigma, next_alpha, next_sigma in pairs(schedule):
        c, u = (model.predict(x, alpha, sigma, name, "epsilon") for name in ("conditional", "unconditional"))
        x = next_alpha * (x - sigma * (u + strength * (c - u))) / alpha + next_sigma * u
    return x


def euler(model, schedule, x, strength):
    """The published Euler, alpha = 1: x' = guided + s' (x - unconditional) / s."""
    for _, s, _, next_s in pairs(schedule):
        c, u = model.both(x, 1.0, s)
        x = u + strength * (c - u) + next_s * (x - u) / s
    return x


def euler_on_flow(model, schedule, x, strength, guided_share=lambda next_sigma: 1 - next_sigma):
    """With velocities: x' = x - share * sigma * u_guided + ... ; the form of variance-exploding samplers
    has share 1.
    """
    for _, sigma, _, next_sigma in pairs(schedule):
        c, u = (model.predict(x, 1 - sigma, sigma, name, "flow") for name in ("conditional", "unconditional"))
        share = guided_share(next_sigma)
        unguided_part = next_sigma * (1 - sigma) if share != 1 else next_sigma
        x = x - share * sigma * (u + strength * (c - u)) + unguided_part * u
    return x


def run(guide, name, kind):
    schedule = SCHEDULES[name](N)
    return sample(guide, mixture().denoiser(kind), schedule, start(schedule), kind).sample


@pytest.mark.parametrize(
    ("name", "published"),
    [("vp", ddim_in_noise), ("ve", euler), ("flow", euler_on_flow)],
    ids=["ddim", "euler", "flow"],
)
@pytest.mark.parametrize("strength", [0.0, STRENGTH, 1.0])
def test_one_sampler_is_the_published_form_on_each_schedule(name, published, strength):
    schedule = SCHEDULES[name](N)
    expected = published(mixture(), schedule, start(schedule), strength)
    torch.testing.assert_close(ddim(mixture().both, schedule, start(schedule), strength), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_guide_in_a_plain_sampler_is_cfg_plus_plus(name, kind):
    schedule = SCHEDULES[name](N)
    expected = ddim(mixture().both, schedule, start(schedule), STRENGTH)
    assert not torch.allclose(expected, run(ClassifierFreeGuidance(1.0), name, kind), atol=1e-2)
    torch.testing.assert_close(run(CFGPlusPlus(STRENGTH), name, kind), expected, rtol=0, atol=1e-12)


def test_the_form_of_variance_exploding_samplers_is_rejected_on_a_flow():
    schedule = SCHEDULES["flow"](N)
    wrong = euler_on_flow(mixture(), schedule, start(schedule), STRENGTH, guided_share=lambda next_sigma: 1.0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run(CFGPlusPlus(STRENGTH), "flow", "flow"), wrong, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_strength_zero_is_the_unconditional_sampler(name):
    schedule, model = SCHEDULES[name](N), mixture()
    plain = run(ClassifierFreeGuidance(0.0), name, "sample")
    torch.testing.assert_close(run(CFGPlusPlus(0.0), name, "sample"), plain, rtol=0, atol=0)
    torch.testing.assert_close(ddim(model.both, schedule, start(schedule), 0.0), plain, rtol=0, atol=1e-12)
    alone = lambda x, alpha, sigma: (model.both(x, alpha, sigma)[1],) * 2  # noqa: E731
    for sampler in (ddim, dpmpp_2m):
        unguided = sampler(alone, schedule, start(schedule), 0.7)
        assert torch.equal(sampler(model.both, schedule, start(schedule), 0.0), unguided)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_with_the_same_noise(name, eta):
    """The guide's scales inside an ancestral sampler that knows nothing of CFG++ give its ancestral sampler."""
    schedule, model = SCHEDULES[name](N), mixture()
    guide, x = CFGPlusPlus(STRENGTH, eta=eta), start(schedule)
    expected = ancestral(model.both, schedule, x, STRENGTH, eta, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    for i, (alpha, sigma, next_alpha, next_sigma) in enumerate(pairs(schedule)):
        c, u = model.both(x, alpha, sigma)
        x0 = guide(schedule.step(i, x, "sample", {}).with_predictions(c, u))
        s, next_s = sigma / alpha, next_sigma / next_alpha
        up = eta * math.sqrt(next_s**2 * (s**2 - next_s**2) / s**2)
        y = x0 + math.sqrt(next_s**2 - up**2) * (x / alpha - x0) / s
        if next_sigma:
            y = y + up * torch.randn(x.shape, dtype=x.dtype, generator=generator)
        x = next_alpha * y
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["vp", "flow"])
def test_only_sigma_over_alpha_matters(name):
    """Scaling a level's alpha and sigma (and x with them) is another way to write the same process."""
    schedule, model = SCHEDULES[name](N), mixture()
    factors = torch.linspace(0.5, 2.0, N + 1, dtype=torch.float64).tolist()
    scaled = Schedule(
        [a * f for a, f in zip(schedule.alphas, factors, strict=True)],
        [s * f for s, f in zip(schedule.sigmas, factors, strict=True)],
    )
    for sampler in (ddim, dpmpp_2m):
        plain = sampler(model.both, schedule, start(schedule), STRENGTH)
        again = sampler(model.both, scaled, factors[0] * start(schedule), STRENGTH)
        torch.testing.assert_close(again / factors[-1], plain, rtol=0, atol=1e-11)


def order(errors):
    """Of convergence, from errors at doubled numbers of steps."""
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


def log_uniform(count):
    sigmas = torch.logspace(1, -1, count + 1, dtype=torch.float64).tolist()
    return Schedule([1.0] * (count + 1), sigmas)


def uneven(count):
    """Every second step twice as long in log sigma as the one before it."""
    places = [i - (i % 2) / 3 for i in range(count + 1)]
    return Schedule([1.0] * (count + 1), [10 ** (1 - 2 * place / count) for place in places])


@pytest.mark.parametrize("grid", [log_uniform, uneven])
@pytest.mark.parametrize(("sampler", "expected"), [(ddim, 1), (dpmpp_2m, 2)], ids=["euler", "2m"])
def test_order_of_convergence_without_a_difference_to_guide(sampler, expected, grid):
    model = mixture()
    alone = lambda x, alpha, sigma: (model.posterior(x, alpha, sigma, "unconditional")[0],) * 2  # noqa: E731
    x = start(log_uniform(1))
    exact = dpmpp_2m(alone, log_uniform(4096), x, 0.5)
    errors = [float((sampler(alone, grid(count), x, 0.5) - exact).norm()) for count in (128, 256, 512)]
    assert all(abs(measured - expected) < 0.25 for measured in order(errors)), order(errors)


def test_2m_keeps_guided_and_unconditional_predictions_apart():
    """Where no prediction ever changes, a difference of predictions of one kind vanishes, and 2M is Euler; one of mixed
    kinds does not.
    """
    c, u = torch.randn(2, 4, 6, dtype=torch.float64)
    schedule = log_uniform(N)  # which ends before sigma = 0, where every sampler returns the guided prediction
    constant = lambda x, alpha, sigma: (c, u)  # noqa: E731
    expected = ddim(constant, schedule, start(schedule), STRENGTH)
    torch.testing.assert_close(dpmpp_2m(constant, schedule, start(schedule), STRENGTH), expected, rtol=0, atol=1e-12)


def test_inversion():
    model = mixture()
    x = model.means + 0.1
    alone = lambda x, alpha, sigma: (model.posterior(x, alpha, sigma, "unconditional")[0],) * 2  # noqa: E731
    plain = x
    for alpha, sigma, before_alpha, before_sigma in [(*p[2:], *p[:2]) for p in reversed(pairs(log_uniform(50)))]:
        x0, noise = model.posterior(plain, alpha, sigma, "unconditional")
        plain = before_alpha * x0 + before_sigma * noise
    torch.testing.assert_close(invert(alone, log_uniform(50), x, 0.9), plain, rtol=0, atol=1e-12)

    errors = []
    for count in (256, 512, 1024):
        back = ddim(alone, log_uniform(count), invert(alone, log_uniform(count), x, 0.4), 0.4)
        errors.append(float((back - x).norm()))
    assert all(abs(measured - 1) < 0.25 for measured in order(errors)), errors
    with pytest.raises(ValueError, match="sigma must be above 0: drop the last level"):
        invert(alone, flow(4), x, 0.4)


def test_inversion_swaps_the_roles():
    """One step by hand, where both predictions differ: x0 unconditional, noise guided, at the cleaner side."""
    model, x, schedule = mixture(), 0.3 * torch.randn(4, 6, dtype=torch.float64), Schedule((0.6, 0.9), (0.8, 0.4))
    c, u = (model.predict(x, 0.9, 0.4, name, "epsilon") for name in ("conditional", "unconditional"))
    expected = 0.6 * (x - 0.4 * u) / 0.9 + 0.8 * (u + STRENGTH * (c - u))
    torch.testing.assert_close(invert(model.both, schedule, x, STRENGTH), expected, rtol=0, atol=1e-13)


def scales(guide, schedule):
    return [guide.scale(schedule.step(i, torch.zeros(1, 1), "sample", {})) for i in range(len(schedule))]


def test_reference_steps_give_the_scale_a_limit():
    published = [scales(CFGPlusPlus(0.6), flow(count))[count // 2] for count in (50, 100, 200)]
    assert published[1] / published[0] > 1.9 and published[2] / published[1] > 1.9
    meant = [scales(CFGPlusPlus(0.6, reference_steps=50), flow(count))[count // 2] for count in (50, 100, 200, 400)]
    assert meant[0] == published[0]
    assert meant == pytest.approx([meant[0]] * 4, rel=0.03)
    assert scales(CFGPlusPlus(0.6, reference_steps=50), flow(400))[-1] == 0.6


def test_pure_noise_has_a_finite_scale():
    """On a flow the scale is strength * sigma * (1 - sigma') / (sigma - sigma'), also where alpha is 0."""
    schedule = flow(10)
    by_hand = [0.6 * s * (1 - t) / (s - t) for s, t in zip(schedule.sigmas[:-1], schedule.sigmas[1:], strict=True)]
    assert scales(CFGPlusPlus(0.6), schedule) == pytest.approx(by_hand, rel=1e-12)
    assert all(math.isfinite(scale) for scale in scales(CFGPlusPlus(0.6, eta=1.0), schedule))


def test_the_last_step_at_strength_one_needs_no_unconditional_pass():
    schedule, predict = SCHEDULES["vp"](N), Counting(mixture().denoiser("epsilon"))
    result = sample(CFGPlusPlus(1.0), predict, schedule, start(schedule, batch=3), "epsilon")
    assert predict.rows == result.evaluations == 3 * (2 * N - 1) and predict.calls == 2 * N - 1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"strength must be a finite number in \[0, 1\], got 7.5"):
        CFGPlusPlus(7.5)
    with pytest.raises(ValueError, match=r"strength must be a finite number in \[0, 1\], got -0.1"):
        dpmpp_2m(mixture().both, flow(3), torch.zeros(1, 6), -0.1)
    with pytest.raises(ValueError, match="reference_steps must be an integer of at least 1"):
        CFGPlusPlus(0.5, reference_steps=0)
    schedule = SCHEDULES["vp"](N)
    for guide in (CFGPlusPlus(eta=1.0), Within(CFGPlusPlus(eta=1.0), StepInterval())):
        with pytest.raises(ValueError, match=r"another sampler than DDIM: here it must be CFGPlusPlus\(eta=0\)"):
            sample(guide, mixture().denoiser("epsilon"), schedule, start(schedule), "epsilon")
    step = step_at(schedule, 3, "epsilon")
    still = type(step)(**{**step.__dict__, "next_alpha": step.alpha, "next_sigma": step.sigma})
    with pytest.raises(ValueError, match="step 3: CFG\\+\\+ needs sigma / alpha to fall"):
        CFGPlusPlus()(still)
