"""Drawing digits with a guide: DDIM on the cosine schedule, with its evaluations and its time counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hasten.guidance.diffusion.guide import Guide
from hasten.guidance.diffusion.sampling import sample
from hasten.guidance.diffusion.schedules import Schedule
from hasten.models.digit_diffusion.modeling import DigitDiffusion, alpha_sigma


@dataclass(frozen=True)
class Drawing:
    """What `draw` returns.

    samples: x0, [B, 1, 8, 8], unclamped. rows: predictions of one digit that the model computed, over all steps; calls:
        its forward calls.
    seconds: wall time of the run. trace: what the guide recorded at each step.
    """

    samples: torch.Tensor
    rows: int
    calls: int
    seconds: float
    trace: dict[int, dict] = field(repr=False)


@torch.no_grad()
def draw(model: DigitDiffusion, labels: torch.Tensor, guide: Guide, seeds: Sequence[int], steps: int = 50) -> Drawing:
    """Draws one digit per label by deterministic DDIM (Song et al. 2021, arXiv 2010.02502, equation 12 with sigma = 0).

    Args:
        model: the digit model.
        labels: [B], int64, which digits.
        guide: asked at every step, in the parameterization "v".
        seeds: one per digit; a digit's noise depends on its own seed alone, so guides can be compared seed by seed.
        steps: of the run.

    Raises:
        ValueError: there is not one seed per label, or as in DigitDiffusion.forward and .times.
    """
    if len(seeds) != len(labels):
        raise ValueError(f"there must be one seed per label, not {len(seeds)} for {len(labels)}")
    times = model.times(steps)
    schedule = Schedule(*zip(*map(alpha_sigma, times), strict=True))
    nothing = torch.full_like(labels, model.unconditional)

    def predict(x, step, name, rows):
        return model(x, times[step.index], (labels if name == "conditional" else nothing)[rows])

    x = model.noise(seeds)
    start = time.perf_counter()
    sampled = sample(guide, predict, schedule, x, "v")
    seconds = time.perf_counter() - start
    return Drawing(sampled.sample, sampled.evaluations, sum(sampled.calls), seconds, sampled.trace)
