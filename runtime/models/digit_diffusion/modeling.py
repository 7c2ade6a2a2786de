"""The diffusion transformer: patches of 8 x 8 digits, adaLN-Zero, v-prediction on the cosine schedule.

Peebles and Xie 2023 ("Scalable Diffusion Models with Transformers", section 3.2) for the blocks, Salimans and Ho 2022
("Progressive Distillation", appendix D) for v and the schedule, Ho and Salimans 2022 ("Classifier-Free Diffusion
Guidance") for the unconditional class.

Shapes: B digits of [1, 8, 8] in [-1, 1] (-1 is paper, 1 is ink), T = 16 patches, C channels.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn


@dataclass(frozen=True)
class DigitDiffusionConfig:
    """Sizes of the transformer. `latest` is the noisiest time that sampling starts from, where alpha = cos(pi / 2 *
    latest) is small but not 0.
    """

    size: int = 8
    patch: int = 2
    classes: int = 10
    channels: int = 64
    layers: int = 6
    heads: int = 4
    latest: float = 0.99


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition; gates begin at 0 (adaLN-Zero)."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(channels, 6 * channels)
        self.attention_norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.mlp_norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """x [B, T, C], condition [B, C] -> [B, T, C]."""
        B, T, C = x.shape
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition)[:, None].chunk(6, dim=-1)
        h = self.attention_norm(x) * (1 + scale_a) + shift_a
        q, k, v = self.qkv(h).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # [B, heads, T, D]
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C)
        x = x + gate_a * self.out(h)
        h = self.mlp_norm(x) * (1 + scale_m) + shift_m
        return x + gate_m * self.mlp(h)


class DigitDiffusion(nn.Module):
    """Predicts v = alpha * noise - sigma * x0 of a noisy digit x_t = alpha * x0 + sigma * noise, for a digit or for
    none.

    alpha = cos(pi / 2 * time) and sigma = sin(pi / 2 * time), time in [0, 1]. `unconditional` is the label that stands
    for no class.
    """

    def __init__(self, config: DigitDiffusionConfig | None = None):
        super().__init__()
        self.config = config = config or DigitDiffusionConfig()
        pixels, tokens = config.patch**2, (config.size // config.patch) ** 2
        self.unconditional = config.classes
        self.embed = nn.Linear(pixels, config.channels)
        self.position = nn.Parameter(torch.randn(tokens, config.channels) * 0.02)
        self.time = nn.Sequential(
            nn.Linear(config.channels, config.channels), nn.SiLU(), nn.Linear(config.channels, config.channels)
        )
        self.label = nn.Embedding(config.classes + 1, config.channels)
        self.blocks = nn.ModuleList(Block(config.channels, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.channels, elementwise_affine=False)
        self.modulation = nn.Linear(config.channels, 2 * config.channels)
        self.head = nn.Linear(config.channels, pixels)
        for layer in (self.modulation, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, time: torch.Tensor | float, labels: torch.Tensor) -> torch.Tensor:
        """v of x.

        Args:
            x: x_t, [B, 1, 8, 8].
            time: in [0, 1], one number or one per digit [B].
            labels: [B], 0 to 9, or `unconditional`.

        Returns:
            [B, 1, 8, 8].

        Raises:
            ValueError: x has another shape, there is not one label per digit, or a label or a time is out of range.
        """
        time = torch.as_tensor(time, dtype=x.dtype, device=x.device).expand(x.shape[0])
        self._check(x, time, labels)
        condition = F.silu(self.time(time_features(time, self.config.channels)) + self.label(labels))
        h = self.embed(self._patches(x)) + self.position
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self._pixels(self.head(self.norm(h) * (1 + scale) + shift))

    def times(self, steps: int) -> list[float]:
        """The times of a run, falling from config.latest to 0: steps + 1 of them.

        Raises:
            ValueError: there is less than one step.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        return [self.config.latest * (1 - i / steps) for i in range(steps)] + [0.0]

    def noise(self, seeds: list[int]) -> torch.Tensor:
        """Where sampling begins, [len(seeds), 1, 8, 8]: each digit's noise depends on its own seed alone."""
        size = self.config.size
        drawn = [torch.randn(1, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(self.position)

    def save(self, folder: Path) -> None:
        """Writes config.json and model.safetensors."""
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / "model.safetensors"
        )
        config = {"model_type": "digit-diffusion", **asdict(self.config)}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> DigitDiffusion:
        """The model of a folder, such as hasten.embedded_model("digit-diffusion"), ready for inference.

        Raises:
            ValueError: the folder holds another model.
            OSError: there is no such folder.
        """
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.pop("model_type", None)
        names = {field.name for field in fields(DigitDiffusionConfig)}
        if kind != "digit-diffusion" or config.keys() != names:
            raise ValueError(
                f"{folder} holds a model of type {kind!r} with {sorted(config)}, not a digit-diffusion model"
            )
        model = cls(DigitDiffusionConfig(**config))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval().requires_grad_(False)

    def _check(self, x: torch.Tensor, time: torch.Tensor, labels: torch.Tensor) -> None:
        size = self.config.size
        if x.ndim != 4 or x.shape[1:] != (1, size, size):
            raise ValueError(f"x must be [B, 1, {size}, {size}], not {list(x.shape)}")
        if labels.shape != x.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64 of [{x.shape[0]}], not {labels.dtype} of {list(labels.shape)}")
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= self.unconditional:
            raise ValueError(
                f"labels must be digits, 0 to 9, or {self.unconditional} for none, "
                f"not {int(labels.min())} to {int(labels.max())}"
            )
        if time.numel() and not 0 <= float(time.min()) <= float(time.max()) <= 1:
            raise ValueError(f"time must lie in [0, 1], not {float(time.min())} to {float(time.max())}")

    def _patches(self, x: torch.Tensor) -> torch.Tensor:
        p = self.config.patch
        return F.unfold(x, p, stride=p).transpose(1, 2)  # [B, T, p * p]

    def _pixels(self, patches: torch.Tensor) -> torch.Tensor:
        size, p = self.config.size, self.config.patch
        return F.fold(patches.transpose(1, 2), size, p, stride=p)  # [B, 1, size, size]


def alpha_sigma(time: float) -> tuple[float, float]:
    """The cosine schedule: x_t = alpha * x0 + sigma * noise. alpha is exactly 1 at time 0."""
    return math.cos(math.pi / 2 * time), math.sin(math.pi / 2 * time)


def time_features(time: torch.Tensor, channels: int) -> torch.Tensor:
    """Sines and cosines of time [B] at frequencies from 1 to 1000, [B, channels]."""
    frequencies = torch.logspace(0, 3, channels // 2, dtype=time.dtype, device=time.device)
    angles = time[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
