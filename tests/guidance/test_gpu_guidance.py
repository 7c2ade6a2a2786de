"""Guidance and rejection on a GPU against the same on the CPU: keys and predictions stay there, only answers and
candidates travel.
"""

import math

import pytest
import torch
from mixture import SCHEDULES, mixture, start

from hasten.guidance.diffusion.adaptive import AdaptiveGuidance
from hasten.guidance.diffusion.sampling import sample
from hasten.guidance.text.rejection import draw

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_adaptive_guidance_stops_where_it_does_on_the_cpu(lag):
    model, schedule = mixture(), SCHEDULES["vp"](16)
    predict = model.denoiser("epsilon")
    guide = AdaptiveGuidance(5.0, threshold=0.9, space="x0", min_guided_steps=2, lag=lag)
    there = sample(guide, lambda x, *rest: predict(x.cpu(), *rest).cuda(), schedule, start(schedule).cuda(), "epsilon")
    here = sample(guide, predict, schedule, start(schedule), "epsilon")
    assert there.rows == here.rows
    torch.testing.assert_close(there.sample.cpu(), here.sample)


def test_a_nan_stops_the_run_with_the_steps_number():
    schedule, predict = SCHEDULES["vp"](8), mixture().denoiser("epsilon")

    def broken(x, step, name, rows):
        return predict(x.cpu(), step, name, rows).cuda() * (math.nan if step.index == 3 else 1)

    with pytest.raises(ValueError, match="at step 3 of 8"):
        sample(AdaptiveGuidance(5.0), broken, schedule, start(schedule).cuda(), "epsilon")


@pytest.mark.parametrize("valid", [7, 3000])
def test_draws_are_those_of_the_cpu(valid):
    logits = 3 * torch.randn(16, 4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    here, there = (
        draw(x, lambda row, token: token % 4096 >= valid, generator=torch.Generator().manual_seed(1))
        for x in (logits, logits.cuda())
    )
    assert (
        there.token.is_cuda
        and torch.equal(here.token, there.token.cpu())
        and torch.equal(here.checks, there.checks.cpu())
    )
    torch.testing.assert_close(here.log_weight, there.log_weight.cpu())
