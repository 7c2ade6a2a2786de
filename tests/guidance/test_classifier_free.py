"""Classifier-free guidance, intervals, cutoff and two scales: identities, and evaluations counted by the denoiser
itself.
"""

import math
from dataclasses import replace

import pytest
import torch
from mixture import KINDS, SCHEDULES, Counting, mixture, start, step_at

from hasten.guidance.diffusion.classifier_free import ClassifierFreeGuidance, Cutoff, TwoScaleGuidance
from hasten.guidance.diffusion.guide import Guide
from hasten.guidance.diffusion.intervals import SigmaInterval, StepInterval, StepSet, Within
from hasten.guidance.diffusion.parameterization import convert
from hasten.guidance.diffusion.sampling import sample
from hasten.guidance.diffusion.schedules import flow

N, B = 12, 4


class Alone(Guide):
    """The prediction of one pass and nothing else."""

    def __init__(self, name):
        self.name = name

    def passes(self, step):
        return ("conditional", self.name) if self.name != "conditional" else ("conditional",)

    def __call__(self, step):
        return getattr(step, self.name)


def run(guide, name="vp", kind="epsilon", steps=N):
    schedule, predict = SCHEDULES[name](steps), Counting(mixture().denoiser(kind))
    result = sample(guide, predict, schedule, start(schedule, B), kind)
    assert (result.evaluations, sum(result.calls)) == (predict.rows, predict.calls)
    return result


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_scale_one_is_the_conditional_model_bit_for_bit_and_half_the_cost(name, kind):
    guided = run(ClassifierFreeGuidance(1.0, rescale=0.7), name, kind)
    assert torch.equal(guided.sample, run(Alone("conditional"), name, kind).sample)
    assert guided.rows == (B,) * N and guided.calls == (1,) * N


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_scale_zero_is_the_unconditional_model(name, kind):
    assert torch.equal(
        run(ClassifierFreeGuidance(0.0), name, kind).sample, run(Alone("unconditional"), name, kind).sample
    )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "guide",
    [
        ClassifierFreeGuidance(6.0),
        ClassifierFreeGuidance(6.0, interval=SigmaInterval(0.2, 5.0)),
        TwoScaleGuidance(1.6, 5.0),
    ],
    ids=["cfg", "interval", "two scales"],
)
def test_affine_guides_are_the_same_in_every_parameterization(name, guide):
    runs = [run(guide, name, kind).sample for of, kind in KINDS if of == name]
    assert not torch.allclose(runs[0], run(Alone("conditional"), name).sample, atol=1e-2)
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=0, atol=1e-12)


def test_rescale_depends_on_the_parameterization():
    """It is measured on the model's own predictions: this is not to be mistaken for an invariant."""
    guide = ClassifierFreeGuidance(6.0, rescale=0.7)
    assert not torch.allclose(run(guide, "vp", "epsilon").sample, run(guide, "vp", "v").sample, atol=1e-3)


def test_rescale():
    step = step_at(SCHEDULES["vp"](N), 6, "epsilon")
    plain, full = ClassifierFreeGuidance(6.0)(step), ClassifierFreeGuidance(6.0, rescale=1.0)(step)
    torch.testing.assert_close(full.std(dim=1), step.conditional.std(dim=1), rtol=1e-14, atol=0)
    mixed = ClassifierFreeGuidance(6.0, rescale=0.3)(step)
    torch.testing.assert_close(mixed, 0.3 * full + 0.7 * plain, rtol=1e-14, atol=1e-15)
    assert torch.equal(ClassifierFreeGuidance(6.0, rescale=0.0)(step), plain)
    half = replace(step, **{name: getattr(step, name).half() for name in ("conditional", "unconditional")})
    assert ClassifierFreeGuidance(6.0, rescale=0.3)(half).dtype == torch.float16
    flat = replace(step, unconditional=torch.zeros_like(plain), conditional=torch.ones_like(plain))
    assert torch.equal(ClassifierFreeGuidance(6.0, rescale=0.0)(flat), 6 * flat.conditional)  # which has no deviation


def test_the_scale_is_that_of_imagen():
    """One more than Ho and Salimans', conditional + w * (conditional - unconditional)."""
    step = step_at(SCHEDULES["vp"](N), 6, "epsilon")
    c, u = step.conditional, step.unconditional
    torch.testing.assert_close(ClassifierFreeGuidance(5.0)(step), (1 + 4.0) * c - 4.0 * u, rtol=1e-14, atol=1e-14)


