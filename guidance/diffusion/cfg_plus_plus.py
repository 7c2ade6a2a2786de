"""CFG++ (Chung et al. 2024, arXiv 2406.08070) as a guide for first-order samplers; its samplers as such are in
`cfg_plus_plus_samplers`.
"""

from __future__ import annotations

from dataclasses import dataclass

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
)


@dataclass(frozen=True)
class CFGPlusPlus(Guide):
    """CFG++ (Chung et al. 2024, arXiv 2406.08070): x0 is guided, the noise that is put back is the unconditional one
    (algorithm 2).

    In a first-order sampler (DDIM, Euler, Euler on a flow) this is exactly classifier-free guidance with a scale per
    step: with s = sigma / alpha of this step and s' of the next, scale = strength * s / (s - s'). So it runs inside
    unmodified samplers; a sampler of higher order, which reads a prediction more than once, is refused. The scale has
    no limit as steps get finer: at equal strength more steps are stronger guidance. It saves nothing: the unconditional
    pass is needed even at strength 1, but for the last step.

    Args:
        strength: the lambda of the paper, in [0, 1]; 0 is the unconditional model.
        eta: of the sampler: 0 for a deterministic one, 1 for Euler ancestral and DDPM; any other than the sampler's is
            refused. The step then leads down to s_down = sqrt(s'^2 - s_up^2), with
            s_up^2 = eta^2 * s'^2 * (s^2 - s'^2) / s^2.
        reference_steps: the number of steps at which `strength` is meant. On a grid of N steps, each step is then
            guided as on a grid of `reference_steps` that runs through it N / reference_steps times as fast in log s,
            which does have a limit. None: as published.
    """

    strength: float = 0.6
    eta: float = 0.0
    reference_steps: int | None = None

    def __post_init__(self):
        check_number("strength", self.strength, 0, 1)
        check_number("eta", self.eta, 0, 1)
        if self.reference_steps is not None:
            check_count("reference_steps", self.reference_steps, 1)

    def scale(self, step: Step) -> float:
        """The scale of classifier-free guidance that is CFG++ at this step; a ValueError where sigma / alpha does not
        fall.
        """
        # s' / s, finite even at pure noise, where s is not.
        ratio = step.next_sigma * step.alpha / (step.next_alpha * step.sigma)
        if not ratio < 1:
            raise ValueError(
                f"step {step.index}: CFG++ needs sigma / alpha to fall, here it is {ratio:g} times as large "
                "at the next step"
            )
        ratio *= (1 - self.eta**2 * (1 - ratio**2)) ** 0.5
        if self.reference_steps is not None:
            ratio **= step.count / self.reference_steps
        return self.strength / (1 - ratio)

    def check_sampler(self, sampler: str, eta: float | None) -> None:
        if eta is None:
            raise ValueError(
                f"CFG++ is a guide for first-order samplers, and {sampler} reads earlier predictions too "
                "or draws all noise anew; use DDIM or Euler"
            )
        if eta != self.eta:
            raise ValueError(
                f"{self} is meant for another sampler than {sampler}: here it must be CFGPlusPlus(eta={eta:g})"
            )

    def passes(self, step: Step) -> tuple[Pass, ...]:
        return CONDITIONAL if self.scale(step) == 1 else BOTH

    def __call__(self, step: PredictedStep) -> torch.Tensor:
        scale = self.scale(step)
        step.record({"scale": scale})
        if scale == 1:
            return step.require("conditional")[0]
        return combine(*step.require(*BOTH), scale)
