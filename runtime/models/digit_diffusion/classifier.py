"""The classifier of digits, and what is measured of samples: the digit that they show, saturation and contrast."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

FILE = "classifier.safetensors"
HALF_LEVEL = 1 / 16


class DigitClassifier(nn.Module):
    """Logits [B, 10] of digits [B, 1, 8, 8] in [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(64 * 2 * 2, 64),
            nn.GELU(),
            nn.Linear(64, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What the last layer sees of digits [B, 1, 8, 8], clamped to [-1, 1] as a picture is: [B, 64]."""
        return self.layers[:-1](x.clamp(-1, 1))

    def save(self, folder: Path) -> None:
        """Writes classifier.safetensors."""
        save_file(self.state_dict(), folder / FILE)

    @classmethod
    def load(cls, folder: str | Path) -> DigitClassifier:
        """The classifier that lies beside the diffusion model, ready for inference."""
        model = cls()
        model.load_state_dict(load_file(Path(folder) / FILE))
        return model.eval().requires_grad_(False)

    def correct(self, samples: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Whether each sample [B, 1, 8, 8], clamped to [-1, 1] as a picture is, is taken for its label: bool [B]."""
        return self(samples.clamp(-1, 1)).argmax(-1) == labels


def saturation(samples: torch.Tensor) -> torch.Tensor:
    """The share of each sample's pixels that a picture would clip, [B]: 0 for real digits.

    Digits have 17 grey levels from -1 to 1, 1/8 apart; a pixel is clipped where rounding to the nearest level leaves
    that range, |x0| > 1 + 1/16. Imagen calls such pixels saturated (Saharia et al. 2022, section 2.3). Samples are
    taken as the sampler leaves them, unclamped.
    """
    return (samples.abs() > 1 + HALF_LEVEL).flatten(1).float().mean(-1)


def contrast(samples: torch.Tensor) -> torch.Tensor:
    """The mean |x0| of each sample's pixels, unclamped, [B]: how far from mid-grey it is, as colour saturation is for
    colours.
    """
    return samples.abs().flatten(1).mean(-1)
