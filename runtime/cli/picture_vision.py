"""The picture of `hasten demo vision`: questions, and the image tokens that each way of choosing keeps. Needs
matplotlib, the extra `[plot]`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from hasten.acceleration.shortened_cache import ShortenedLayer
from hasten.acceleration.techniques import VisionTokens
from hasten.acceleration.techniques.vision_token_search import tried
from hasten.models.digit_questions import Sample

DEFAULT = Path("hasten_vision.png")
DIM = 0.25  # of the brightness of what was dropped


@torch.no_grad()
def kept_patches(model: nn.Module, processor, sample: Sample, technique: VisionTokens) -> np.ndarray:
    """Which patches of the sample's picture the last layer sees, bool [rows, columns]."""
    inputs = processor(images=sample.image, text=sample.prompt, return_tensors="pt")
    cache = DynamicCache(config=model.config.text_config)
    with tried(model, technique):
        model(**inputs, past_key_values=cache, logits_to_keep=1)
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    layer = cache.layers[-1]
    seen = layer.entries.tokens[0] if isinstance(layer, ShortenedLayer) else places
    side = round(len(places) ** 0.5)
    return torch.isin(places, seen).view(side, side).numpy()


def draw(
    path: Path, model: nn.Module, processor, samples: Sequence[Sample], techniques: Mapping[str, VisionTokens]
) -> None:
    """Draws each sample's picture, whole and with what each technique drops dimmed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9 * (1 + len(techniques)), 2.2 * len(samples)), layout="constrained")
    figure.suptitle("Image tokens that the last decoder layer sees", fontsize=10)
    grid = figure.subplots(len(samples), 1 + len(techniques), squeeze=False)
    for row, sample in zip(grid, samples, strict=True):
        row[0].imshow(sample.image)
        row[0].set_title(f"{sample.question}\n{sample.answer}", fontsize=8)
        for axes, (name, technique) in zip(row[1:], techniques.items(), strict=True):
            kept = kept_patches(model, processor, sample, technique)
            patch = sample.image.shape[0] // len(kept)
            light = np.kron(np.where(kept, 1.0, DIM), np.ones((patch, patch)))[..., None]
            tint = np.where(light == 1, [0, 0, 0], [60, 20, 20])  # so that dark patches that were dropped show too
            axes.imshow((sample.image * light + tint).clip(0, 255).astype(np.uint8))
            axes.set_title(f"{name}: {int(kept.sum())} of {kept.size}", fontsize=8)
        for axes in row:
            axes.set_axis_off()
    figure.savefig(path, dpi=150)