def test_an_interval_in_fractions_follows_the_rule_of_diffusers():
    result = run(ClassifierFreeGuidance(5.0, interval=StepInterval(0.2, 0.6)), steps=10)
    assert result.calls == (1, 1, 2, 2, 2, 2, 1, 1, 1, 1)
    assert [result.trace[i]["scale"] for i in (1, 2)] == [1.0, 5.0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_interval_in_sigma_means_the_same_on_every_schedule(name):
    schedule = SCHEDULES[name](N)
    levels = [sigma / alpha for alpha, sigma in zip(schedule.alphas[:N], schedule.sigmas[:N], strict=True)]
    interval = SigmaInterval(levels[8], levels[3])  # open below, closed above
    assert run(ClassifierFreeGuidance(5.0, interval=interval), name).calls == (1,) * 3 + (2,) * 5 + (1,) * 4


def test_pure_noise_is_infinitely_noisy():
    first = flow(4).step(0, torch.zeros(1, 2), "flow", {})
    assert first in SigmaInterval(0.1) and first not in SigmaInterval(0.1, 1e9)


def test_cutoff_counts_and_is_the_interval_that_starts_at_once():
    cut = run(Cutoff(5.0, steps=5))
    assert cut.evaluations == B * (2 * 5 + (N - 5)) and cut.calls == (2,) * 5 + (1,) * 7
    assert torch.equal(cut.sample, run(ClassifierFreeGuidance(5.0, interval=StepSet(range(5)))).sample)
    assert torch.equal(run(Cutoff(5.0, steps=N)).sample, run(ClassifierFreeGuidance(5.0)).sample)


def test_within_is_the_guide_inside_and_the_conditional_prediction_outside():
    inside = Within(ClassifierFreeGuidance(5.0), StepSet([2, 3, 7]))
    same = run(ClassifierFreeGuidance(5.0, interval=StepSet([2, 3, 7])))
    assert torch.equal(run(inside).sample, same.sample) and run(inside).calls == same.calls


@pytest.mark.parametrize(
    ("scales", "passes"),
    [
        ((1.0, 1.0), ("conditional",)),
        ((4.0, 4.0), ("conditional", "unconditional")),
        ((1.0, 4.0), ("conditional", "image")),
        ((1.5, 4.0), ("conditional", "unconditional", "image")),
    ],
)
def test_two_scales_telescope_and_ask_only_for_what_is_left(scales, passes):
    guide, step = TwoScaleGuidance(*scales), step_at(SCHEDULES["vp"](N), 6, "epsilon")
    c, u, i = step.conditional, step.unconditional, step.image
    assert guide.passes(step) == passes
    given = {
        name: getattr(step, name) if name in passes else None for name in ("conditional", "unconditional", "image")
    }
    without = SCHEDULES["vp"](N).step(6, step.sample, "epsilon", {})
    expected = u + scales[0] * (i - u) + scales[1] * (c - i)
    torch.testing.assert_close(guide(without.with_predictions(**given)), expected, rtol=0, atol=1e-14)


def test_guided_x0_is_the_affine_combination_of_x0s():
    schedule = SCHEDULES["flow"](N)
    step = step_at(schedule, 4, "flow")
    into = [
        convert(p, step.sample, step.alpha, step.sigma, "flow", "sample")
        for p in (step.conditional, step.unconditional)
    ]
    guided = convert(ClassifierFreeGuidance(3.0)(step), step.sample, step.alpha, step.sigma, "flow", "sample")
    torch.testing.assert_close(guided, into[1] + 3.0 * (into[0] - into[1]), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassifierFreeGuidance(math.nan), "scale must be a finite number, got nan"),
        (lambda: ClassifierFreeGuidance("7"), "scale must be a finite number, got '7'"),
        (lambda: ClassifierFreeGuidance(7.0, rescale=1.5), r"rescale must be a finite number in \[0, 1\], got 1.5"),
        (
            lambda: ClassifierFreeGuidance(7.0, interval=(0.2, 0.6)),
            "interval must be a SigmaInterval, StepInterval or StepSet",
        ),
        (lambda: SigmaInterval(3.0, 1.0), "expected 0 <= low < high"),
        (lambda: StepInterval(0.5, 0.2), "start must not be above stop"),
        (lambda: StepInterval(0.5, 20), r"stop must be a finite number in \[0, 1\], got 20"),
        (lambda: SigmaInterval("a"), "low must be a finite number"),
        (lambda: SigmaInterval(1.0, None), "high .or math.inf. must be a finite number"),
        (lambda: StepSet(["a", 1]), "indices must be integers of at least 0"),
        (lambda: StepSet([-1]), "indices must be integers of at least 0"),
        (lambda: Cutoff(5.0, steps=-1), "steps must be an integer of at least 0, got -1"),
        (lambda: Cutoff(5.0, steps=0.4), "steps must be an integer of at least 0, got 0.4"),
        (lambda: Within(ClassifierFreeGuidance(2.0), 0.5), "expected a guide and an interval"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
