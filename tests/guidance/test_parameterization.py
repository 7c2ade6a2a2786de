"""Conversions against the mixture's closed form; schedules; what is refused."""

import pytest
import torch
from mixture import ALPHAS_CUMPROD, KINDS, SCHEDULES, mixture, start, step_at

from hasten.guidance.diffusion.guide import Step
from hasten.guidance.diffusion.parameterization import convert, denoised, from_denoised, noise, to_denoised
from hasten.guidance.diffusion.schedules import Schedule, flow, variance_exploding, variance_preserving


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("index", [0, 5, 11])
def test_every_type_converts_into_every_other(name, index):
    schedule, model = SCHEDULES[name](12), mixture()
    alpha, sigma, x = schedule.alphas[index], schedule.sigmas[index], start(schedule)
    kinds = [kind for of, kind in KINDS if of == name]
    exact = {kind: model.predict(x, alpha, sigma, "conditional", kind) for kind in kinds}
    for source in kinds:
        for target in kinds:
            converted = convert(exact[source], x, alpha, sigma, source, target)
            amplified = max(sigma / alpha, alpha / sigma, 1)  # x0 from noise and noise from x0 divide by the small one
            torch.testing.assert_close(
                converted, exact[target], rtol=0, atol=1e-14 * amplified * (1 + float(x.abs().max()))
            )


def test_half_precision_is_converted_in_float32_and_comes_back():
    schedule = SCHEDULES["vp"](9)
    exact = step_at(schedule, 0, "epsilon")
    half = schedule.step(0, exact.sample.half(), "epsilon", {}).with_predictions(exact.conditional.half())
    x0 = to_denoised(half, half.conditional)
    assert x0.dtype == torch.float32
    back = from_denoised(half, x0)
    assert back.dtype == torch.float16
    torch.testing.assert_close(back, half.conditional, rtol=1e-3, atol=1e-3)
    same = convert(half.conditional, half.sample, half.alpha, half.sigma, "epsilon", "epsilon")
    assert same.dtype == torch.float32 and torch.equal(same, half.conditional.float())


def test_wrong_prediction_types_are_refused():
    x = torch.ones(2, 3)
    with pytest.raises(
        ValueError, match=r"unknown prediction type 'velocity': expected one of epsilon, sample, v, flow"
    ):
        convert(x, x, 0.6, 0.8, "velocity", "sample")
    with pytest.raises(ValueError, match="unknown prediction type 'eps'"):
        Step(x, 0.6, 0.8, 1.0, 0.0, 0, 1, "eps")
    with pytest.raises(ValueError, match=r"'v' belongs to a schedule with alpha\^2 \+ sigma\^2 = 1"):
        denoised(x, x, 0.4, 0.6, "v")  # a flow model's velocity under the name of v
    with pytest.raises(ValueError, match=r"'flow' belongs to a schedule with alpha \+ sigma = 1"):
        noise(x, x, 0.6, 0.8, "flow")
    with pytest.raises(ValueError, match=r"'v' belongs to"):
        convert(x, x, 0.4, 0.6, "epsilon", "v")
    with pytest.raises(ValueError, match="x0 does not follow from a prediction of type 'epsilon' where alpha is 0"):
        denoised(x, x, 0.0, 1.0, "epsilon")
    with pytest.raises(
        ValueError, match="the noise does not follow from a prediction of type 'sample' where sigma is 0"
    ):
        noise(x, x, 1.0, 0.0, "sample")


def test_a_missing_or_misshapen_prediction_is_named():
    step = SCHEDULES["vp"](4).step(2, torch.ones(2, 3), "epsilon", {})
    with pytest.raises(
        ValueError, match=r"step 2: the unconditional prediction has shape \(1, 3\), the sample \(2, 3\)"
    ):
        step.with_predictions(torch.ones(2, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="step 2: the unconditional prediction is missing"):
        step.with_predictions(torch.ones(2, 3)).require("conditional", "unconditional")


def test_schedules_are_what_they_say():
    vp, ve, rectified = (
        variance_preserving(ALPHAS_CUMPROD, 10),
        variance_exploding(80.0, 0.002, 10),
        flow(10, shift=3.0),
    )
    assert len(vp) == len(ve) == len(rectified) == 10
    assert all(abs(a * a + s * s - 1) < 1e-15 for a, s in zip(vp.alphas, vp.sigmas, strict=True))
    assert [alpha**2 for alpha in vp.alphas] == pytest.approx([*ALPHAS_CUMPROD.tolist()[999::-100], 1.0], rel=1e-14)
    every = variance_preserving(ALPHAS_CUMPROD[:7], 7)
    assert [alpha**2 for alpha in every.alphas] == pytest.approx([*ALPHAS_CUMPROD.tolist()[6::-1], 1.0], rel=1e-14)
    assert set(ve.alphas) == {1.0}
    assert ve.sigmas[0] == pytest.approx(80) and ve.sigmas[9] == pytest.approx(0.002) and ve.sigmas[10] == 0
    assert ve.sigmas[1] == pytest.approx((80 ** (1 / 7) * 8 / 9 + 0.002 ** (1 / 7) / 9) ** 7)
    uneven = variance_preserving(
        ALPHAS_CUMPROD, 7
    ).alphas  # at 1000 - 4 * 1000 / 7 = 428.57, rounded, from the first level on
    assert uneven[4] == pytest.approx(float(ALPHAS_CUMPROD[428]) ** 0.5)
    assert rectified.sigmas[0] == 1 and rectified.sigmas[5] == pytest.approx(0.75) and rectified.sigmas[-1] == 0
    assert all(abs(a + s - 1) < 1e-15 for a, s in zip(rectified.alphas, rectified.sigmas, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule((1.0, 1.0), (1.0, 2.0)), "must fall from step to step: it does not from step 0 to 1"),
        (lambda: Schedule((1.0,), (1.0,)), "at least 2"),
        (lambda: Schedule((1.0, 1.0), (1.0, -0.5)), "must be finite and not below 0"),
        (lambda: Schedule((1.0, 1.0), (float("inf"), 0.5)), "must be finite and not below 0"),
        (lambda: variance_preserving(ALPHAS_CUMPROD[:5], 6), "at least 6 steps"),
        (lambda: variance_exploding(0.1, 0.2, 5), "0 < sigma_min < sigma_max"),
        (lambda: variance_exploding(2.0, 0.2, 5, rho=-7.0), "and rho > 0"),
        (lambda: flow(0), "count must be an integer of at least 1, got 0"),
        (lambda: flow(4, shift=0.0), "shift must be above 0"),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
