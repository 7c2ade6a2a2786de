"""Guided pipelines with more conditions than a prompt: ControlNets, IP-Adapters, and an image with a scale
of its own.
"""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from guide_doubles import Plain, Samples
from tiny_pipelines import SCALE, SD, STEPS, call, counted, prompts, randn, stable_diffusion, unet

from hasten.guidance.diffusion.classifier_free import TwoScaleGuidance
from hasten.pipelines.guided import guided

BATCHES = pytest.mark.parametrize("batch", [1, 2])
COUNTED_CONTROLNET = replace(SD, first="conv_in", denoisers=("controlnet",))


def lively(model: torch.nn.Module, std: float) -> torch.nn.Module:
    """Random weights all over: tiny models of few steps hardly notice their conditions otherwise."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval().requires_grad_(False)


def controlnet() -> diffusers.ControlNetModel:
    model = diffusers.ControlNetModel(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        layers_per_block=1,
        in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(4, 8),
    )
    return lively(model, 0.1)


def with_controlnets(count: int):
    nets = [controlnet() for _ in range(count)]
    return stable_diffusion("StableDiffusionControlNetPipeline", controlnet=nets[0] if count == 1 else nets)


def control(batch: int, count: int = 1) -> dict:
    pictures = [randn(batch, 3, 16, 16, seed=20 + i).sigmoid() for i in range(count)]
    return {"image": pictures[0]} if count == 1 else {"image": pictures, "controlnet_conditioning_scale": [1.0, 0.5]}


@BATCHES
@pytest.mark.parametrize("guess_mode", [False, True], ids=["both", "guess"])
def test_a_controlnet_runs_for_the_passes_that_are_computed(batch, guess_mode):
    pipe = with_controlnets(1)
    inputs = {**control(batch), "guess_mode": guess_mode}
    expected = call(pipe, SD, batch, **inputs)
    assert not torch.equal(expected, call(pipe, SD, batch, **{**inputs, "image": 1 - inputs["image"]}))
    with guided(pipe, Plain()):
        assert torch.equal(call(pipe, SD, batch, **inputs), expected)
    with counted(pipe, SD) as rows, counted(pipe, COUNTED_CONTROLNET) as beside, guided(pipe, Plain(stop=2)):
        call(pipe, SD, batch, **inputs)
    assert rows == [2 * batch] * 2 + [batch] * (STEPS - 2)
    assert beside == ([batch] * STEPS if guess_mode else rows)
    assert "forward" not in vars(pipe.controlnet)


@pytest.mark.parametrize("count", [1, 2], ids=["one", "two"])
def test_controlnets_of_the_conditional_pass_alone_equal_no_guidance(count):
    pipe = with_controlnets(count)
    expected = call(pipe, SD, 2, guidance_scale=1.0, **control(2, count))
    with guided(pipe, Plain(stop=0)):
        assert torch.equal(call(pipe, SD, 2, **control(2, count)), expected)


def with_ip_adapter():
    model = unet()
    for name in model.attn_processors:
        if name.endswith("attn2.processor"):
            layer = model.get_submodule(name.removesuffix(".processor"))
            layer.set_processor(lively(IPAdapterAttnProcessor2_0(8, cross_attention_dim=8, num_tokens=(2,)), 0.5))
    projection = ImageProjection(image_embed_dim=6, cross_attention_dim=8, num_image_text_embeds=2)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([lively(projection, 0.5)])
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return stable_diffusion(unet=model)


@BATCHES
@pytest.mark.parametrize("pictures", [1, 2], ids=["one picture", "two pictures"])
def test_an_ip_adapter_gets_the_embeddings_of_the_passes_that_are_computed(batch, pictures):
    """The loop repeats [unconditional; conditional] embeddings for its batch; of two pictures it then has twice as many
    rows as of x_t.
    """
    pipe, both = with_ip_adapter(), randn(2 * pictures, 1, 6, seed=30)
    expected = call(pipe, SD, batch, ip_adapter_image_embeds=[both])
    assert not torch.equal(expected, call(pipe, SD, batch, ip_adapter_image_embeds=[both.flip(0)]))
    with guided(pipe, Plain()):
        assert torch.equal(call(pipe, SD, batch, ip_adapter_image_embeds=[both]), expected)
    alone = call(pipe, SD, batch, guidance_scale=1.0, ip_adapter_image_embeds=[both[pictures:]])
    with counted(pipe, SD) as rows, guided(pipe, Plain(stop=0)):
        assert torch.equal(call(pipe, SD, batch, ip_adapter_image_embeds=[both]), alone)
    assert rows == [batch] * STEPS


def with_image():
    pipe = stable_diffusion("StableDiffusionInstructPix2PixPipeline", unet=lively(unet(in_channels=8), 0.2))
    pipe.vae.register_to_config(scaling_factor=1.0)
    arguments = {"image_guidance_scale": 2.0, "image": randn(1, 3, 16, 16, seed=40).sigmoid()}
    return pipe, replace(SD, arguments=lambda batch: prompts(batch, (3, 8), guidance_scale=SCALE, **arguments))


@pytest.mark.parametrize(
    ("image_scale", "passes"), [(2.0, 3), (SCALE, 2), (1.0, 2)], ids=["three", "no image", "no unconditional"]
)
def test_two_scales_compute_what_does_not_cancel(image_scale, passes):
    pipe, case = with_image()
    expected = call(pipe, case, image_guidance_scale=image_scale)
    with counted(pipe, case) as rows, guided(pipe, TwoScaleGuidance(image_scale, SCALE)) as run:
        found = call(pipe, case)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert rows == [passes] * STEPS
    assert run.evaluations.full == 3 * STEPS


def test_passes_see_the_sample_without_the_image():
    (pipe, case), seen = with_image(), Samples()
    with guided(pipe, seen):
        call(pipe, case)
    for before, exact in zip(seen.before, seen.exact, strict=True):
        torch.testing.assert_close(before, exact)
