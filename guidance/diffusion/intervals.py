"""At which steps of a run to guide, by noise level, by place in the run, or step by step: `step in interval`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hasten.guidance.diffusion.guide import CONDITIONAL, Guide, Pass, PredictedStep, Step, check_number


class Interval:
    """What all intervals share."""

    def __contains__(self, step: Step) -> bool:
        raise NotImplementedError


@dataclass(frozen=True)
class SigmaInterval(Interval):
    """Steps whose noise level lies in (low, high], as in Kynkäänniemi et al. 2024 (arXiv 2404.07724).

    The level is that of EDM and of variance-exploding schedules, sigma / alpha of the step, whatever the schedule: it
    keeps its meaning when the number of steps or the shift changes. It is infinite at pure noise.
    """

    low: float
    high: float = math.inf

    def __post_init__(self):
        check_number("low", self.low, 0)
        if self.high != math.inf:
            check_number("high (or math.inf)", self.high, 0)
        if not self.low < self.high:
            raise ValueError(f"expected 0 <= low < high, got low={self.low!r} and high={self.high!r}")

    def __contains__(self, step: Step) -> bool:
        level = step.sigma / step.alpha if step.alpha else math.inf
        return self.low < level <= self.high


@dataclass(frozen=True)
class StepInterval(Interval):
    """Steps int(start * N) <= index < int(stop * N) of N, the rule of the guiders of diffusers: fractions of the run,
    in [0, 1].
    """

    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self):
        check_number("start", self.start, 0, 1)
        check_number("stop", self.stop, 0, 1)
        if self.start > self.stop:
            raise ValueError(f"start must not be above stop, got start={self.start!r} and stop={self.stop!r}")

    def __contains__(self, step: Step) -> bool:
        return int(self.start * step.count) <= step.index < int(self.stop * step.count)


@dataclass(frozen=True)
class StepSet(Interval):
    """Exactly the steps with these indices, counted from 0."""

    indices: tuple[int, ...]

    def __init__(self, indices: Iterable[int]):
        indices = tuple(indices)
        if not all(isinstance(index, int) and index >= 0 for index in indices):
            raise ValueError(f"indices must be integers of at least 0, got {indices!r}")
        object.__setattr__(self, "indices", tuple(sorted(set(indices))))

    def __contains__(self, step: Step) -> bool:
        return step.index in self.indices


@dataclass(frozen=True)
class Within(Guide):
    """Another guide inside an interval, the conditional prediction alone outside:
    `Within(AdaptiveProjectedGuidance(...), SigmaInterval(0.28, 5.42))`.
    """

    guide: Guide
    interval: Interval

    def __post_init__(self):
        if not isinstance(self.guide, Guide) or not isinstance(self.interval, Interval):
            raise ValueError(f"expected a guide and an interval, got {self.guide!r} and {self.interval!r}")

    def passes(self, step: Step) -> tuple[Pass, ...]:
        return self.guide.passes(step) if step in self.interval else CONDITIONAL

    def check_sampler(self, sampler: str, eta: float | None) -> None:
        self.guide.check_sampler(sampler, eta)

    def rows(self, step: Step) -> tuple[bool, ...] | None:
        return self.guide.rows(step) if step in self.interval else None

    def __call__(self, step: PredictedStep) -> torch.Tensor:
        if step in self.interval:
            return self.guide(step)
        step.record({"scale": 1.0})
        return step.require("conditional")[0]
