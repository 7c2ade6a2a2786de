"""Inputs as processors return them, for tiny multimodal models of `hasten.bench.runtime.tiny_zoo`."""

import torch
from tiny_models import token_ids

TOKENS = 40


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def placed(model, tokens: int, rows: int, at: int) -> dict[str, torch.Tensor]:
    """Text with `tokens` placeholders of one image from position `at` on."""
    ids = token_ids(rows, TOKENS)
    config = model.config
    image = next(value for name in ("image_token_id", "image_token_index") if (value := getattr(config, name, None)))
    ids[:, at : at + tokens] = image
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def with_grid(model, rows: int = 1) -> dict[str, torch.Tensor]:
    """A picture of 4 x 4 patches in flat rows, for models with multimodal rotary positions."""
    vision = model.config.vision_config
    size = 3 * vision.temporal_patch_size * vision.patch_size**2
    inputs = placed(model, 4, rows, at=4)
    kinds = torch.zeros_like(inputs["input_ids"])
    kinds[:, 4:8] = 1
    grid = torch.tensor([[1, 4, 4]] * rows)
    return inputs | {"mm_token_type_ids": kinds, "pixel_values": noise(16 * rows, size), "image_grid_thw": grid}


def with_pixels(model, tokens: int, rows: int = 1, at: int = 4) -> dict[str, torch.Tensor]:
    return placed(model, tokens, rows, at) | {"pixel_values": noise(rows, 3, 16, 16)}


def for_idefics(model, rows: int = 1) -> dict[str, torch.Tensor]:
    ids = token_ids(rows, TOKENS)
    mask = torch.ones(rows, TOKENS, 1, dtype=torch.int64)
    return {"input_ids": ids, "pixel_values": noise(rows, 1, 3, 16, 16), "image_attention_mask": mask}


def for_mllama(model, rows: int = 1) -> dict[str, torch.Tensor]:
    one = torch.ones(rows, 1, dtype=torch.int64)
    return {
        "input_ids": token_ids(rows, TOKENS),
        "pixel_values": noise(rows, 1, 4, 3, 16, 16),
        "aspect_ratio_ids": one,
        "aspect_ratio_mask": one[..., None].expand(-1, -1, 4),
        "cross_attention_mask": one[..., None, None].expand(-1, TOKENS, -1, 4),
    }


def for_kosmos(model, rows: int = 1) -> dict[str, torch.Tensor]:
    mask = torch.zeros(rows, TOKENS, dtype=torch.int64)
    mask[:, 2 : 2 + model.config.latent_query_num] = 1
    pixels = noise(rows, 3, 16, 16)
    return {"input_ids": token_ids(rows, TOKENS), "pixel_values": pixels, "image_embeds_position_mask": mask}


def for_whisper(model, rows: int = 1) -> dict[str, torch.Tensor]:
    features = noise(rows, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    labels = token_ids(rows, TOKENS)
    labels[:, 32:] = -100
    return {"input_features": features, "labels": labels}


def for_captions(model, rows: int = 1) -> dict[str, torch.Tensor]:
    return {"pixel_values": noise(rows, 3, 16, 16), "labels": token_ids(rows, TOKENS)}


# By kind and model type: the inputs of that many rows.
PICTURES = {
    ("image-text", "qwen2_vl"): with_grid,
    ("image-text", "qwen3_5"): with_grid,
    ("image-text", "glm4v"): with_grid,
    ("image-text", "llava"): lambda model, rows=1: with_pixels(model, 16, rows),
    ("image-text", "gemma3"): lambda model, rows=1: with_pixels(model, 4, rows),
    ("image-text", "blip-2"): lambda model, rows=1: with_pixels(model, model.config.num_query_tokens, rows, at=0),
    ("image-text", "idefics"): for_idefics,
    ("image-text", "mllama"): for_mllama,
    ("image-text", "kosmos-2"): for_kosmos,
    ("image-text", "vision-encoder-decoder"): for_captions,
    ("speech", "whisper"): for_whisper,
}
