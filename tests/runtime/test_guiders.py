"""Guider components: the same guides in modular pipelines of diffusers. Real loops, tiny random weights."""

from __future__ import annotations

from dataclasses import dataclass

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLCoreDenoiseStep,
)
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22CoreDenoiseStep
from diffusers.modular_pipelines.z_image.modular_blocks_z_image import ZImageCoreDenoiseStep
from guide_doubles import Aim, Failing, Remembering
from tiny_pipelines import (
    QWEN,
    SCALE,
    SD3,
    SDXL,
    STEPS,
    WAN,
    WAN_2,
    Z_IMAGE,
    Case,
    call,
    call_modular,
    counted,
    modular,
    randn,
)

from hasten.errors import StateError, UnsupportedModelError
from hasten.guidance.diffusion.cfg_plus_plus import CFGPlusPlus
from hasten.guidance.diffusion.classifier_free import ClassifierFreeGuidance, Cutoff
from hasten.pipelines.guided import guided, guider


@dataclass(frozen=True)
class Modular:
    """The denoising blocks of a modular pipeline, the classic pipeline of the same model, and the shape of its x_T
    without the batch.
    """

    blocks: type
    case: Case
    shape: tuple[int, ...]

    def build(self):
        return modular(self.blocks, self.case)

    def call(self, pipe, guider, batch: int = 1, **changes) -> torch.Tensor:
        return call_modular(pipe, self.case, guider, batch, latents=self.noise(batch), **changes)

    def noise(self, batch: int) -> torch.Tensor:
        return randn(batch, *self.shape, seed=5)


MODULAR = {
    "sdxl": Modular(StableDiffusionXLCoreDenoiseStep, SDXL, (4, 8, 8)),
    "sd3": Modular(StableDiffusion3T2ICoreDenoiseStep, SD3, (4, 8, 8)),
    "qwen": Modular(QwenImageCoreDenoiseStep, QWEN, (16, 16)),
    "wan": Modular(WanCoreDenoiseStep, WAN, (4, 2, 4, 4)),
    "wan-2": Modular(Wan22CoreDenoiseStep, WAN_2, (4, 2, 4, 4)),
    "z-image": Modular(ZImageCoreDenoiseStep, Z_IMAGE, (4, 8, 8)),
}
EVERY = pytest.mark.parametrize("model", MODULAR.values(), ids=MODULAR)


@EVERY
@pytest.mark.parametrize("batch", [1, 2])
def test_plain_guidance_equals_the_guider_of_diffusers(model, batch):
    pipe = model.build()
    expected = model.call(pipe, diffusers.ClassifierFreeGuidance(SCALE), batch)
    ours = guider(ClassifierFreeGuidance(SCALE), pipe.scheduler)
    with counted(pipe, model.case) as rows:
        assert torch.equal(model.call(pipe, ours, batch), expected)
    assert sum(rows) == 2 * batch * STEPS == ours.run.evaluations.rows == ours.run.evaluations.full


@EVERY
def test_stop_at_step_k_computes_2k_and_then_one_pass(model):
    pipe, stop = model.build(), 2
    ours = guider(Cutoff(SCALE, stop), pipe.scheduler)
    with counted(pipe, model.case) as rows:
        model.call(pipe, ours, batch=2)
    assert sum(rows) == 2 * (2 * stop + STEPS - stop) == ours.run.evaluations.rows
    assert len(rows) == 2 * stop + STEPS - stop == ours.run.evaluations.calls


@pytest.mark.parametrize(
    "name", [name for name in MODULAR if name != "qwen"]
)  # its loop changes what the guide returns
def test_the_prediction_is_exact_in_every_parameterization(name):
    model = MODULAR[name]
    pipe = model.build()
    shape = model.call(pipe, guider(Cutoff(SCALE, 0), pipe.scheduler)).shape
    aim = Aim(torch.ones(shape))
    found = model.call(pipe, guider(aim, pipe.scheduler))
    torch.testing.assert_close(found, aim.target, rtol=0, atol=1e-4)
    aim.check_noise()


