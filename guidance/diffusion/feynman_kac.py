"""Feynman-Kac correctors (Skreta et al. 2025, arXiv 2503.02819): particles and weights that make guided samples follow
the guided density.

Scores mixed with exponents b_i, sum_i b_i * score_i, drive a reverse process whose law is not prod_i q_i^b_i: plain
classifier-free guidance samples no tilted density. Weighted by exp of the increments below, and resampled by those
weights, it does. Particles of one prompt compete; this multiplies the cost by their number, and in high dimensions
weights degenerate quickly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hasten.guidance.diffusion.guide import check_count, check_number
from hasten.guidance.diffusion.lag import FiniteCheck
from hasten.guidance.smc import effective_sample_size, log_mean_weight, systematic


def log_weight_increment(
    scores: Sequence[torch.Tensor], exponents: Sequence[float], variance: float, divergence: float = 0.0
) -> torch.Tensor:
    """Of one step towards prod_i q_i^b_i, [B]: variance / 2 * (|sum b_i s_i|^2 - sum b_i |s_i|^2) + (sum b_i - 1) *
    divergence (proposition 3.1 and its corollaries: one exponent anneals, exponents of 1 make a product, (1 - w, w) is
    guidance).

    Args:
        scores: s_i [B, ...], gradients of log q_i at the step's noise level.
        exponents: b_i.
        variance: of the noise that the step removes, the integral of g^2; s^2 - s'^2 where alpha = 1.
        divergence: the integral of the forward drift's divergence over the step, 0 where alpha = 1. For a linear drift
            it is the same for all particles, and matters to the normaliser alone.
    """
    _check_exponents(scores, exponents)
    mixed = sum(exponent * score for exponent, score in zip(exponents, scores, strict=True))
    squares = sum(exponent * _square(score) for exponent, score in zip(exponents, scores, strict=True))
    return 0.5 * variance * (_square(mixed) - squares) + (sum(exponents) - 1) * divergence


def guidance_increment(
    conditional: torch.Tensor, unconditional: torch.Tensor, scale: float, variance: float
) -> torch.Tensor:
    """`log_weight_increment` of the scores [B, ...] of classifier-free guidance, without its cancellation: variance / 2
    * w * (w - 1) * |conditional - unconditional|^2, [B].
    """
    return 0.5 * variance * scale * (scale - 1) * _square(conditional - unconditional)


@dataclass(frozen=True)
class Resampled:
    """What one update gives, for G prompts of P particles each.

    log_weights [G, P]. indices [G * P]: the row that each row now continues; index everything by it that belongs to a
    row: samples, the history of a multistep scheduler, caches, generators. The other three, [G]: effective sample size
    before resampling, whether it fell below the threshold, and the fraction of increments that were clamped.
    """

    log_weights: torch.Tensor
    indices: torch.Tensor
    effective: torch.Tensor
    resampled: torch.Tensor
    clipped: torch.Tensor


@dataclass(frozen=True)
class FeynmanKacCorrector:
    """Weights that accumulate, and systematic resampling once the effective sample size of a prompt's particles falls
    below a fraction of them.

    Nothing waits for the device: rows that are not resampled continue themselves. A resampled prompt's weights all
    become their mean, so that the mean weight estimates the ratio of normalisers throughout.

    Args:
        threshold: of the effective sample size, a fraction of P in [0, 1]. 0: never, the weights are the answer.
        clamp: bound on an increment's distance from its prompt's mean. None, the default: none; any bound makes the
            result inexact.
        window: resample only at noise levels sigma / alpha in [low, high].
    """

    threshold: float = 0.5
    clamp: float | None = None
    window: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self):
        check_number("threshold", self.threshold, 0, 1)
        if self.clamp is not None:
            check_number("clamp", self.clamp, low=0)
        ends = self.window if isinstance(self.window, (tuple, list)) else ()
        if len(ends) != 2 or not all(isinstance(end, (int, float)) for end in ends) or not 0 <= ends[0] <= ends[1]:
            raise ValueError(f"window must be (low, high) with 0 <= low <= high, got {self.window!r}")

    def update(
        self,
        log_weights: torch.Tensor,
        increment: torch.Tensor,
        level: float,
        generator: torch.Generator | None = None,
    ) -> Resampled:
        """One step: log_weights [G, P], increment [G * P], level the step's sigma / alpha."""
        increment = increment.reshape(log_weights.shape)
        clipped = torch.zeros_like(log_weights[:, 0])
        if self.clamp is not None:
            mean = increment.mean(dim=1, keepdim=True)
            clipped = ((increment - mean).abs() > self.clamp).to(clipped.dtype).mean(dim=1)
            increment = mean + (increment - mean).clamp(-self.clamp, self.clamp)
        log_weights = log_weights + increment
        groups, particles = log_weights.shape
        effective = effective_sample_size(log_weights)
        due = effective < self.threshold * particles
        if not self.window[0] <= level <= self.window[1]:
            due = torch.zeros_like(due)
        own = torch.arange(particles, device=log_weights.device).expand(groups, particles)
        uniform = torch.rand(groups, 1, dtype=torch.float64, device=log_weights.device, generator=generator)
        indices = torch.where(due[:, None], systematic(log_weights, uniform), own)
        log_weights = torch.where(due[:, None], log_mean_weight(log_weights)[:, None], log_weights)
        first = torch.arange(groups, device=log_weights.device)[:, None] * particles
        return Resampled(log_weights, (indices + first).flatten(), effective, due, clipped)


def sample_exploding(
    scores: Sequence[Callable[[torch.Tensor, float], torch.Tensor]],
    exponents: Sequence[float],
    sigmas: Sequence[float],
    x: torch.Tensor,
    corrector: FeynmanKacCorrector,
    groups: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Euler-Maruyama down a variance-exploding schedule towards prod_i q_i^b_i, corrected: samples [G * P, ...] and log
    weights [G, P], whose `hasten.guidance.smc.log_mean_weight` estimates log Z(end) - log Z(start), Z the integral of
    prod_i q_i^b_i at that noise level.

    Args:
        scores: s_i(x, sigma), each [G * P, ...].
        sigmas: falling, N + 1 for N steps.
        x: [G * P, ...], the G prompts one after the other, a sample at sigmas[0].

    Raises:
        ValueError: NaN or infinite scores, with the step's number.
    """
    _check_exponents(scores, exponents)
    check_count("groups", groups, 1)
    if len(x) % groups:
        raise ValueError(f"{len(x)} particles do not divide into {groups} groups")
    if any(not sigma > following >= 0 for sigma, following in itertools.pairwise(sigmas)):
        raise ValueError(f"sigmas must fall and not below 0, got {list(sigmas)}")
    log_weights = torch.zeros(groups, len(x) // groups, dtype=torch.float64, device=x.device)
    check = FiniteCheck(len(sigmas) - 1, x.device)
    for index, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        variance = sigma**2 - following**2
        at = [score(x, sigma) for score in scores]
        check(index, *at)
        mixed = sum(exponent * score for exponent, score in zip(exponents, at, strict=True))
        fresh = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        x = x + variance * mixed + math.sqrt(variance) * fresh
        result = corrector.update(log_weights, log_weight_increment(at, exponents, variance), sigma, generator)
        log_weights, x = result.log_weights, x[result.indices]
    check.finish()
    return x, log_weights


def _check_exponents(scores, exponents):
    if len(scores) != len(exponents):
        raise ValueError(
            f"expected one exponent for each score, got {len(scores)} scores and {len(exponents)} exponents"
        )


def _square(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).square().sum(dim=1)
