"""Guided pipelines: what is computed, what comes out, and that the pipeline is afterwards what it was. Real loops, tiny
random weights.
"""

from __future__ import annotations

import inspect
import types
from dataclasses import replace

import pytest
import torch
from guide_doubles import Aim, Failing, Plain, Remembering, Samples
from tiny_pipelines import (
    CASES,
    FLUX,
    QWEN,
    SCALE,
    SD,
    SD3,
    SDXL,
    STEPS,
    WAN,
    Z_IMAGE,
    call,
    counted,
    prompts,
    randn,
    stable_diffusion,
    untouched,
)

from hasten.pipelines.guided import guided

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@EVERY
@pytest.mark.parametrize("batch", [1, 2])
def test_plain_guidance_equals_the_unmodified_pipeline(case, batch):
    pipe = case.build()
    expected = call(pipe, case, batch)
    with counted(pipe, case) as rows, guided(pipe, Plain()) as run:
        found = call(pipe, case, batch)
    assert sum(rows) == 2 * batch * STEPS == run.evaluations.rows == run.evaluations.full
    assert torch.linalg.vector_norm(found - expected) <= case.tolerance * torch.linalg.vector_norm(expected)


@EVERY
@pytest.mark.parametrize("batch", [1, 2])
def test_stop_at_step_k_computes_2k_and_then_one_pass(case, batch):
    pipe, stop = case.build(), 2
    with counted(pipe, case) as rows, guided(pipe, Plain(stop=stop)) as run:
        call(pipe, case, batch)
    assert sum(rows) == batch * (2 * stop + STEPS - stop) == run.evaluations.rows
    assert len(rows) == run.evaluations.calls
    assert [step_rows for step_rows, _ in run.evaluations.per_step] == [2 * batch] * stop + [batch] * (STEPS - stop)


@EVERY
def test_conditional_alone_equals_the_pipeline_without_guidance(case):
    pipe = case.build()
    name = "true_cfg_scale" if "true_cfg_scale" in case.arguments(1) else "guidance_scale"
    expected = call(pipe, case, 2, **{name: 0.0 if case is Z_IMAGE else 1.0})
    with guided(pipe, Plain(stop=0)):
        found = call(pipe, case, 2)
    assert torch.equal(found, expected)


def test_a_stop_equals_the_switch_of_the_pipelines_own_callback():
    def switch(pipe, index, timestep, tensors):
        if index == 1:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    pipe = SD.build()
    expected = call(
        pipe, SD, 2, callback_on_step_end=switch, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]
    )
    with guided(pipe, Plain(stop=2)):
        found = call(pipe, SD, 2)
    assert torch.equal(found, expected)


@EVERY
def test_the_prediction_is_exact_in_every_parameterization(case):
    """x0 said from sample, alpha, sigma and parameterization is where the pipeline ends."""
    pipe = case.build()
    with guided(pipe, Plain()):
        target = torch.ones_like(call(pipe, case))
    if pipe.__class__.__name__ in ("FluxPipeline", "QwenImagePipeline", "WanPipeline", "HunyuanVideoPipeline"):
        target = torch.linspace(-1, 1, target.numel()).reshape(target.shape)
    aim = Aim(target)
    with guided(pipe, aim, rescale=False):
        found = call(pipe, case)
    torch.testing.assert_close(found, target, rtol=0, atol=1e-4)
    aim.check_noise()


@EVERY
def test_passes_see_the_sample_that_the_scheduler_has(case):
    pipe, seen = case.build(), Samples()
    with guided(pipe, seen):
        call(pipe, case, 2)
    assert len(seen.before) == STEPS
    for before, exact in zip(seen.before, seen.exact, strict=True):
        torch.testing.assert_close(before, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [SD, SD3, FLUX, WAN], ids=["sd", "sd3", "flux", "wan"])
