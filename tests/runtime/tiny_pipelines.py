"""Pipelines of diffusers with tiny random weights, built from configurations, and the arguments of a call that needs no
text encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

STEPS = 6


@dataclass(frozen=True)
class Case:
    """build() makes the pipeline; arguments(batch) those of a guided call; first names the layer that every evaluation
    of a denoiser runs first.
    """

    build: Callable[[], Any]
    arguments: Callable[[int], dict[str, Any]]
    first: str
    denoisers: tuple[str, ...] = ("transformer",)
    tolerance: float = 0.0  # of plain CFG from the unmodified pipeline, relative; 0 is bit for bit


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(pipe, case: Case, batch: int = 1, steps: int = STEPS, seed: int = 0, **changes) -> torch.Tensor:
    """The latents of one call of the pipeline."""
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    return pipe(**{**arguments, **case.arguments(batch), **changes}, return_dict=False)[0]


@contextmanager
def counted(pipe, case: Case):
    """Rows of every evaluation that reaches the first layer of a denoiser, counted without the code under test."""
    rows: list[int] = []
    layers = [
        getattr(pipe, name).get_submodule(case.first) for name in case.denoisers if getattr(pipe, name) is not None
    ]
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: rows.append(len(inputs[0]))) for layer in layers]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def untouched(pipe, case: Case) -> bool:
    """No wrapper is left on a denoiser or on the scheduler."""
    owners = [getattr(pipe, name) for name in case.denoisers] + [pipe.scheduler]
    return not any({"forward", "step", "set_timesteps"} & set(vars(owner)) for owner in owners)


def unet(**changes) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    settings = {
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "layers_per_block": 1,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
    }
    return diffusers.UNet2DConditionModel(**{**settings, **changes}).eval().requires_grad_(False)


def vae() -> diffusers.AutoencoderKL:
    torch.manual_seed(1)
    settings = {
        "block_out_channels": [4, 8],
        "norm_num_groups": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 4,
    }
    return diffusers.AutoencoderKL(**settings).eval().requires_grad_(False)


def stable_diffusion(kind: str = "StableDiffusionPipeline", scheduler: Any = None, **parts) -> Any:
    """A pipeline of the Stable Diffusion family. scheduler: an instance, or DDIM."""
    scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    return getattr(diffusers, kind)(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=parts.pop("unet", None) or unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )


def sdxl() -> Any:
    denoiser = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
        cross_attention_dim=8,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=denoiser,
        scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1),
        add_watermarker=False,
    )


def sd3() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    return diffusers.StableDiffusion3Pipeline(
        transformer=_lively(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(names),
    )


def flux(guidance_embeds: bool = False) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance_embeds,
    )
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return diffusers.FluxPipeline(
        transformer=_lively(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(names),
    )


def qwen_image() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.QwenImagePipeline(
        transformer=_lively(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
    )


def wan_transformer(seed: int) -> diffusers.WanTransformer3DModel:
    torch.manual_seed(seed)
    return _lively(
        diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=8,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=32,
        )
    )


def wan(second: bool = False) -> Any:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        transformer=wan_transformer(0),
        transformer_2=wan_transformer(1) if second else None,
        boundary_ratio=0.7 if second else None,
    )


def hunyuan_video() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    )
    names = ("text_encoder", "tokenizer", "vae", "text_encoder_2", "tokenizer_2")
    return diffusers.HunyuanVideoPipeline(
        transformer=_lively(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        **dict.fromkeys(names),
    )


def z_image() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[2, 2, 4],
        axes_lens=[64, 16, 16],
    )
    return diffusers.ZImagePipeline(
        transformer=_lively(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
    )


def _lively(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights in place of those that start at 0 or 1 and would let every prompt predict the same."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def prompts(batch: int, shape: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """Embeddings of prompts and of negative prompts [batch, *shape]."""
    return {
        "prompt_embeds": randn(batch, *shape, seed=10),
        "negative_prompt_embeds": randn(batch, *shape, seed=11),
        **more,
    }


def pooled(batch: int) -> dict[str, torch.Tensor]:
    return {
        "pooled_prompt_embeds": randn(batch, 8, seed=12),
        "negative_pooled_prompt_embeds": randn(batch, 8, seed=13),
    }


SCALE = 3.0
SD = Case(
    stable_diffusion,
    lambda batch: prompts(batch, (3, 8), guidance_scale=SCALE, height=16, width=16),
    "conv_in",
    ("unet",),
)
SDXL = Case(
    sdxl,
    lambda batch: prompts(batch, (3, 8), guidance_scale=SCALE, height=16, width=16, **pooled(batch)),
    "conv_in",
    ("unet",),
)
SD3 = Case(
    sd3,
    lambda batch: prompts(batch, (3, 8), guidance_scale=SCALE, height=64, width=64, **pooled(batch)),
    "pos_embed",
)
FLUX = Case(
    flux,
    lambda batch: prompts(batch, (3, 8), true_cfg_scale=SCALE, height=64, width=64, **pooled(batch)),
    "x_embedder",
)
QWEN = Case(
    qwen_image,
    lambda batch: prompts(
        batch,
        (3, 8),
        true_cfg_scale=SCALE,
        height=64,
        width=64,
        prompt_embeds_mask=torch.ones(batch, 3, dtype=torch.long),
        negative_prompt_embeds_mask=torch.ones(batch, 3, dtype=torch.long),
    ),
    "img_in",
)
WAN = Case(
    wan,
    lambda batch: prompts(batch, (3, 8), guidance_scale=SCALE, height=32, width=32, num_frames=5),
    "patch_embedding",
)
WAN_2 = Case(lambda: wan(second=True), WAN.arguments, WAN.first, ("transformer", "transformer_2"))
HUNYUAN = Case(
    hunyuan_video,
    lambda batch: prompts(
        batch,
        (3, 8),
        true_cfg_scale=SCALE,
        height=32,
        width=32,
        num_frames=5,
        prompt_attention_mask=torch.ones(batch, 3),
        negative_prompt_attention_mask=torch.ones(batch, 3),
        **pooled(batch),
    ),
    "x_embedder",
)
# Z-Image's own scale counts from 0; it embeds the patches of all its rows as one matrix, so its rows are counted at the
# attention.
Z_IMAGE = Case(
    z_image,
    lambda batch: {
        "prompt_embeds": list(randn(batch, 3, 8, seed=10)),
        "negative_prompt_embeds": list(randn(batch, 3, 8, seed=11)),
        "guidance_scale": SCALE - 1,
        "height": 64,
        "width": 64,
    },
    "layers.0",
    tolerance=1e-6,
)
CASES = {
    "sd": SD,
    "sdxl": SDXL,
    "sd3": SD3,
    "flux": FLUX,
    "qwen": QWEN,
    "wan": WAN,
    "wan-2": WAN_2,
    "hunyuan": HUNYUAN,
    "z-image": Z_IMAGE,
}


def modular(blocks: type, case: Case) -> Any:
    """The modular pipeline of the case's denoising blocks alone, with the parts of its classic one."""
    classic, pipe = case.build(), blocks().init_pipeline()
    parts = {
        name: getattr(classic, name) for name in ("scheduler", "vae", *case.denoisers) if name in pipe._component_specs
    }
    if "boundary_ratio" in pipe._config_specs:
        parts["boundary_ratio"] = classic.config.boundary_ratio
    pipe.update_components(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_modular(pipe, case: Case, guider, batch: int = 1, steps: int = STEPS, **changes) -> torch.Tensor:
    """The latents of one call of a modular pipeline, where `guider` decides."""
    pipe.update_components(**{name: guider for name in ("guider", "guider_2") if name in pipe._component_specs})
    arguments = {name: value for name, value in case.arguments(batch).items() if "scale" not in name}
    generator = torch.Generator().manual_seed(0)
    return pipe(
        **{**arguments, **changes}, num_inference_steps=steps, generator=generator, output="latents"
    )  # fmt: skip
