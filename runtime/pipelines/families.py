"""The pipelines of diffusers whose denoising loops are known, as data: where the denoiser is and how the loop calls it.

This is the one place that knows pipelines. To add one, read its loop and add it to FAMILIES, or its denoiser to
DENOISERS if the loop asks a guider; its test goes to tests/runtime/test_guided.py or test_guiders.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hasten.errors import UnsupportedModelError
from hasten.guidance.diffusion.guide import Pass

# The loops below were read in the first of these versions; from the second on they may differ.
DIFFUSERS = ("0.42", "0.43")


def _identity(prediction: torch.Tensor) -> torch.Tensor:
    return prediction


def _no_rescale(pipe: Any, prediction: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    return prediction


def _rescale_deviation(pipe: Any, prediction: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    """`guidance_rescale`: pulls the standard deviation towards the conditional one's (Lin et al. 2023, arXiv
    2305.08891, section 3.4).
    """
    share = getattr(pipe, "guidance_rescale", 0.0)  # some of the loops have none
    if share == 0:
        return prediction
    axes = list(range(1, prediction.ndim))
    ratio = conditional.std(dim=axes, keepdim=True) / prediction.std(dim=axes, keepdim=True)
    return share * (prediction * ratio) + (1 - share) * prediction


def _rescale_tokens(pipe: Any, prediction: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    """Qwen-Image gives every token of [B, tokens, channels] the norm of the conditional prediction."""
    norms = torch.norm(conditional, dim=-1, keepdim=True) / torch.norm(prediction, dim=-1, keepdim=True)
    return prediction * norms


def _limit_norm(pipe: Any, prediction: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    """Z-Image's `cfg_normalization`: the norm of each row at most so many times the conditional one's."""
    limit = float(pipe._cfg_normalization or 0)
    if limit <= 0:
        return prediction
    axes = list(range(1, prediction.ndim))
    most = limit * torch.linalg.vector_norm(conditional, dim=axes, keepdim=True)
    norm = torch.linalg.vector_norm(prediction, dim=axes, keepdim=True)
    return torch.where(norm > most, prediction * (most / norm), prediction)


def _z_image(outputs: list[torch.Tensor]) -> torch.Tensor:
    """Z-Image predicts x0 - noise, a list of [C, 1, H, W]; its scheduler gets noise - x0 in float32, [B, C, H, W]."""
    return -torch.stack([output.float() for output in outputs]).squeeze(2)


@dataclass(frozen=True)
class Family:
    """How the denoising loop of some pipelines calls its denoiser.

    denoisers: the attributes of the pipeline where denoisers are; each present one is wrapped.
    layout: "batched", one call a step with the passes of `order` along the batch, or "sequential", one call for each
        pass, in that order.
    order: the passes that the loop computes where guidance is on.
    input: the name of the denoiser's argument that holds x_t, its first.
    beside: the attributes of models that the loop calls before the denoiser with the same batch (ControlNets).
    lists: batched inputs and outputs are lists with one entry for a row; otherwise tensors with the rows along their
        first dimension.
    more_channels: after the sample's channels (dimension 1) the denoiser's input holds others.
    to_sample: what the loop does to a denoiser's prediction before the scheduler gets it, guidance aside.
    rescale: what the loop does to a guided prediction after guidance.
    off: how a call without unconditional pass comes about, for the error.
    """

    denoisers: tuple[str, ...]
    layout: Literal["batched", "sequential"]
    order: tuple[Pass, ...]
    input: str = "hidden_states"
    beside: tuple[str, ...] = ()
    lists: bool = False
    more_channels: bool = False
    to_sample: Callable[[Any], torch.Tensor] = _identity
    rescale: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor] = _no_rescale
    off: str = "guidance_scale of at most 1"


_UNCONDITIONAL_FIRST: tuple[Pass, ...] = ("unconditional", "conditional")
_CONDITIONAL_FIRST: tuple[Pass, ...] = ("conditional", "unconditional")
_NO_TRUE_CFG = (
    "true_cfg_scale of at most 1 or no negative prompt; "
    "guidance_scale is an input of the distilled model and no guidance"
)

_UNET = Family(
    ("unet",), "batched", _UNCONDITIONAL_FIRST, input="sample", beside=("controlnet",), rescale=_rescale_deviation
)
_PIX2PIX = Family(
    ("unet",),
    "batched",
    ("conditional", "image", "unconditional"),
    input="sample",
    more_channels=True,
    off="guidance_scale of at most 1 or image_guidance_scale below 1",
)
_SD3 = Family(("transformer",), "batched", _UNCONDITIONAL_FIRST)
_TRUE_CFG = Family(("transformer",), "sequential", _CONDITIONAL_FIRST, off=_NO_TRUE_CFG)
_QWEN = Family(("transformer",), "sequential", _CONDITIONAL_FIRST, rescale=_rescale_tokens, off=_NO_TRUE_CFG)
_WAN = Family(("transformer", "transformer_2"), "sequential", _CONDITIONAL_FIRST)
_Z_IMAGE = Family(
    ("transformer",),
    "batched",
    _CONDITIONAL_FIRST,
    input="x",
    lists=True,
    to_sample=_z_image,
    rescale=_limit_norm,
    off="guidance_scale of 0 (Z-Image counts from 0) or a cfg_truncation below 1: "
    "which steps are guided is for the guide to say",
)

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": _UNET,
    "StableDiffusionImg2ImgPipeline": _UNET,
    "StableDiffusionControlNetPipeline": _UNET,
    "StableDiffusionXLPipeline": _UNET,
    "StableDiffusionInstructPix2PixPipeline": _PIX2PIX,
    "StableDiffusion3Pipeline": _SD3,
    "FluxPipeline": _TRUE_CFG,
    "HunyuanVideoPipeline": _TRUE_CFG,
    "QwenImagePipeline": _QWEN,
    "WanPipeline": _WAN,
    "ZImagePipeline": _Z_IMAGE,
}

# The denoisers of modular pipelines whose loops ask a guider, and the argument that holds x_t: the first channels or
# tokens along its dimension 1, or a list with one entry for a row.
DENOISERS: dict[str, str] = {
    "QwenImageTransformer2DModel": "hidden_states",
    "SD3Transformer2DModel": "hidden_states",
    "UNet2DConditionModel": "sample",
    "WanTransformer3DModel": "hidden_states",
    "ZImageTransformer2DModel": "x",
}


def family_of(pipe: Any) -> Family:
    """How the loop of a pipeline calls its denoiser; a subclass that keeps its parent's `__call__` has its loop.

    Raises:
        UnsupportedModelError: the loop is not known, which names what is missing, or the pipeline is distilled and has
            no unconditional pass.
    """
    kind = type(pipe).__name__
    owner = next((base.__name__ for base in type(pipe).__mro__ if "__call__" in vars(base)), kind)
    if owner not in FAMILIES:
        if not any(getattr(pipe, name, None) is not None for name in ("unet", "transformer")):
            reason = "it has no denoiser to hook: neither unet nor transformer"
        elif not callable(getattr(getattr(pipe, "scheduler", None), "step", None)):
            reason = "it has no scheduler whose step could be hooked"
        elif hasattr(pipe, "guider"):
            raise UnsupportedModelError(
                "", kind, "its loop asks a guider", "give it hasten.guider(guide, pipe.scheduler)"
            )
        else:
            reason = (
                "the hook on its denoiser is missing: "
                "hasten.pipelines.families.FAMILIES does not say how this loop calls it"
            )
        raise UnsupportedModelError("", kind, reason, f"use one of {', '.join(FAMILIES)}, or add it there")
    family = FAMILIES[owner]
    unet = getattr(pipe, "unet", None)
    if unet is not None and getattr(unet.config, "time_cond_proj_dim", None) is not None:
        raise UnsupportedModelError(
            "unet",
            type(unet).__name__,
            "it is distilled (time_cond_proj_dim): the guidance scale is an input, "
            "and the pipeline makes no unconditional pass to guide with",
            "use the model it was distilled from",
        )
    return family
