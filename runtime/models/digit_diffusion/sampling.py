"""Drawing digits with a guide: DDIM on the cosine schedule, in the contract of hasten.guidance, with its evaluations and its time counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hasten.guidance.guide import Guide, State, Step
from hasten.models.digit_diffusion.modeling import DigitDiffusion, alpha_sigma


@dataclass(frozen=True)
class Drawn:
    """What `draw` returns.

    samples: x0, [B, 1, 8, 8], unclamped. rows: predictions of one digit that the model computed, over all steps; calls: its forward calls. seconds: wall
    time of the loop.
    """

    samples: torch.Tensor
    rows: int
    calls: int
    seconds: float


@torch.no_grad()
def draw(
    model: DigitDiffusion,
    labels: torch.Tensor,
    guide: Guide,
    seeds: Sequence[int],
    steps: int = 50,
    after_step: Callable[[], object] = lambda: None,
) -> Drawn:
    """Draws one digit per label by DDIM (Song et al. 2021, equation 12 with no fresh noise); both passes run in one call.

    Args:
        model: the digit model.
        labels: [B], int64, which digits.
        guide: asked at every step, in the parameterisation "v".
        seeds: one per digit; equal seeds begin at equal noise, whatever the guide and the other seeds.
        steps: of the run.
        after_step: called after each step, for a progress bar.

    Raises:
        ValueError: there is not one seed per label, or as in DigitDiffusion.forward and .times.
    """
    if len(seeds) != len(labels):
        raise ValueError(f"there must be one seed per label, not {len(seeds)} for {len(labels)}")
    times = model.times(steps)
    x = model.noise(seeds)
    rows = calls = 0
    memory: dict = {}
    labels_of = {"conditional": labels, "unconditional": torch.full_like(labels, model.unconditional)}
    start = time.perf_counter()
    for i in range(steps):
        (alpha, sigma), (next_alpha, next_sigma) = alpha_sigma(times[i]), alpha_sigma(times[i + 1])
        step = dict(
            sample=x, alpha=alpha, sigma=sigma, next_alpha=next_alpha, next_sigma=next_sigma,
            index=i, count=steps, parameterization="v", memory=memory,
        )  # fmt: skip
        passes = guide.passes(Step(**step))
        computed = model(x.repeat(len(passes), 1, 1, 1), times[i], torch.cat([labels_of[name] for name in passes]))
        rows, calls = rows + len(computed), calls + 1
        v = guide(State(**step, **dict(zip(passes, computed.chunk(len(passes)), strict=True))))
        x = next_alpha * (alpha * x - sigma * v) + next_sigma * (sigma * x + alpha * v)
        after_step()
    return Drawn(x, rows, calls, time.perf_counter() - start)
