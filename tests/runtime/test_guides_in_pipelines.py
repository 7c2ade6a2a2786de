"""hasten's guides in the pipelines of diffusers: identities that hold in every parameterization, and evaluations
counted by a hook.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_pipelines import CASES, FLUX, QWEN, SCALE, SD, STEPS, call, counted

from hasten.guidance.diffusion.adaptive import AdaptiveGuidance
from hasten.guidance.diffusion.apg import AdaptiveProjectedGuidance
from hasten.guidance.diffusion.classifier_free import ClassifierFreeGuidance
from hasten.guidance.diffusion.intervals import StepInterval
from hasten.guidance.diffusion.linear_ag import (
    Coefficients,
    LinearAG,
    LinearRecorder,
    RunKey,
    Trajectories,
    alternating,
    fit,
)
from hasten.pipelines.guided import guided, run_key

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
    key = run_key(pipe, steps=steps, scale=SCALE, shape=expected.shape[1:])
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
    with pytest.raises(ValueError, match="model differ"):
        LinearAG(fit(*recorded), replace(key, model="another"))


@KINDS
def test_a_key_tells_models_and_schedulers_apart(case):
    pipe, name = case.build(), case.denoisers[0]
    settings = {"steps": 8, "scale": SCALE, "shape": (4, 8, 8)}
    key = run_key(pipe, **settings)
    assert run_key(pipe, **settings) == key
    weight = next(getattr(pipe, name).parameters()).detach().flatten()
    before, weight[0] = weight[0].item(), 1.0
    assert run_key(pipe, **settings) == replace(key, model=run_key(pipe, **settings).model) != key
    weight[0] = before
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, num_train_timesteps=500)
    assert run_key(pipe, **settings) == replace(key, scheduler=run_key(pipe, **settings).scheduler) != key


@pytest.mark.parametrize("case", [SD, QWEN], ids=["guidance_rescale", "norms of tokens"])
def test_what_is_guided_by_an_estimate_is_rescaled_like_all_that_is_guided(case):
    """Where the estimate is exact, here the unconditional prediction of step 0 itself, one pass or two make no
    difference.
    """
    pipe = case.build()
    parameterization, shape = ("epsilon", (4, 8, 8)) if case is SD else ("flow", (4, 16))
    with guided(pipe, ClassifierFreeGuidance(SCALE)):
        shape = tuple(call(pipe, case).shape[1:])
    key = RunKey("tiny", "any", STEPS, SCALE, shape, parameterization)
    estimate = LinearAG(Coefficients(key, {1: (0.0, 1.0, 0.0)}, {}, {}), key, stop=2)

    class Same(ClassifierFreeGuidance):
        """The same from two passes."""

        def __call__(self, step):
            first = step.memory.setdefault("first", step.unconditional)
            return super().__call__(replace(step, unconditional=first)) if step.index < 2 else step.conditional

    settings = {"guidance_rescale": 0.7} if case is SD else {}
    with guided(pipe, Same(SCALE)):
        expected = call(pipe, case, **settings)
    with guided(pipe, estimate) as run:
        found = call(pipe, case, **settings)
    assert [rows for rows, _ in run.evaluations.per_step] == [2] + [1] * (STEPS - 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with guided(pipe, estimate, rescale=False):
        assert not torch.allclose(call(pipe, case, **settings), expected, atol=1e-3)


@EVERY
def test_the_trace_says_how_far_the_predictions_agree_whatever_the_guide(case):
    pipe, measured = case.build(), []

    class Watched(ClassifierFreeGuidance):
        def __call__(self, step):
            if step.unconditional is not None:
                c, u = (x.double().flatten(1) for x in (step.conditional, step.unconditional))
                values = (c * u).sum(1) / c.norm(dim=1) / u.norm(dim=1), (c - u).norm(dim=1), c.norm(dim=1)
                measured.append(values)
            return super().__call__(step)

    with guided(pipe, Watched(SCALE, interval=StepInterval(0, 0.5))) as run:
        call(pipe, case, 2)
    assert len(measured) == STEPS // 2
    for step, values in zip(run.trace, measured, strict=False):
        for name, value in zip(("cosine", "update_norm", "conditional_norm"), values, strict=True):
            torch.testing.assert_close(torch.tensor(step[name]).double(), value, rtol=1e-4, atol=1e-4)
        assert step["space"] == "model"
    assert not any("cosine" in step for step in run.trace[STEPS // 2 :])
    with guided(pipe, AdaptiveGuidance(SCALE, space="x0")) as run:
        call(pipe, case)
    assert run.trace[0]["space"] == "x0"


@KINDS
def test_linear_ag_refuses_a_run_that_is_not_its_keys(case):
    pipe = case.build()
    key = RunKey("tiny", "any", STEPS, SCALE, (3, 3), "v")
    guide = LinearRecorder(Trajectories(key, (1,)))
    with pytest.raises(ValueError, match="shape, parameterization differ"), guided(pipe, guide):
        call(pipe, case)
