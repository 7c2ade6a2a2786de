"""Classifier-free guidance and what differs from it only in when it guides: intervals, a fixed cutoff, and two scales
at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
from hasten.guidance.diffusion.intervals import Interval


def combine(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """unconditional + scale * (conditional - unconditional), in any parameterization; at scale 1 the conditional
    prediction bit for bit.
    """
    return conditional if scale == 1 else unconditional + scale * (conditional - unconditional)


def rescaled(prediction: torch.Tensor, conditional: torch.Tensor, rescale: float) -> torch.Tensor:
    """The prediction [B, ...] with its standard deviation over all but the batch drawn towards the conditional's (Lin
    et al. 2023, arXiv 2305.08891, equations 15 and 16), by the fraction `rescale`. It depends on the parameterization
    that it is measured in.
    """
    if rescale == 0 or prediction is conditional:
        return prediction
    ratio = _deviation(conditional) / _deviation(prediction)
    factor = rescale * per_row(ratio, prediction) + (1 - rescale)
    return prediction * factor.to(prediction.dtype)


def _deviation(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)).std(dim=1)


@dataclass(frozen=True)
class ClassifierFreeGuidance(Guide):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): an affine combination whose weights sum to 1,
    hence the same in every parameterization.

    Args:
        scale: off at 1, see `hasten.guidance.diffusion.guide`.
        rescale: in [0, 1], see `rescaled`; measured on the model's own predictions, as published.
        interval: guides only inside (Kynkäänniemi et al. 2024, arXiv 2404.07724); outside, the unconditional pass is
            not asked for. None: always.
    """

    scale: float = 7.5
    rescale: float = 0.0
    interval: Interval | None = None

    def __post_init__(self):
        check_number("scale", self.scale)
        check_number("rescale", self.rescale, 0, 1)
        if self.interval is not None and not isinstance(self.interval, Interval):
            raise ValueError(f"interval must be a SigmaInterval, StepInterval or StepSet, got {self.interval!r}")

    def passes(self, step: Step) -> tuple[Pass, ...]:
        return CONDITIONAL if self._scale(step) == 1 else BOTH

    def __call__(self, step: PredictedStep) -> torch.Tensor:
        scale = self._scale(step)
        step.record({"scale": scale})
        if scale == 1:
            return step.require("conditional")[0]
        conditional, unconditional = step.require("conditional", "unconditional")
        return rescaled(combine(conditional, unconditional, scale), conditional, self.rescale)

    def _scale(self, step):
        return self.scale if self.interval is None or step in self.interval else 1.0


@dataclass(frozen=True)
class Cutoff(Guide):
    """Classifier-free guidance at the first `steps` steps, the conditional prediction alone at the others: 2 * steps +
    (N - steps) evaluations. The fixed stop (Step AG, arXiv 2506.08351) that an adaptive one has to beat.
    """

    scale: float = 7.5
    steps: int = 10

    def __post_init__(self):
        check_number("scale", self.scale)
        check_count("steps", self.steps, 0)

    def passes(self, step: Step) -> tuple[Pass, ...]:
        return BOTH if step.index < self.steps and self.scale != 1 else CONDITIONAL

    def __call__(self, step: PredictedStep) -> torch.Tensor:
        scale = self.scale if step.index < self.steps else 1.0
        step.record({"scale": scale})
        return combine(*step.require(*self.passes(step)), scale) if scale != 1 else step.require("conditional")[0]


@dataclass(frozen=True)
class TwoScaleGuidance(Guide):
    """Guidance by an image and a text at once (Brooks et al. 2022, arXiv 2211.09800, equation 3):
    unconditional + image_scale * (image - unconditional) + text_scale * (conditional - image).

    conditional has both conditions, image the image alone. The sum telescopes: at equal scales the image pass cancels,
    at image_scale 1 the unconditional one, at text_scale = image_scale = 1 both; what cancels is not asked for.
    """

    image_scale: float = 1.6
    text_scale: float = 7.5

    def __post_init__(self):
        check_number("image_scale", self.image_scale)
        check_number("text_scale", self.text_scale)

    def passes(self, step: Step) -> tuple[Pass, ...]:
        wanted = ["conditional"]
        if self.image_scale != 1:
            wanted.append("unconditional")
        if self.image_scale != self.text_scale:
            wanted.append("image")
        return tuple(wanted)

    def __call__(self, step: PredictedStep) -> torch.Tensor:
        step.record({"scale": self.text_scale, "image_scale": self.image_scale})
        predictions = dict(zip(self.passes(step), step.require(*self.passes(step)), strict=True))
        conditional = predictions["conditional"]
        if "image" not in predictions:
            return combine(conditional, predictions.get("unconditional"), self.text_scale)
        if "unconditional" not in predictions:
            return combine(conditional, predictions["image"], self.text_scale)
        guided_image = combine(predictions["image"], predictions["unconditional"], self.image_scale)
        return guided_image + self.text_scale * (conditional - predictions["image"])
