"""The samplers of CFG++ (Chung et al. 2024, arXiv 2406.08070), each as a pure function over x0-predictions.

`predict(x, alpha, sigma)` returns the conditional and the unconditional x0-prediction [B, ...] at x [B, ...].
`strength` is the lambda of the paper: guided = unconditional + strength * (conditional - unconditional).
Below, s = sigma / alpha and x / alpha are what variance-exploding samplers call sigma and x: one function serves every
schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from hasten.guidance.diffusion.guide import check_number
from hasten.guidance.diffusion.schedules import Schedule

Predict = Callable[[torch.Tensor, float, float], tuple[torch.Tensor, torch.Tensor]]


def ddim(predict: Predict, schedule: Schedule, x: torch.Tensor, strength: float) -> torch.Tensor:
    """DDIM (algorithm 2): x' = alpha' * guided + sigma' * unconditional noise.

    On a variance-exploding schedule this is Euler, x' = guided + s' * (x - unconditional) / s; on a flow it is Euler on
    the flow, x' = x - (1 - sigma') * sigma * u_guided + sigma' * (1 - sigma) * u_unconditional.
    """
    return ancestral(predict, schedule, x, strength, eta=0.0)


def ancestral(
    predict: Predict,
    schedule: Schedule,
    x: torch.Tensor,
    strength: float,
    eta: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Euler ancestral: the deterministic part leads to s_down = sqrt(s'^2 - s_up^2) rather than s', and s_up * fresh
    noise is added, with s_up^2 = eta^2 * s'^2 * (s^2 - s'^2) / s^2.
    """
    check_number("strength", strength, 0, 1)
    check_number("eta", eta, 0, 1)
    for i in range(len(schedule)):
        alpha, sigma, next_alpha, next_sigma = _levels(schedule, i)
        conditional, unconditional = predict(x, alpha, sigma)
        kept = 1 - (next_sigma * alpha / (next_alpha * sigma)) ** 2  # 1 - (s' / s)^2
        down = next_sigma * math.sqrt(1 - eta**2 * kept)
        x = _euler(x, conditional, unconditional, strength, alpha, sigma, next_alpha, down)
        if eta and next_sigma:
            fresh = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            x = x + eta * next_sigma * math.sqrt(kept) * fresh
    return x


def dpmpp_2m(predict: Predict, schedule: Schedule, x: torch.Tensor, strength: float) -> torch.Tensor:
    """DPM-Solver++ 2M: with h = log(s / s') and r = h_last / h, in units of x / alpha,
    x' = guided - e^-h * unconditional + e^-h * x + (1 - e^-h) * (unconditional - last unconditional) / (2 r);
    Euler at the first and the last step.

    The difference is of unconditional predictions on both sides; taking the guided one as its first term mixes two
    quantities, and does not vanish where the predictions do not change.
    """
    check_number("strength", strength, 0, 1)
    last, h_last = None, math.inf
    for i in range(len(schedule)):
        alpha, sigma, next_alpha, next_sigma = _levels(schedule, i)
        conditional, unconditional = predict(x, alpha, sigma)
        x = _euler(x, conditional, unconditional, strength, alpha, sigma, next_alpha, next_sigma)
        if next_sigma:
            ratio = next_sigma * alpha / (next_alpha * sigma)  # e^-h
            h = -math.log(ratio) if ratio else math.inf
            if math.isfinite(h_last):
                x = x + next_alpha * (1 - ratio) * h / (2 * h_last) * (unconditional - last)
            last, h_last = unconditional, h
    return x


def invert(predict: Predict, schedule: Schedule, x: torch.Tensor, strength: float) -> torch.Tensor:
    """DDIM inversion (section 3.4): from x at the schedule's end to noise at its beginning, with the roles swapped: x0
    is the unconditional one, the noise guided, both predicted at the cleaner side of each step. A round trip through
    `ddim` comes back up to O(step size).
    """
    check_number("strength", strength, 0, 1)
    if schedule.sigmas[-1] == 0:
        raise ValueError("inversion starts at the schedule's end, where sigma must be above 0: drop the last level")
    for i in reversed(range(len(schedule))):
        next_alpha, next_sigma, alpha, sigma = _levels(schedule, i)  # of the noisier side, then of x
        conditional, unconditional = predict(x, alpha, sigma)
        guided = unconditional + strength * (conditional - unconditional)
        x = next_alpha * unconditional + next_sigma * (x - alpha * guided) / sigma
    return x


def _levels(schedule, i):
    return schedule.alphas[i], schedule.sigmas[i], schedule.alphas[i + 1], schedule.sigmas[i + 1]


def _euler(x, conditional, unconditional, strength, alpha, sigma, next_alpha, next_sigma):
    guided = unconditional + strength * (conditional - unconditional)
    return next_alpha * guided + next_sigma * (x - alpha * unconditional) / sigma
