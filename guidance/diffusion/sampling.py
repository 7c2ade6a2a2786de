"""A first-order sampler that runs a guide: DDIM, which on a variance-exploding schedule and on a flow is Euler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hasten.guidance.diffusion.guide import TRACE, Guide, Parameterization, Pass, Step
from hasten.guidance.diffusion.lag import FiniteCheck
from hasten.guidance.diffusion.parameterization import denoised, noise
from hasten.guidance.diffusion.schedules import Schedule

Predict = Callable[[torch.Tensor, Step, Pass, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sampled:
    """What a run gives: the samples [B, ...], per step how many rows and how many calls the denoiser was given, and the
    run's memory.
    """

    sample: torch.Tensor
    rows: tuple[int, ...]
    calls: tuple[int, ...]
    memory: dict

    @property
    def evaluations(self) -> int:
        """Rows that the denoiser was given in all: a batch of B counts B."""
        return sum(self.rows)

    @property
    def trace(self) -> dict[int, dict]:
        """What the guide recorded at each step."""
        return self.memory.get(TRACE, {})


def sample(
    guide: Guide, predict: Predict, schedule: Schedule, x: torch.Tensor, parameterization: Parameterization
) -> Sampled:
    """Runs the guide over the schedule from x [B, ...], which is a sample at its first level (sigma * noise where alpha
    is 0 or small).

    Args:
        predict: called as predict(x[rows], step, name, rows) for each pass that the guide asks for, "conditional"
            first; rows [R] are the indices in the batch that are computed, step.sample the whole batch. Returns [R,
            ...], of the given parameterization.

    Raises:
        ValueError: NaN or infinite predictions, with the step's number; a guide for other samplers.
    """
    guide.check_sampler("DDIM", 0.0)
    memory: dict = {}
    counted_rows, counted_calls = [], []
    check = FiniteCheck(len(schedule), x.device)
    everything = torch.arange(len(x), device=x.device)
    for index in range(len(schedule)):
        step = schedule.step(index, x, parameterization, memory)
        wanted, needed = guide.passes(step), guide.rows(step)
        some = everything if needed is None or all(needed) else everything[torch.tensor(needed, device=x.device)]
        predictions = {"conditional": predict(x, step, "conditional", everything)}
        for name in wanted:
            if name != "conditional":
                predictions[name] = predictions["conditional"].clone()
                predictions[name][some] = predict(x[some], step, name, some)
        check(index, *predictions.values())
        counted_rows.append(len(x) + (len(wanted) - 1) * len(some))
        counted_calls.append(len(wanted))

        guided = guide(step.with_predictions(**predictions))
        x0 = denoised(guided, x, step.alpha, step.sigma, parameterization)
        following = step.next_alpha * x0
        if step.next_sigma:
            following = following + step.next_sigma * noise(guided, x, step.alpha, step.sigma, parameterization)
        x = following.to(x.dtype)
    check.finish()
    return Sampled(x, tuple(counted_rows), tuple(counted_calls), memory)
