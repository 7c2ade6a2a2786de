"""What guided pipelines refuse, by name and with the reason; afterwards the pipeline is what it was."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from guide_doubles import Asking, Plain
from tiny_pipelines import FLUX, SD, SD3, SDXL, WAN, Z_IMAGE, call, flux, modular, stable_diffusion, unet, untouched

from hasten.errors import HastenError, StateError, UnsupportedModelError
from hasten.guidance.diffusion.guide import Guide
from hasten.pipelines import guided as guided_pipelines
from hasten.pipelines.families import DIFFUSERS
from hasten.pipelines.guided import guided


def refusal(pipe, case, guide=None, error=ValueError, match="", **changes):
    with pytest.raises(error, match=match), guided(pipe, guide or Plain()):
        call(pipe, case, **changes)
    assert untouched(pipe, case)


def test_a_call_without_an_unconditional_pass_is_refused_where_the_guide_needs_one():
    pipe = SD.build()
    refusal(pipe, SD, match="step 0: .* needs the unconditional prediction", guidance_scale=1.0)
    with guided(pipe, Plain(stop=0)):
        assert torch.isfinite(call(pipe, SD, guidance_scale=1.0)).all()
    refusal(Z_IMAGE.build(), Z_IMAGE, match="cfg_truncation", guidance_scale=0.0)
    refusal(Z_IMAGE.build(), Z_IMAGE, match="step 5: .* cfg_truncation", cfg_truncation=0.5)


def test_a_distilled_model_without_unconditional_pass_is_refused():
    refusal(flux(guidance_embeds=True), FLUX, match="input of the distilled model", true_cfg_scale=1.0)
    distilled = stable_diffusion(unet=unet(time_cond_proj_dim=4))
    with pytest.raises(UnsupportedModelError, match="time_cond_proj_dim"), guided(distilled, Plain()):
        pass


def test_pipelines_that_are_not_known_say_which_hook_is_missing():
    other = diffusers.DDPMPipeline(unet=unet(), scheduler=diffusers.DDPMScheduler())
    with pytest.raises(UnsupportedModelError, match="hook on its denoiser is missing"), guided(other, Plain()):
        pass
    with pytest.raises(UnsupportedModelError, match="neither unet nor transformer"), guided(object(), Plain()):
        pass


def test_a_pipeline_that_asks_a_guider_is_told_to_take_one():
    asking = modular(WanCoreDenoiseStep, WAN)
    with pytest.raises(UnsupportedModelError, match=r"hasten\.guider"), guided(asking, Plain()):
        pass


def test_other_versions_of_diffusers_are_warned_of_and_its_absence_is_an_error(monkeypatch):
    pipe = SD.build()
    monkeypatch.setattr(guided_pipelines, "version", lambda name: DIFFUSERS[1])
    with pytest.warns(UserWarning, match=f"installed is {DIFFUSERS[1]}"), guided(pipe, Plain()):
        pass

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(guided_pipelines, "version", absent)
    with pytest.raises(HastenError, match=r"hasten\[diffusers\]"), guided(pipe, Plain()):
        pass


def test_a_subclass_with_its_parents_loop_is_known_and_one_with_its_own_is_not():
    class Same(diffusers.StableDiffusionPipeline):
        pass

    class Other(diffusers.StableDiffusionPipeline):
        def __call__(self):
            pass

    pipe = SD.build()
    expected = call(pipe, SD)
    same = Same(**pipe.components, requires_safety_checker=False)
    with guided(same, Plain()):
        assert torch.equal(call(same, SD), expected)
    with pytest.raises(UnsupportedModelError, match="Other"), guided(Other(**pipe.components), Plain()):
        pass


def test_bad_guides_are_refused():
    pipe = SD.build()
    with pytest.raises(TypeError, match="Guide"), guided(pipe, lambda step: step.conditional):
        pass
    refusal(pipe, SD, Asking(("unconditional",)), match="conditional pass is always")
    refusal(pipe, SD, Asking(("conditional", "image")), match="makes .*unconditional")

    class Flat(Guide):
        def __call__(self, step):
            return step.conditional[0]

    refusal(pipe, SD, Flat(), match=r"returned \(4, 8, 8\), expected a tensor \(1, 4, 8, 8\)")


def test_a_pipeline_is_guided_once():
    pipe = SD.build()
    with guided(pipe, Plain()):
        with pytest.raises(StateError, match="guided already"), guided(pipe, Plain()):
            pass
        assert torch.isfinite(call(pipe, SD)).all()
    assert untouched(pipe, SD)


def test_a_denoiser_is_guided_as_part_of_one_pipeline():
    pipe = SD.build()
    other = diffusers.StableDiffusionPipeline(
        **{**pipe.components, "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)},
        requires_safety_checker=False,
    )
    with guided(pipe, Plain()):
        with pytest.raises(StateError, match="UNet2DConditionModel is guided already"), guided(other, Plain()):
            pass
        assert untouched(other, SD) is False and "step" not in vars(other.scheduler)
        assert torch.isfinite(call(pipe, SD)).all()
    assert untouched(pipe, SD) and untouched(other, SD)


def test_a_cache_across_steps_is_refused():
    pipe = FLUX.build()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(StateError, match=r"transformer\.disable_cache"), guided(pipe, Plain()):
        pass
    pipe.transformer.disable_cache()
    with guided(pipe, Plain()):
        assert torch.isfinite(call(pipe, FLUX)).all()


def test_what_the_loop_would_do_otherwise_is_refused():
    pipe = SDXL.build()
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    refusal(pipe, SDXL, match="stops before its last step", denoising_end=0.5)
    refusal(
        SD3.build(),
        SD3,
        match="skip_guidance_layers",
        skip_guidance_layers=[0],
        skip_layer_guidance_start=0.0,
    )
    pipe = SD.build()
    with pytest.raises(StateError, match="scheduler was replaced"), guided(pipe, Plain()):
        pipe.scheduler = diffusers.DDIMScheduler()
        call(pipe, SD)
