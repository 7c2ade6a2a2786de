"""The loop: what it integrates, and that it stops where predictions are no numbers."""

import pytest
import torch
from mixture import KINDS, SCHEDULES, mixture, start

from hasten.guidance.diffusion.classifier_free import ClassifierFreeGuidance
from hasten.guidance.diffusion.lag import FiniteCheck, Lagged
from hasten.guidance.diffusion.sampling import sample


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_one_step_by_hand(name, kind):
    """x' = alpha' x0 + sigma' noise, with the mixture's own x0 and noise."""
    full = SCHEDULES[name](8)
    schedule = type(full)(full.alphas[3:5], full.sigmas[3:5])
    x, model = start(schedule), mixture()
    x0, noise = model.posterior(x, schedule.alphas[0], schedule.sigmas[0], "conditional")
    result = sample(ClassifierFreeGuidance(1.0), model.denoiser(kind), schedule, x, kind)
    torch.testing.assert_close(result.sample, schedule.alphas[1] * x0 + schedule.sigmas[1] * noise, rtol=0, atol=1e-13)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("broken", ["conditional", "unconditional"])
def test_a_prediction_that_is_no_number_stops_the_run(value, broken):
    schedule, model = SCHEDULES["vp"](10), mixture()
    steps = []

    def predict(x, step, name, rows):
        steps.append(step.index)
        prediction = model.predict(x, step.alpha, step.sigma, name, "epsilon")
        if step.index == 6 and name == broken:
            prediction[1, 2] = value
        return prediction

    with pytest.raises(ValueError, match="NaN or infinite prediction at step 6 of 10"):
        sample(ClassifierFreeGuidance(3.0), predict, schedule, start(schedule), "epsilon")
    assert max(steps) == 6


def test_an_answer_is_read_so_many_steps_late_and_no_later():
    for lag in (0, 1, 3):
        answers = Lagged(lag)
        for index in range(8):
            known = answers.read(index)
            assert known is None if index - 1 - lag < 0 else known == (index - 1 - lag, torch.tensor(index - 1 - lag))
            assert answers.read(index) is known
            answers.put(index, torch.tensor(index))


def test_what_is_read_late_is_read_at_the_end():
    check = FiniteCheck(3, torch.device("cpu"))
    check._answers = Lagged(1)
    check(0, torch.ones(2), None)
    check(1, torch.ones(2), torch.ones(2))
    check(2, torch.full((2,), torch.nan))
    with pytest.raises(ValueError, match="step 2 of 3"):
        check.finish()


def test_two_runs_are_independent():
    schedule, model = SCHEDULES["flow"](6), mixture()
    runs = [
        sample(ClassifierFreeGuidance(3.0), model.denoiser("flow"), schedule, start(schedule), "flow") for _ in range(2)
    ]
    assert torch.equal(runs[0].sample, runs[1].sample) and runs[0].memory is not runs[1].memory
