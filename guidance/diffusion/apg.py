"""Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hasten.guidance.diffusion.guide import BOTH, CONDITIONAL, Guide, Pass, PredictedStep, Step, check_number, per_row
from hasten.guidance.diffusion.parameterization import from_denoised, to_denoised

_MOMENTUM = "apg.momentum"


@dataclass(frozen=True)
class AdaptiveProjectedGuidance(Guide):
    """Guidance whose update is averaged with its past, bounded in norm, and freed of the part that only rescales the
    conditional prediction (the part that saturates images), in this order (arXiv 2410.02416, algorithm 1).

    All of it happens on x0, whatever the model predicts: the projection and the norm mean something else on noise or
    velocity.

    Args:
        scale: off at 1. High values are what the method is for: 10 and more.
        eta: weight of the part of the update parallel to the conditional x0; 0 as recommended, 1 keeps it.
        momentum: weight of the running average of past updates, negative to push away from them, in (-1, 1); 0: none.
        max_norm: bound on the L2 norm of a sample's update; None: none. It grows as the square root of the number of
            elements, so it does not carry over from one latent size to another (SDXL: 15, with momentum -0.5).
    """

    scale: float = 10.0
    eta: float = 0.0
    momentum: float = -0.5
    max_norm: float | None = None

    def __post_init__(self):
        check_number("scale", self.scale)
        check_number("eta", self.eta)
        check_number("momentum", self.momentum, -1, 1)
        if abs(self.momentum) == 1:
            raise ValueError(f"momentum must lie inside (-1, 1), got {self.momentum!r}")
        if self.max_norm is not None:
            check_number("max_norm", self.max_norm, low=0)

    def passes(self, step: Step) -> tuple[Pass, ...]:
        return CONDITIONAL if self.scale == 1 else BOTH

    def __call__(self, step: PredictedStep) -> torch.Tensor:
        step.record({"scale": self.scale})
        if self.scale == 1:
            return step.require("conditional")[0]
        conditional, unconditional = (to_denoised(step, prediction) for prediction in step.require(*BOTH))
        update = conditional - unconditional
        if self.momentum:
            update = update + self.momentum * step.memory.get(_MOMENTUM, torch.zeros_like(update))
            step.memory[_MOMENTUM] = update
        if self.max_norm is not None:
            norm = per_row(update.flatten(1).norm(dim=1), update)
            update = update * (self.max_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)
        parallel, orthogonal = project(update, conditional)
        return from_denoised(step, conditional + (self.scale - 1) * (orthogonal + self.eta * parallel))


def project(update: torch.Tensor, onto: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of `update` [B, ...] parallel and orthogonal to `onto` [B, ...], row by row; in float64 where the
    device has it.
    """
    wide = torch.float32 if update.device.type == "mps" else torch.float64
    u, v = update.to(wide), onto.to(wide)
    along = (u * v).flatten(1).sum(dim=1) / v.square().flatten(1).sum(dim=1).clamp_min(torch.finfo(wide).tiny)
    parallel = per_row(along, v) * v
    return parallel.to(update.dtype), (u - parallel).to(update.dtype)
