"""Adaptive Guidance (Castillo et al. 2023, arXiv 2312.12487): once both predictions agree, the unconditional pass is no
longer computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from hasten.guidance.diffusion.classifier_free import combine
from hasten.guidance.diffusion.guide import (
    BOTH,
    CONDITIONAL,
    Guide,
    Pass,
    PredictedStep,
    Step,
    check_count,
    check_number,
    per_row,
)
from hasten.guidance.diffusion.lag import Lagged, default_lag
from hasten.guidance.diffusion.parameterization import denoised, noise

Space = Literal["epsilon", "x0", "model"]
_MEMORY = "adaptive_guidance"


def agreement(conditional: torch.Tensor, unconditional: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far two predictions [B, ...] agree, at least in float32, each [B] and on their device: "cosine",
    "update_norm" (of conditional - unconditional) and "conditional_norm".
    """
    wide = torch.promote_types(conditional.dtype, torch.float32)
    c, u = conditional.flatten(1).to(wide), unconditional.flatten(1).to(wide)
    return {
        "cosine": torch.cosine_similarity(c, u, dim=1),
        "update_norm": (c - u).norm(dim=1),
        "conditional_norm": c.norm(dim=1),
    }


@dataclass(frozen=True)
class AdaptiveGuidance(Guide):
    """Classifier-free guidance until the cosine between the conditional and the unconditional prediction of a sample
    reaches a threshold, the conditional prediction alone from the next step on (arXiv 2312.12487, section 5). A run of
    N steps that stops after k costs 2 k + (N - k) evaluations, and is classifier-free guidance bit for bit up to there.

    Per step it records, beside "scale" (1 once all rows have stopped), the "space" and what it measured there:
    `agreement`, NaN in the rows that have stopped. memory["adaptive_guidance"] holds "space", "lag", "guided" (how many
    steps have been) and "stopped" [B] bool.

    Args:
        scale: of classifier-free guidance, off at 1.
        threshold: on the cosine, in [-1, 1]; math.inf never stops, which is classifier-free guidance. Thresholds carry
            over neither between spaces nor between models.
        space: where cosine and norms are measured: on the noise ("epsilon", as published), on "x0", or on what the
            "model" predicts. At high noise both noise predictions are nearly the sample itself, and their cosine nearly
            1, before guidance has done anything.
        min_guided_steps: no stop before so many guided steps, at least 1; against the trap just named.
        batch: "all" keeps guiding all rows until each has reached the threshold once; "rows" lets every row stop by
            itself.
        tolerance: in place of the cosine's threshold: a sample stops once (scale - 1) * update_norm / conditional_norm
            is below it. Unlike the cosine this accounts for the scale. A criterion of ours, not the paper's.
        lag: how many steps late the device's answer is read, so that it need not wait for the host: each adds one
            guided step. None: 0 on CPU, 1 elsewhere.
    """

    scale: float = 7.5
    threshold: float = 0.991
    space: Space = "epsilon"
    min_guided_steps: int = 5
    batch: Literal["all", "rows"] = "all"
    tolerance: float | None = None
    lag: int | None = None

    def __post_init__(self):
        check_number("scale", self.scale)
        if self.threshold != math.inf:
            check_number("threshold (or math.inf: never stop)", self.threshold, -1, 1)
        if self.space not in get_args(Space):
            raise ValueError(f"unknown space {self.space!r}: expected one of {', '.join(get_args(Space))}")
        check_count("min_guided_steps", self.min_guided_steps, 1)
        if self.batch not in ("all", "rows"):
            raise ValueError(f"unknown batch rule {self.batch!r}: expected 'all' or 'rows'")
        if self.tolerance is not None:
            check_number("tolerance", self.tolerance, low=0)
        if self.lag is not None:
            check_count("lag", self.lag, 0)

    def passes(self, step: Step) -> tuple[Pass, ...]:
        return CONDITIONAL if self.scale == 1 or all(self._stopped(step)) else BOTH

    def rows(self, step: Step) -> tuple[bool, ...] | None:
        return tuple(not stopped for stopped in self._stopped(step))

    def __call__(self, step: PredictedStep) -> torch.Tensor:
        stopped = self._stopped(step)
        if self.scale == 1 or all(stopped):
            step.record({"scale": 1.0})
            return step.require("conditional")[0]
        conditional, unconditional = step.require(*BOTH)
        if any(stopped):
            alone = per_row(torch.tensor(stopped, device=conditional.device), conditional)
            unconditional = unconditional.masked_fill(alone, torch.nan)
        self._measure(step, conditional, unconditional)
        guided = combine(conditional, unconditional, self.scale)
        return torch.where(alone, conditional, guided) if any(stopped) else guided

    def _stopped(self, step):
        """Per row of the batch, what the host knows at the beginning of this step."""
        memory = self._memory(step)
        known = memory["answers"].read(step.index)
        return [False] * len(step.sample) if known is None else known[1].tolist()

    def _memory(self, step):
        device = step.sample.device
        if _MEMORY not in step.memory:
            lag = default_lag(device) if self.lag is None else self.lag
            stopped = torch.zeros(len(step.sample), dtype=torch.bool, device=device)
            answers = Lagged(lag)
            step.memory[_MEMORY] = {
                "space": self.space,
                "lag": lag,
                "guided": 0,
                "stopped": stopped,
                "answers": answers,
            }
        return step.memory[_MEMORY]

    def _measure(self, step, conditional, unconditional):
        """Records cosine and norms of the step and, past the guard, which rows have agreed by now."""
        c, u = (self._in_space(step, prediction) for prediction in (conditional, unconditional))
        measured = agreement(c, u)
        step.record({"scale": self.scale, "space": self.space, **measured})
        memory = self._memory(step)
        memory["guided"] += 1
        if memory["guided"] < self.min_guided_steps:
            return
        if self.tolerance is None:
            agreed = measured["cosine"] >= self.threshold
        else:
            agreed = abs(self.scale - 1) * measured["update_norm"] < self.tolerance * measured["conditional_norm"]
        memory["stopped"] = memory["stopped"] | agreed
        memory["answers"].put(
            step.index, memory["stopped"] if self.batch == "rows" else memory["stopped"].all().expand(len(c))
        )

    def _in_space(self, step, prediction):
        wide = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        if self.space == "model":
            return wide
        into = noise if self.space == "epsilon" else denoised
        return into(wide, step.sample, step.alpha, step.sigma, step.parameterization)
