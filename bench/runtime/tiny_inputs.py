"""Inputs as processors return them, for the models of `tiny_zoo` that read pictures or speech."""

from collections.abc import Callable

import torch
from torch import nn

from hasten.bench.runtime.tiny_zoo import VOCABULARY

Inputs = dict[str, torch.Tensor]
TOKENS = 40


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1))


def text(rows: int, tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, tokens], none of them special."""
    return torch.randint(3, VOCABULARY - 30, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def placed(model: nn.Module, tokens: int, rows: int, at: int, seed: int) -> Inputs:
    """Text with `tokens` placeholders of one image from position `at` on."""
    ids = text(rows, seed=seed)
    config = model.config
    image = next(value for name in ("image_token_id", "image_token_index") if (value := getattr(config, name, None)))
    ids[:, at : at + tokens] = image
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def with_grid(model: nn.Module, rows: int = 1, seed: int = 0) -> Inputs:
    """A picture of 4 x 4 patches in flat rows, for models with multimodal rotary positions."""
    vision = model.config.vision_config
    size = 3 * vision.temporal_patch_size * vision.patch_size**2
    inputs = placed(model, 4, rows, 4, seed)
    kinds = torch.zeros_like(inputs["input_ids"])
    kinds[:, 4:8] = 1
    grid = torch.tensor([[1, 4, 4]] * rows)
    return inputs | {"mm_token_type_ids": kinds, "pixel_values": noise(seed, 16 * rows, size), "image_grid_thw": grid}


def with_pixels(model: nn.Module, tokens: int, rows: int = 1, at: int = 4, seed: int = 0) -> Inputs:
    return placed(model, tokens, rows, at, seed) | {"pixel_values": noise(seed, rows, 3, 16, 16)}


def nested(model: nn.Module, rows: int = 1, seed: int = 0) -> Inputs:
    """Pictures by row, each of which becomes 4 tokens."""
    return placed(model, 4, rows, 4, seed) | {"pixel_values": noise(seed, rows, 1, 3, 16, 16)}


def for_paligemma(model: nn.Module, rows: int = 1, seed: int = 0) -> Inputs:
    inputs = with_pixels(model, 16, rows, seed=seed)
    return inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}


def for_idefics(model: nn.Module, rows: int = 1, seed: int = 0) -> Inputs:
    ids = text(rows, seed=seed)
    mask = torch.ones(rows, TOKENS, 1, dtype=torch.int64)
    return {"input_ids": ids, "pixel_values": noise(seed, rows, 1, 3, 16, 16), "image_attention_mask": mask}


def for_mllama(model: nn.Module, rows: int = 1, seed: int = 0) -> Inputs:
    one = torch.ones(rows, 1, dtype=torch.int64)
    return {
        "input_ids": text(rows, seed=seed),
        "pixel_values": noise(seed, rows, 1, 4, 3, 16, 16),
        "aspect_ratio_ids": one,
        "aspect_ratio_mask": one[..., None].expand(-1, -1, 4),
        "cross_attention_mask": one[..., None, None].expand(-1, TOKENS, -1, 4),
    }


def for_kosmos(model: nn.Module, rows: int = 1, seed: int = 0) -> Inputs:
    mask = torch.zeros(rows, TOKENS, dtype=torch.int64)
    mask[:, 2 : 2 + model.config.latent_query_num] = 1
    pixels = noise(seed, rows, 3, 16, 16)
    return {"input_ids": text(rows, seed=seed), "pixel_values": pixels, "image_embeds_position_mask": mask}


def for_whisper(model: nn.Module, rows: int = 1, seed: int = 0) -> Inputs:
    features = noise(seed, rows, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    labels = text(rows, seed=seed)
    labels[:, 32:] = -100
    return {"input_features": features, "labels": labels}


def for_blip(model: nn.Module, rows: int = 1, seed: int = 0) -> Inputs:
    return {"input_ids": text(rows, seed=seed), "pixel_values": noise(seed, rows, 3, 16, 16)}


def for_captions(model: nn.Module, rows: int = 1, seed: int = 0) -> Inputs:
    return {"pixel_values": noise(seed, rows, 3, 16, 16), "labels": text(rows, seed=seed)}


def for_pix2struct(model: nn.Module, rows: int = 1, seed: int = 0) -> Inputs:
    size = 2 + model.config.vision_config.patch_embed_hidden_size
    patches = noise(seed, rows, 4, size).abs()  # the first two figures are the patch's row and column
    return {"flattened_patches": patches, "attention_mask": torch.ones(rows, 4), "labels": text(rows, seed=seed)}


def for_udop(model: nn.Module, rows: int = 1, seed: int = 0) -> Inputs:
    return {"input_ids": text(rows, seed=seed), "bbox": noise(seed, rows, TOKENS, 4).sigmoid()}


# By kind and model type: the inputs of so many rows, from a seed. Those in NEEDED cannot be run on token ids.
INPUTS: dict[tuple[str, str], Callable[..., Inputs]] = {
    ("image-text", "blip"): for_blip,
    ("image-text", "blip-2"): lambda model, rows=1, seed=0: with_pixels(
        model, model.config.num_query_tokens, rows, 0, seed
    ),
    ("image-text", "gemma3"): lambda model, rows=1, seed=0: with_pixels(model, 4, rows, seed=seed),
    **{("image-text", model_type): with_grid for model_type in ("glm4v", "glm4v_moe", "qwen2_5_vl", "qwen2_vl")},
    **{("image-text", model_type): with_grid for model_type in ("qwen3_5", "qwen3_vl", "qwen3_vl_moe")},
    **{("image-text", model_type): nested for model_type in ("idefics3", "smolvlm")},
    ("image-text", "idefics"): for_idefics,
    ("image-text", "internvl"): lambda model, rows=1, seed=0: with_pixels(model, 4, rows, seed=seed),
    ("image-text", "kosmos-2"): for_kosmos,
    ("image-text", "llava"): lambda model, rows=1, seed=0: with_pixels(model, 16, rows, seed=seed),
    ("image-text", "mllama"): for_mllama,
    ("image-text", "paligemma"): for_paligemma,
    ("image-text", "pix2struct"): for_pix2struct,
    ("image-text", "pp_formulanet"): for_captions,
    ("image-text", "udop"): for_udop,
    ("image-text", "vision-encoder-decoder"): for_captions,
    ("speech", "whisper"): for_whisper,
}
NEEDED = {
    *(("image-text", model_type) for model_type in ("blip", "idefics", "pix2struct", "pp_formulanet", "udop")),
    ("image-text", "vision-encoder-decoder"),
    ("speech", "whisper"),
}
