"""hasten's guides in the pipelines of diffusers: identities that hold in every parameterization, and evaluations counted by a hook."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_pipelines import CASES, FLUX, SCALE, SD, STEPS, call, counted

from hasten.guidance.adaptive import AdaptiveGuidance
from hasten.guidance.apg import AdaptiveProjectedGuidance
from hasten.guidance.classifier_free import ClassifierFreeGuidance
from hasten.guidance.intervals import StepInterval
from hasten.guidance.linear_ag import LinearAG, LinearRecorder, RunKey, Trajectories, alternating, fit
from hasten.guided_pipelines import guided

# Of numpy, about how SDXL's scheduler converts a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
KINDS = pytest.mark.parametrize("case", [SD, FLUX], ids=["batched", "sequential"])


@EVERY
def test_adaptive_guidance_that_never_stops_is_plain_guidance(case):
    pipe = case.build()
    with guided(pipe, ClassifierFreeGuidance(SCALE)):
        expected = call(pipe, case, 2)
    with guided(pipe, AdaptiveGuidance(SCALE, threshold=math.inf)) as run:
        assert torch.equal(call(pipe, case, 2), expected)
    assert run.evaluations.rows == run.evaluations.full
    assert all(len(step["cosine"]) == 2 and min(step["cosine"]) >= -1.001 for step in run.trace)


@EVERY
def test_adaptive_guidance_stops_after_its_guard(case):
    """A threshold that every cosine reaches: k guided steps, and then one pass in each."""
    pipe, k = case.build(), 2
    with counted(pipe, case) as rows, guided(pipe, AdaptiveGuidance(SCALE, threshold=-1, min_guided_steps=k)) as run:
        call(pipe, case, 2)
    assert sum(rows) == 2 * (2 * k + STEPS - k) == run.evaluations.rows
    assert [step["scale"] for step in run.trace] == [SCALE] * k + [1.0] * (STEPS - k)


@EVERY
def test_projected_guidance_that_projects_nothing_is_plain_guidance(case):
    """It is computed on x0, so this holds only if x_t, alpha, sigma and the parameterization are right."""
    pipe = case.build()
    with guided(pipe, ClassifierFreeGuidance(SCALE)):
        expected = call(pipe, case)
    with guided(pipe, AdaptiveProjectedGuidance(SCALE, eta=1.0, momentum=0.0)):
        found = call(pipe, case)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@KINDS
def test_an_interval_guides_in_the_middle(case):
    pipe = case.build()
    guide = ClassifierFreeGuidance(SCALE, interval=StepInterval(0.5, 0.85))
    with counted(pipe, case) as rows, guided(pipe, guide) as run:
        call(pipe, case)
    assert [step_rows for step_rows, _ in run.evaluations.per_step] == [1, 1, 1, 2, 2, 1]
    assert sum(rows) == 8


@KINDS
def test_linear_ag_halves_the_rows_of_the_steps_it_predicts(case):
    pipe, steps = case.build(), 8
    with guided(pipe, ClassifierFreeGuidance(SCALE, interval=StepInterval(0, 0.5))):
        expected = call(pipe, case, steps=steps)
    parameterization = "epsilon" if case is SD else "flow"
    key = RunKey("tiny", type(pipe.scheduler).__name__, steps, SCALE, expected.shape[1:], parameterization)
    recorded = [Trajectories(key, alternating(steps)) for _ in range(2)]
    for seed, trajectories in enumerate(recorded):
        with guided(pipe, LinearRecorder(trajectories)):
            call(pipe, case, steps=steps, seed=seed)
    with counted(pipe, case) as rows, guided(pipe, LinearAG(fit(*recorded), key)) as run:
        found = call(pipe, case, steps=steps)
    assert [step_rows for step_rows, _ in run.evaluations.per_step] == [2, 1, 2, 1] + [1] * 4
    assert sum(rows) == 10
    conditional = ClassifierFreeGuidance(SCALE, interval=StepInterval(0, 0))
    with guided(pipe, conditional):
        unguided = call(pipe, case, steps=steps)
    assert torch.linalg.vector_norm(found - expected) < 0.5 * torch.linalg.vector_norm(unguided - expected)
    other = RunKey("another", key.scheduler, steps, SCALE, key.shape, parameterization)
    with pytest.raises(ValueError, match="model differ"):
        LinearAG(fit(*recorded), other)


@KINDS
def test_linear_ag_refuses_a_run_that_is_not_its_keys(case):
    pipe = case.build()
    key = RunKey("tiny", "any", STEPS, SCALE, (3, 3), "v")
    guide = LinearRecorder(Trajectories(key, (1,)))
    with pytest.raises(ValueError, match="shape, parameterization differ"), guided(pipe, guide):
        call(pipe, case)