def test_half_precision_is_kept(case):
    pipe = case.build().to(torch.bfloat16)
    half = {name: value.bfloat16() for name, value in case.arguments(1).items() if torch.is_tensor(value)}
    expected = call(pipe, case, **half)
    seen = Samples()
    with guided(pipe, Plain()):
        assert torch.equal(call(pipe, case, **half), expected)
    with guided(pipe, seen):
        assert call(pipe, case, **half).dtype == expected.dtype
    for before, exact in zip(seen.before, seen.exact, strict=True):
        torch.testing.assert_close(before.float(), exact.float(), rtol=0.02, atol=0.02)


@EVERY
def test_the_pipeline_is_afterwards_what_it_was(case):
    pipe = case.build()
    expected = call(pipe, case)
    with pytest.raises(KeyError, match="lost"), guided(pipe, Failing(at=2)):
        call(pipe, case)
    assert untouched(pipe, case)
    with guided(pipe, Plain(stop=1)):
        call(pipe, case)
    assert untouched(pipe, case)
    assert torch.equal(call(pipe, case), expected)


def test_the_scheduler_keeps_its_signatures():
    pipe = SD.build()
    expected = inspect.signature(pipe.scheduler.step)
    with guided(pipe, Plain()):
        assert inspect.signature(pipe.scheduler.step) == expected


@pytest.mark.parametrize("case", [SD, FLUX], ids=["batched", "sequential"])
def test_calls_in_one_block_are_independent(case):
    pipe = case.build()
    with guided(pipe, Remembering()) as run:
        first, second = call(pipe, case), call(pipe, case)
    with guided(pipe, Remembering()):
        alone = call(pipe, case)
    assert torch.equal(first, second) and torch.equal(first, alone)
    assert [step["call"] for step in run.trace] == [0] * STEPS + [1] * STEPS


@pytest.mark.parametrize("where", ["between steps", "in a step"])
def test_a_call_after_one_that_failed_starts_anew(where):
    pipe = SD.build()
    expected = call(pipe, SD)
    with guided(pipe, Plain()) as run:
        if where == "in a step":
            hook = pipe.unet.conv_out.register_forward_hook(_fail)
            with pytest.raises(RuntimeError, match="stop here"):
                call(pipe, SD)
            hook.remove()
        else:
            with pytest.raises(RuntimeError, match="stop here"):
                call(pipe, SD, callback_on_step_end=_fail_at_2)
        assert torch.equal(call(pipe, SD), expected)
    assert [len(record.steps) for record in run.pipeline_calls] == [0 if where == "in a step" else 3, STEPS]


def _fail(*_):
    raise RuntimeError("stop here")


def _fail_at_2(pipe, index, timestep, tensors):
    if index == 2:
        _fail()
    return tensors


def test_a_forward_that_is_put_on_between_calls_is_wrapped_again_and_stays():
    """As offloading does after each call of a pipeline."""
    pipe = SD.build()
    with guided(pipe, Plain(stop=1)) as run:
        first = call(pipe, SD)
        theirs = types.MethodType(type(pipe.unet).forward, pipe.unet)
        pipe.unet.forward = theirs
        assert torch.equal(call(pipe, SD), first)
    assert run.evaluations.rows == 2 * (2 + STEPS - 1)
    assert vars(pipe.unet)["forward"] is theirs


