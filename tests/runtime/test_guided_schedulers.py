"""The schedulers of diffusers: a guide's sample, alpha and sigma are the scheduler's at every step, and what is not
known is refused.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from guide_doubles import Aim, Samples
from tiny_pipelines import SCALE, SD, SD3, STEPS, call, stable_diffusion, untouched

from hasten.errors import UnsupportedModelError
from hasten.guidance.diffusion.cfg_plus_plus import CFGPlusPlus
from hasten.guidance.diffusion.classifier_free import ClassifierFreeGuidance
from hasten.guidance.diffusion.intervals import StepInterval, Within
from hasten.pipelines.families import DENOISERS, FAMILIES
from hasten.pipelines.guided import guided
from hasten.pipelines.schedulers import SAMPLERS, check

# Those for Stable Diffusion, under which x0 comes out at the end; the flow is tested with the pipelines that have one.
SETTINGS = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "LCMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True, "set_alpha_to_one": True},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
}
STOCHASTIC = {"DDPMScheduler", "LCMScheduler", "EulerAncestralDiscreteScheduler"}
# Not offered by these schedulers, or averaged over steps in a way that is not exact for a constant x0.
WITHOUT = {
    ("PNDMScheduler", "sample"),
    ("PNDMScheduler", "v_prediction"),
    ("EulerAncestralDiscreteScheduler", "sample"),
}
EVERY = pytest.mark.parametrize("kind", SETTINGS)


def build(kind: str, **settings):
    """Stable Diffusion with this scheduler."""
    return stable_diffusion(scheduler=getattr(diffusers, kind)(steps_offset=1, **SETTINGS[kind], **settings))


def test_the_readme_names_all_that_is_known():
    readme = Path(__file__).parents[2].joinpath("guidance", "README.md").read_text(encoding="utf-8")
    assert {*SAMPLERS, *FAMILIES, *DENOISERS} <= set(re.findall(r"`(\w+)`", readme))


def test_every_known_scheduler_is_tested():
    assert set(SAMPLERS) == {*SETTINGS, "FlowMatchEulerDiscreteScheduler"}
    assert isinstance(SD3.build().scheduler, diffusers.FlowMatchEulerDiscreteScheduler)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@EVERY
def test_sample_alpha_and_sigma_are_the_schedulers(kind, prediction):
    """With one x0 predicted throughout, a sampler ends there, and its noise stays as it is, or standard normal if the
    sampler draws it anew.
    """
    if (kind, prediction) in WITHOUT:
        return
    pipe, aim = build(kind, prediction_type=prediction), Aim(torch.full((1, 4, 8, 8), 0.5))
    with guided(pipe, aim):
        found = call(pipe, SD)
    torch.testing.assert_close(found, aim.ends[-1], rtol=0, atol=1e-4)
    if kind != "DEISMultistepScheduler":  # which stops at its lowest sigma
        torch.testing.assert_close(found, aim.target, rtol=0, atol=1e-4)
    if kind in STOCHASTIC:
        for noise in aim.noises:
            assert abs(noise.std() - 1) < 0.2 and abs(noise.mean()) < 0.25  # 4 standard errors of 256 values
    else:
        aim.check_noise()


@EVERY
def test_each_step_leads_where_the_next_one_begins(kind):
    class Steps(Samples):
        levels = ()

        def __call__(self, step):
            self.levels += ((step.alpha, step.sigma, step.next_alpha, step.next_sigma),)
            return super().__call__(step)

    pipe, seen = build(kind), Steps()
    with guided(pipe, seen):
        call(pipe, SD)
    for now, after in zip(seen.levels[:-1], seen.levels[1:], strict=True):
        assert now[2:] == after[:2]
    assert (seen.levels[-1][3] == 0) == (kind != "DEISMultistepScheduler")
    for before, exact in zip(seen.before, seen.exact, strict=True):
        torch.testing.assert_close(before, exact, rtol=1e-5, atol=1e-5)


@EVERY
def test_plain_guidance_equals_the_unmodified_pipeline(kind):
    pipe = build(kind)
    expected = call(pipe, SD, 2)
    with guided(pipe, ClassifierFreeGuidance(SCALE)):
        assert torch.equal(call(pipe, SD, 2), expected)


@pytest.mark.parametrize("steps", [STEPS, STEPS + 1])
@pytest.mark.parametrize(
    ("kind", "settings", "eta"),
    [
        ("DDIMScheduler", {}, 0.0),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}, 0.0),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": False}, 0.0),
        ("DDIMScheduler", {"timestep_spacing": "linspace"}, 0.7),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 0.0),
        ("EulerAncestralDiscreteScheduler", {}, 1.0),
        ("DDPMScheduler", {"timestep_spacing": "trailing"}, 1.0),
        ("DPMSolverMultistepScheduler", {"solver_order": 1}, 0.0),
        ("DPMSolverMultistepScheduler", {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, 1.0),
        ("DEISMultistepScheduler", {"solver_order": 1}, 0.0),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_cfg_plus_plus_runs_inside_unmodified_schedulers(monkeypatch, kind, settings, eta, steps):
    """Every step guides x0 and puts the unconditional noise back (arXiv 2406.08070, algorithm 2), as far down as the
    scheduler's own step leads before it adds what it draws anew, here nothing.
    """
    expected, found = [], []

    class Watched(CFGPlusPlus):
        def __call__(self, step):
            noise = step.unconditional + self.strength * (step.conditional - step.unconditional)
            x0 = (step.sample - step.sigma * noise) / step.alpha
            ratio = step.next_sigma * step.alpha / (step.next_alpha * step.sigma)
            down = step.next_sigma * (1 - self.eta**2 * (1 - ratio**2)) ** 0.5
            expected.append(step.next_alpha * x0 + down * step.unconditional)
            return super().__call__(step)

    def keep(pipe, index, timestep, tensors):
        found.append(tensors["latents"])
        return tensors

    pipe = build(kind, **settings)
    module = sys.modules[type(pipe.scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: torch.zeros(shape), raising=False)
    with guided(pipe, Watched(0.6, eta)):
        call(pipe, SD, steps=steps, eta=eta, callback_on_step_end=keep)
    assert len(found) == steps
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        ("PNDMScheduler", {}, "PNDMScheduler reads earlier predictions"),
        ("LMSDiscreteScheduler", {}, "first-order"),
        ("UniPCMultistepScheduler", {}, "first-order"),
        ("DPMSolverMultistepScheduler", {}, "first-order"),
        ("DPMSolverMultistepScheduler", {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, r"eta=1\)"),
        ("LCMScheduler", {}, "draws all noise anew"),
        ("EulerAncestralDiscreteScheduler", {}, r"CFGPlusPlus\(eta=1\)"),
    ],
)
def test_cfg_plus_plus_is_refused_where_it_would_be_something_else(kind, settings, match):
    for guide in (CFGPlusPlus(), Within(CFGPlusPlus(), StepInterval(0, 0.5))):
        pipe = build(kind, **settings)
        with pytest.raises(ValueError, match=match), guided(pipe, guide):
            call(pipe, SD)
        assert untouched(pipe, SD)


def test_cfg_plus_plus_takes_the_eta_of_the_call():
    pipe = build("DDIMScheduler")
    with pytest.raises(ValueError, match=r"here it must be CFGPlusPlus\(eta=0.5\)"), guided(pipe, CFGPlusPlus()):
        call(pipe, SD, eta=0.5)


def test_cfg_plus_plus_on_a_flow_that_draws_its_noise_anew_is_refused():
    pipe = SD3.build()
    with guided(pipe, CFGPlusPlus()):
        call(pipe, SD3)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="first-order"), guided(pipe, CFGPlusPlus()):
        call(pipe, SD3)


class Unknown(diffusers.DDIMScheduler):
    """A scheduler of one's own."""


SEVERAL = "evaluates the denoiser several times in one step"


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        (diffusers.VQDiffusionScheduler, {"num_vec_classes": 4}, "neither sigmas nor alphas_cumprod"),
        (diffusers.HeunDiscreteScheduler, {}, SEVERAL),
        (diffusers.KDPM2DiscreteScheduler, {}, SEVERAL),
        (diffusers.PNDMScheduler, {"skip_prk_steps": False}, SEVERAL),
        (Unknown, {}, "not known whether its samples are variance preserving"),
        (diffusers.DDIMScheduler, {"prediction_type": "noise"}, "prediction_type='noise' is not known"),
    ],
    ids=["no sigmas", "heun", "kdpm2", "runge-kutta", "unknown", "prediction"],
)
def test_schedulers_that_are_not_known_are_refused_by_name(kind, settings, reason):
    with pytest.raises(UnsupportedModelError, match=rf"scheduler \({kind.__name__}\): .*{reason}"):
        check(kind(**settings))
