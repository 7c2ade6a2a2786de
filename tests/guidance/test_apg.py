"""Adaptive projected guidance: its laws, in x0 space whatever the model predicts, and that these laws reject the known
wrong forms.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from mixture import KINDS, SCHEDULES, mixture, start, step_at

from hasten.guidance.diffusion.apg import AdaptiveProjectedGuidance, project
from hasten.guidance.diffusion.classifier_free import ClassifierFreeGuidance
from hasten.guidance.diffusion.guide import Guide
from hasten.guidance.diffusion.intervals import StepSet, Within
from hasten.guidance.diffusion.parameterization import to_denoised
from hasten.guidance.diffusion.sampling import sample

N = 10


@dataclass(frozen=True)
class WrongApg(Guide):
    """As it is often written: on the model's own predictions ("model"), or with the update added to the unconditional
    prediction.
    """

    scale: float
    eta: float = 0.0
    max_norm: float = math.inf
    base: str = "conditional"
    space: str = "x0"

    def __call__(self, step):
        into = (lambda p: p) if self.space == "model" else (lambda p: to_denoised(step, p))
        c, u = into(step.conditional), into(step.unconditional)
        update = (c - u) * (self.max_norm / (c - u).norm(dim=1, keepdim=True)).clamp(max=1)
        parallel, orthogonal = project(update, c)
        start, scale = (c, self.scale - 1) if self.base == "conditional" else (u, self.scale)
        guided = start + scale * (orthogonal + self.eta * parallel)
        return guided if self.space == "model" else (step.sample - step.alpha * guided) / step.sigma


def without_limits_it_is_cfg(make, step):
    expected = ClassifierFreeGuidance(6.0)(step)
    torch.testing.assert_close(make(scale=6.0, eta=1.0, max_norm=math.inf)(step), expected, rtol=0, atol=1e-12)


def a_vanishing_update_leaves_the_conditional(make, step):
    torch.testing.assert_close(make(scale=6.0, eta=0.0, max_norm=1e-13)(step), step.conditional, rtol=0, atol=1e-11)


def the_update_is_orthogonal_to_the_conditional_x0(make, step):
    conditional = to_denoised(step, step.conditional)
    update = to_denoised(step, make(scale=6.0, eta=0.0, max_norm=math.inf)(step)) - conditional
    cosine = torch.cosine_similarity(update, conditional, dim=1)
    torch.testing.assert_close(cosine, torch.zeros_like(cosine), rtol=0, atol=1e-12)


def the_update_is_bounded_in_x0(make, step):
    conditional = to_denoised(step, step.conditional)
    update = to_denoised(step, make(scale=2.0, eta=1.0, max_norm=0.3)(step)) - conditional
    free = to_denoised(step, ClassifierFreeGuidance(2.0)(step)) - conditional
    assert (free.norm(dim=1) > 0.3).all()
    torch.testing.assert_close(update.norm(dim=1), torch.full((4,), 0.3, dtype=torch.float64), rtol=1e-11, atol=0)


LAWS = [
    without_limits_it_is_cfg,
    a_vanishing_update_leaves_the_conditional,
    the_update_is_orthogonal_to_the_conditional_x0,
    the_update_is_bounded_in_x0,
]


def right(scale, eta, max_norm):
    return AdaptiveProjectedGuidance(scale, eta, momentum=0.0, max_norm=None if max_norm == math.inf else max_norm)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_laws(law, name, kind):
    law(right, step_at(SCHEDULES[name](N), 3, kind))


@pytest.mark.parametrize(
    "law", [a_vanishing_update_leaves_the_conditional, the_update_is_orthogonal_to_the_conditional_x0]
)
def test_a_wrong_base_is_rejected(law):
    with pytest.raises(AssertionError):
        law(lambda **given: WrongApg(base="unconditional", **given), step_at(SCHEDULES["vp"](N), 3, "epsilon"))


@pytest.mark.parametrize("law", [the_update_is_orthogonal_to_the_conditional_x0, the_update_is_bounded_in_x0])
def test_a_wrong_space_is_rejected(law):
    with pytest.raises(AssertionError):
        law(lambda **given: WrongApg(space="model", **given), step_at(SCHEDULES["vp"](N), 3, "epsilon"))


@pytest.mark.parametrize("law", LAWS)
def test_the_form_under_test_is_wrong_by_its_defect_alone(law):
    law(WrongApg, step_at(SCHEDULES["vp"](N), 3, "epsilon"))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_parameterization_gives_the_same_run(name):
    guide, schedule = AdaptiveProjectedGuidance(8.0, momentum=-0.5, max_norm=1.5), SCHEDULES[name](N)
    runs = [
        sample(guide, mixture().denoiser(kind), schedule, start(schedule), kind).sample
        for of, kind in KINDS
        if of == name
    ]
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=0, atol=1e-11)


def test_momentum_three_steps_by_hand():
    """M_i = update_i + beta * M_(i - 1) before the norm's limit and the projection, on updates in x0."""
    schedule, beta, limit, memory, last = SCHEDULES["vp"](N), -0.75, 1.0, {}, 0.0
    guide = AdaptiveProjectedGuidance(5.0, eta=0.2, momentum=beta, max_norm=limit)
    for index in (2, 3, 4):  # a guide that is first asked at step 2 begins there
        step = step_at(schedule, index, "v", memory=memory)
        c, u = to_denoised(step, step.conditional), to_denoised(step, step.unconditional)
        last = (c - u) + beta * last
        rows = []
        for m, d in zip(last, c, strict=True):
            m = m * min(1.0, limit / m.norm().item())
            along = (m @ d) / (d @ d) * d
            rows.append(d + 4.0 * ((m - along) + 0.2 * along))
        torch.testing.assert_close(to_denoised(step, guide(step)), torch.stack(rows), rtol=0, atol=1e-12)


def test_momentum_ends_with_the_run_and_begins_at_the_first_guided_step():
    schedule = SCHEDULES["flow"](N)
    denoiser = mixture().denoiser("flow")
    guide = Within(AdaptiveProjectedGuidance(5.0, momentum=-0.75), StepSet([4, 5, 6]))
    first, second = (sample(guide, denoiser, schedule, start(schedule), "flow") for _ in range(2))
    assert torch.equal(first.sample, second.sample)
    without = Within(AdaptiveProjectedGuidance(5.0, momentum=0.0), StepSet([4, 5, 6]))
    assert not torch.allclose(
        first.sample, sample(without, denoiser, schedule, start(schedule), "flow").sample, atol=1e-3
    )


def test_scale_one_is_the_conditional_prediction_alone():
    step = step_at(SCHEDULES["flow"](N), 3, "flow")
    guide = AdaptiveProjectedGuidance(1.0, max_norm=0.1)
    assert guide.passes(step) == ("conditional",) and guide(step) is step.conditional


def test_half_precision_stays_half_precision():
    step = SCHEDULES["vp"](N).step(0, torch.randn(2, 8).bfloat16(), "epsilon", {})
    guided = AdaptiveProjectedGuidance()(step.with_predictions(*torch.randn(2, 2, 8).bfloat16()))
    assert guided.dtype == torch.bfloat16 and guided.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveProjectedGuidance(momentum=1.0), r"momentum must lie inside \(-1, 1\)"),
        (lambda: AdaptiveProjectedGuidance(momentum=-2.0), r"momentum must be a finite number in \[-1, 1\]"),
        (lambda: AdaptiveProjectedGuidance(max_norm=-1.0), "max_norm must be a finite number"),
        (lambda: AdaptiveProjectedGuidance(eta=math.inf), "eta must be a finite number"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
