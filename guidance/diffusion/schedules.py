"""Noise schedules: the grid of (alpha, sigma) that a run of N steps visits, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hasten.guidance.diffusion.guide import Parameterization, Step, check_count, check_number


@dataclass(frozen=True)
class Schedule:
    """Step i leads from (alphas[i], sigmas[i]) to (alphas[i + 1], sigmas[i + 1]): N + 1 values each for N steps, with
    sigma / alpha falling.
    """

    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "alphas", tuple(float(value) for value in self.alphas))
        object.__setattr__(self, "sigmas", tuple(float(value) for value in self.sigmas))
        if len(self.alphas) != len(self.sigmas) or len(self.alphas) < 2:
            raise ValueError(
                f"expected alphas and sigmas of one length, at least 2: got {len(self.alphas)} and {len(self.sigmas)}"
            )
        if not all(0 <= value < math.inf for value in (*self.alphas, *self.sigmas)):
            raise ValueError("alphas and sigmas must be finite and not below 0")
        for i in range(len(self)):
            if not self.sigmas[i] * self.alphas[i + 1] > self.sigmas[i + 1] * self.alphas[i]:
                raise ValueError(f"sigma / alpha must fall from step to step: it does not from step {i} to {i + 1}")

    def __len__(self) -> int:
        return len(self.alphas) - 1

    def step(self, index: int, sample: torch.Tensor, parameterization: Parameterization, memory: dict) -> Step:
        """Step `index` of a run over this schedule, at sample [B, ...]."""
        i = index
        levels = (self.alphas[i], self.sigmas[i], self.alphas[i + 1], self.sigmas[i + 1])
        return Step(sample, *levels, i, len(self), parameterization, memory)


def variance_preserving(alphas_cumprod: torch.Tensor, count: int) -> Schedule:
    """DDPM's schedule (Ho et al. 2020, arXiv 2006.11239): `count` of the T levels of alphas_cumprod [T], from the
    noisiest on in even steps of T / count, then the clean sample. alpha = sqrt(alphas_cumprod), sigma = sqrt(1 -
    alphas_cumprod).
    """
    check_count("count", count, 1)
    if alphas_cumprod.ndim != 1 or len(alphas_cumprod) < count:
        raise ValueError(
            f"alphas_cumprod must be [T] with T of at least {count} steps, got shape {tuple(alphas_cumprod.shape)}"
        )
    spacing = len(alphas_cumprod) / count
    indices = [round(len(alphas_cumprod) - i * spacing) - 1 for i in range(count)]
    squared = torch.cat([alphas_cumprod.double().cpu()[indices], torch.ones(1, dtype=torch.float64)])
    return Schedule(squared.sqrt().tolist(), (1 - squared).sqrt().tolist())


def variance_exploding(sigma_max: float, sigma_min: float, count: int, rho: float = 7.0) -> Schedule:
    """EDM's schedule (Karras et al. 2022, arXiv 2206.00364, equation 5): alpha = 1, `count` sigmas from sigma_max to
    sigma_min, then 0.
    """
    check_count("count", count, 1)
    check_number("sigma_min", sigma_min, low=0)
    check_number("rho", rho)
    if not 0 < sigma_min < sigma_max or not rho > 0:
        raise ValueError(f"expected 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max} and {rho}")
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return Schedule((1.0,) * (count + 1), (*sigmas.tolist(), 0.0))


def flow(count: int, shift: float = 1.0) -> Schedule:
    """Rectified flow: alpha = 1 - sigma, sigma from 1 to 0 in `count` even steps, then shifted towards noise as sigma *
    shift / (1 + (shift - 1) * sigma) (Esser et al. 2024, arXiv 2403.03206, equation 23).
    """
    check_count("count", count, 1)
    check_number("shift", shift)
    if not shift > 0:
        raise ValueError(f"shift must be above 0, got {shift}")
    even = [1 - i / count for i in range(count + 1)]
    sigmas = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]
    return Schedule([1 - sigma for sigma in sigmas], sigmas)