@pytest.mark.parametrize("case", [SD, FLUX], ids=["batched", "sequential"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_stop_the_run(case, value):
    pipe = case.build()
    with (
        pytest.raises(ValueError, match="NaN or infinite prediction at step 3 of 6"),
        guided(pipe, Failing(3, value)) as run,
    ):
        call(pipe, case)
    assert len(run.trace) == 3 and untouched(pipe, case)


@pytest.mark.parametrize("case", [SD, SDXL], ids=["sd", "sdxl"])
def test_guidance_rescale_is_the_pipelines(case):
    pipe = case.build()
    expected = call(pipe, case, 2, guidance_rescale=0.7)
    plain = call(pipe, case, 2)
    with guided(pipe, Plain()):
        assert torch.equal(call(pipe, case, 2, guidance_rescale=0.7), expected)
    with guided(pipe, Plain(), rescale=False):
        assert torch.equal(call(pipe, case, 2, guidance_rescale=0.7), plain)
    assert not torch.equal(expected, plain)
    alone = call(pipe, case, 2, guidance_scale=1.0, guidance_rescale=0.7)
    with guided(pipe, Plain(stop=0)):
        assert torch.equal(call(pipe, case, 2, guidance_rescale=0.7), alone)


def test_norms_of_qwen_image_and_z_image_are_the_pipelines():
    pipe = Z_IMAGE.build()
    expected = call(pipe, Z_IMAGE, 2, cfg_normalization=0.5)
    with guided(pipe, Plain()):
        found = call(pipe, Z_IMAGE, 2, cfg_normalization=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    pipe = QWEN.build()
    with guided(pipe, Plain(), rescale=False):
        assert not torch.equal(call(pipe, QWEN), call(QWEN.build(), QWEN))


def test_image_to_image_begins_in_the_middle():
    pipe = stable_diffusion("StableDiffusionImg2ImgPipeline")
    case = replace(SD, arguments=lambda batch: prompts(batch, (3, 8), guidance_scale=SCALE, strength=0.5))
    picture = randn(1, 3, 16, 16, seed=3).sigmoid()
    expected = call(pipe, case, image=picture)
    with guided(pipe, Plain()) as run:
        assert torch.equal(call(pipe, case, image=picture), expected)
    assert len(run.trace) == STEPS // 2
    with guided(pipe, Aim(torch.ones_like(expected))):
        found = call(pipe, case, image=picture)
    torch.testing.assert_close(found, torch.ones_like(expected), rtol=0, atol=1e-4)


def test_a_base_model_may_stop_before_the_end():
    pipe = SDXL.build()
    expected = call(pipe, SDXL, denoising_end=0.5)
    with guided(pipe, Plain()) as run:
        assert torch.equal(call(pipe, SDXL, denoising_end=0.5), expected)
    assert len(run.trace) == STEPS // 2
    seen = Samples()
    with guided(pipe, seen):
        call(pipe, SDXL, denoising_end=0.5)
    assert len(seen.exact) == STEPS // 2


@pytest.mark.parametrize(
    ("case", "in_place"), [(SD3, False), (FLUX, True)], ids=["batched, torch.compile", "sequential, module.compile"]
)
def test_compiled_denoisers_work(case, in_place):
    pipe = case.build()
    name = case.denoisers[0]
    with guided(pipe, Plain(stop=2)):
        expected = call(pipe, case)
    if in_place:
        getattr(pipe, name).compile(backend="eager")
    else:
        setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager"))
    before = dict(vars(getattr(pipe, name)))
    with guided(pipe, Plain(stop=2)) as run:
        found = call(pipe, case)
    assert torch.equal(found, expected)
    assert run.evaluations.rows == 2 * 2 + STEPS - 2
    assert vars(getattr(pipe, name)).get("forward") is before.get("forward")
    assert getattr(pipe, name)._compiled_call_impl is before.get("_compiled_call_impl")


def test_the_trace_holds_what_the_guide_recorded():
    pipe = SD.build()
    with guided(pipe, Plain(stop=2)) as run:
        call(pipe, SD, 2)
    assert [step["rows"] for step in run.trace] == [4, 4, 2, 2, 2, 2]
    assert [step["step"] for step in run.trace] == list(range(STEPS))
    assert run.trace[0]["scale"] == SCALE and len(run.trace[0]["norms"]) == 2 and "scale" not in run.trace[2]
    sigmas = [step["sigma"] for step in run.trace]
    assert sigmas == sorted(sigmas, reverse=True)
    assert run.seconds > 0
    assert "Plain(scale=3.0, stop=2) on StableDiffusionPipeline" in str(run) and "DDIMScheduler" in str(run)


def test_the_figure_shows_rows_and_what_was_recorded():
    pytest.importorskip("matplotlib")
    pipe = SD.build()
    with guided(pipe, Plain(stop=2)) as run:
        call(pipe, SD, 2)
        call(pipe, SD, 2)
    figure = run.plot()
    assert [panel.get_ylabel() for panel in figure.axes] == [
        *("rows", "conditional_norm", "cosine", "norms", "scale", "sigma", "update_norm"),
    ]
    assert list(figure.axes[0].lines[1].get_ydata()) == [4, 4, 2, 2, 2, 2]