@EVERY
def test_every_run_is_that_of_the_classic_pipeline(model):
    """A guide with a memory, twice in a row: what it carries starts empty, and survives the change of denoisers."""
    pipe, classic = model.build(), model.case.build()
    ours = guider(Remembering(), pipe.scheduler)
    found = [model.call(pipe, ours) for _ in range(2)]
    with guided(classic, Remembering()) as run:
        expected = call(classic, model.case, latents=model.noise(1))
    if model.case is QWEN:
        expected = classic._unpack_latents(expected, 64, 64, classic.vae_scale_factor)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    assert [step["call"] for step in ours.run.trace] == [0] * STEPS + [1] * STEPS
    assert [step["sigma"] for step in ours.run.trace[:STEPS]] == [step["sigma"] for step in run.trace]


def test_a_run_after_one_that_failed_starts_anew():
    model = MODULAR["wan"]
    pipe = model.build()
    ours = guider(Failing(at=2, once=True), pipe.scheduler)
    with pytest.raises(KeyError, match="lost"):
        model.call(pipe, ours)
    found = model.call(pipe, ours)
    assert torch.equal(found, model.call(pipe, guider(Cutoff(steps=0), pipe.scheduler)))
    assert [len(record.steps) for record in ours.run.pipeline_calls] == [2, STEPS]
    assert not pipe.transformer._forward_pre_hooks


def test_a_disabled_guider_does_not_guide():
    model = MODULAR["wan"]
    pipe = model.build()
    ours = guider(ClassifierFreeGuidance(SCALE), pipe.scheduler)
    ours.disable()
    with counted(pipe, model.case) as rows:
        found = model.call(pipe, ours)
    assert len(rows) == STEPS
    assert torch.equal(found, model.call(pipe, guider(Cutoff(steps=0), pipe.scheduler)))


def test_a_compiled_denoiser_works_unless_compiled_in_place():
    model = MODULAR["wan"]
    pipe = model.build()
    expected = model.call(pipe, guider(Cutoff(SCALE, 2), pipe.scheduler))
    plain = pipe.transformer
    pipe.transformer = torch.compile(plain, backend="eager")
    assert torch.equal(model.call(pipe, guider(Cutoff(SCALE, 2), pipe.scheduler)), expected)
    pipe.transformer = plain
    plain.compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match="compiled in place"):
        model.call(pipe, guider(Cutoff(SCALE, 2), pipe.scheduler))


def test_predictions_that_are_not_finite_stop_the_run():
    model = MODULAR["wan"]
    pipe = model.build()
    ours = guider(Failing(3, float("nan")), pipe.scheduler)
    with pytest.raises(ValueError, match="NaN or infinite prediction at step 3 of 6"):
        model.call(pipe, ours)


def test_what_a_guider_cannot_do_is_refused():
    model = MODULAR["wan"]
    pipe = model.build()
    with pytest.raises(ValueError, match="first-order samplers, and UniPCMultistepScheduler"):
        model.call(pipe, guider(CFGPlusPlus(), pipe.scheduler))
    with pytest.raises(TypeError, match="Guide"):
        guider("cfg", pipe.scheduler)
    with pytest.raises(UnsupportedModelError, match="neither sigmas nor alphas_cumprod"):
        guider(Remembering(), diffusers.VQDiffusionScheduler(num_vec_classes=4))
    other = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(StateError, match="scheduler of the pipeline"):
        model.call(pipe, guider(Remembering(), other))
    other.set_timesteps(5)
    with pytest.raises(StateError, match="is at timestep 999, which"):
        model.call(pipe, guider(Remembering(), other))
    pipe.transformer.__class__ = type("Other", (type(pipe.transformer),), {})
    with pytest.raises(UnsupportedModelError, match=r"Other.*hook on its input is missing"):
        model.call(pipe, guider(Remembering(), pipe.scheduler))
    pipe = MODULAR["qwen"].build()
    with pytest.raises(ValueError, match="no unconditional encoder_hidden_states"):
        nothing = {"negative_prompt_embeds": None, "negative_prompt_embeds_mask": None}
        MODULAR["qwen"].call(pipe, guider(Remembering(), pipe.scheduler), **nothing)
