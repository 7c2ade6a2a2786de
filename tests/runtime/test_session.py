"""The session that a wrapped loop and a guider component share: the same predictions leave the same record."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from guide_doubles import Plain
from tiny_pipelines import SCALE, SD3, STEPS, WAN, call, call_modular, modular, randn

from hasten.errors import StateError
from hasten.guidance.diffusion.adaptive import AdaptiveGuidance
from hasten.guidance.diffusion.apg import AdaptiveProjectedGuidance
from hasten.guidance.diffusion.classifier_free import ClassifierFreeGuidance
from hasten.guidance.diffusion.guide import BOTH
from hasten.guidance.diffusion.intervals import StepInterval
from hasten.pipelines import schedulers
from hasten.pipelines.guided import guided, guider
from hasten.pipelines.record import Run
from hasten.pipelines.session import Session

GUIDES = {
    "adaptive": AdaptiveGuidance(SCALE, threshold=-1, space="x0", min_guided_steps=2),
    "interval": ClassifierFreeGuidance(SCALE, interval=StepInterval(0.2, 0.7)),
    "momentum": AdaptiveProjectedGuidance(SCALE),
}


def predict(hidden_states, timestep, encoder_hidden_states, **_):
    """A denoiser whose rows do not depend on what else is in the batch, bit for bit."""
    condition = torch.stack([row.mean() for row in encoder_hidden_states])
    return (torch.sin(hidden_states + condition.reshape(-1, *[1] * (hidden_states.ndim - 1))),)


@pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES)
@pytest.mark.parametrize(
    ("case", "blocks", "shape"),
    [(WAN, WanCoreDenoiseStep, (4, 2, 4, 4)), (SD3, StableDiffusion3T2ICoreDenoiseStep, (4, 8, 8))],
    ids=["sequential", "batched"],
)
def test_a_loop_and_a_component_record_the_same_of_the_same_predictions(case, blocks, shape, guide, monkeypatch):
    classic, asking, noise = case.build(), modular(blocks, case), randn(2, *shape, seed=5)
    for pipe in (classic, asking):
        monkeypatch.setattr(pipe.transformer, "forward", predict)
    with guided(classic, guide) as run:
        expected = call(classic, case, 2, latents=noise)
    ours = guider(guide, asking.scheduler)
    found = call_modular(asking, case, ours, 2, latents=noise)
    assert torch.equal(found, expected)
    assert ours.run.evaluations.full == run.evaluations.full == 2 * 2 * STEPS
    assert len(run.trace) == STEPS
    for of_loop, of_component in zip(run.trace, ours.run.trace, strict=True):
        # A component calls its denoiser once for each pass, a batched loop once for all.
        assert of_component["calls"] == of_component["rows"] // 2
        assert of_loop == of_component | {"calls": of_component["calls"] if case is WAN else 1}


def session(guide=None, steps: int = 3) -> Session:
    """A session in a call of so many steps."""
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(steps)
    opened = Session(guide or Plain(), scheduler, Run("a guide", "a pipeline"), BOTH)
    opened.begin(schedulers.timesteps(scheduler), 0, steps)
    return opened


def step(opened: Session, index: int) -> torch.Tensor:
    """Step `index` of one sample whose predictions say which pass they are."""
    passes = opened.open(index, torch.zeros(1, 2))
    values = {"conditional": 1.0, "unconditional": 3.0}
    prediction = opened.combine({name: torch.full((1, 2), values[name]) for name in passes}, torch.float32)
    opened.close(calls=len(passes))
    return prediction


def test_a_call_is_recorded_step_by_step():
    opened = session(Plain(scale=2.0, stop=2))
    assert [step(opened, index)[0, 0].item() for index in range(3)] == [-1.0, -1.0, 1.0]
    assert opened.run.evaluations.per_step == ((2, 2), (2, 2), (1, 1)) and opened.run.evaluations.full == 6
    assert [entry["step"] for entry in opened.run.trace] == [0, 1, 2]
    assert [entry.get("update_norm") for entry in opened.run.trace] == [[pytest.approx(8**0.5)]] * 2 + [None]
    opened.begin(opened.call.timesteps, 1, 2)
    step(opened, 0)
    assert [len(call.steps) for call in opened.run.pipeline_calls] == [3, 1]
    assert opened.run.trace[3]["sigma"] == opened.run.trace[1]["sigma"] > opened.run.trace[2]["sigma"]


def test_a_call_has_no_more_steps_than_timesteps():
    opened = session()
    for index in range(3):
        step(opened, index)
    with pytest.raises(StateError, match="a pipeline makes more than 3 steps"):
        step(opened, 3)


def test_the_prediction_is_rescaled_where_the_guide_guides_and_cast():
    opened = session(Plain(scale=2.0, stop=1))
    for index, expected in enumerate((-2.0, 1.0)):
        passes = opened.open(index, torch.zeros(1, 2))
        predictions = {name: torch.full((1, 2), 1.0 if name == "conditional" else 3.0) for name in passes}
        found = opened.combine(predictions, torch.float16, rescale=lambda prediction, conditional: 2 * prediction)
        opened.close(calls=len(passes))
        assert found.dtype == torch.float16 and found[0, 0] == expected
