"""The contract of guidance for diffusion: a guide combines what a denoiser predicts at one step.

A guide is a frozen dataclass; its fields are its whole configuration, and what it carries from step to step lies in the
run's `memory`. At each step it is asked twice: `passes(step)`, before the denoiser runs, says which predictions it
needs, so that what is not needed is never computed; and `guide(step)`, with these predictions, combines them into one
of the same parameterization.

Guidance scales count as in Imagen (Saharia et al. 2022, arXiv 2205.11487) and in diffusers:
`unconditional + scale * (conditional - unconditional)`, off at 1. A scale w of Ho & Salimans (2022, arXiv 2207.12598,
equation 6) is 1 + w here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch

Parameterization = Literal["epsilon", "sample", "v", "flow"]
Pass = Literal["conditional", "unconditional", "image"]
CONDITIONAL: tuple[Pass, ...] = ("conditional",)
BOTH: tuple[Pass, ...] = ("conditional", "unconditional")
TRACE = "trace"  # memory[TRACE][index]: what the guides recorded at step `index`, by name


@dataclass(frozen=True)
class Step:
    """One step of a run, before its predictions.

    sample: x_t = alpha * x0 + sigma * noise, [B, ...]; alpha and sigma are those of this step, next_alpha and
    next_sigma where the sampler's step leads (next_sigma is 0 at most where this step is the last). index counts the
    run's steps from 0 and count is how many there are. parameterization says what the denoiser predicts: the noise
    ("epsilon"), x0 ("sample"), alpha * noise - sigma * x0 ("v"), or noise - x0 ("flow", where alpha = 1 - sigma).
    memory is the run's: guides keep there what they carry from step to step, and under TRACE what they record for the
    reader.
    """

    sample: torch.Tensor
    alpha: float
    sigma: float
    next_alpha: float
    next_sigma: float
    index: int
    count: int
    parameterization: Parameterization
    memory: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        check_parameterization(self.parameterization)

    def with_predictions(
        self,
        conditional: torch.Tensor,
        unconditional: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
    ) -> PredictedStep:
        """This step with its predictions: what a guide combines."""
        step = {item.name: getattr(self, item.name) for item in fields(Step)}
        return PredictedStep(**step, conditional=conditional, unconditional=unconditional, image=image)

    def record(self, values: Mapping[str, Any]) -> None:
        """Adds to what the run's trace holds for this step: floats, or tensors that stay on their device (no copy, no
        wait).
        """
        self.memory.setdefault(TRACE, {}).setdefault(self.index, {}).update(values)

    @property
    def recorded(self) -> Mapping[str, Any]:
        """What the run's trace holds for this step."""
        return self.memory.get(TRACE, {}).get(self.index, {})


@dataclass(frozen=True)
class PredictedStep(Step):
    """A step with its predictions, each [B, ...] like `sample`. None: that pass was not computed.

    `image` is the prediction with the image condition alone, for guidance with two scales.
    """

    conditional: torch.Tensor = None
    unconditional: torch.Tensor | None = None
    image: torch.Tensor | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in get_args(Pass):
            prediction = getattr(self, name)
            if prediction is not None and prediction.shape != self.sample.shape:
                raise ValueError(
                    f"step {self.index}: the {name} prediction has shape {tuple(prediction.shape)}, "
                    f"the sample {tuple(self.sample.shape)}"
                )

    def require(self, *names: Pass) -> tuple[torch.Tensor, ...]:
        """The named predictions; a ValueError names one that was not computed."""
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(
                    f"step {self.index}: the {name} prediction is missing; compute what guide.passes(step) asks for"
                )
        return tuple(getattr(self, name) for name in names)


class Guide:
    """What all guides share: by default both passes at every step, for all rows."""

    def passes(self, step: Step) -> tuple[Pass, ...]:
        """Which predictions `__call__` needs at this step, "conditional" always among them."""
        return BOTH

    def rows(self, step: Step) -> tuple[bool, ...] | None:
        """For which rows of the batch the passes beside the conditional one are needed; None: for all.

        It is free to whoever runs the guide to compute them for all rows nevertheless: the guide reads what it asked
        for and no more, so in a row that it did not ask for a prediction may hold anything finite.
        """
        return None

    def check_sampler(self, sampler: str, eta: float | None) -> None:
        """A ValueError if this guide is something else in the sampler of this name than what it says it is; by default
        it is the same in all.

        Args:
            eta: how much noise its steps, of first order, draw anew: 0 none (DDIM, Euler), 1 as Euler ancestral. None:
                its steps are no such steps.
        """

    def __call__(self, step: PredictedStep) -> torch.Tensor:
        """One prediction [B, ...], in step.parameterization."""
        raise NotImplementedError


def check_parameterization(name: str) -> None:
    """A ValueError unless name is a `Parameterization`."""
    if name not in get_args(Parameterization):
        raise ValueError(f"unknown prediction type {name!r}: expected one of {', '.join(get_args(Parameterization))}")


def check_number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> None:
    """A ValueError unless value is a finite number in [low, high]."""
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        bounds = "" if low == -math.inf and high == math.inf else f" in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be a finite number{bounds}, got {value!r}")


def check_count(name: str, value: int, low: int) -> None:
    """A ValueError unless value is an integer of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


def per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] as [B, 1, ...], to be combined with `like` [B, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
