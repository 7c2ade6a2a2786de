"""The contract of guidance for diffusion: a guide combines what a denoiser predicts at one step.

A guide is a frozen dataclass; its fields are its whole configuration, and what it carries from step to step lies in the run's `memory`. At each step
it is asked twice: `passes(step)`, before the denoiser runs, says which predictions it needs, so that what is not needed is never computed; and
`guide(state)` combines them into one prediction of the same parameterisation.

Guidance scales count as in Imagen and diffusers: `unconditional + scale * (conditional - unconditional)`, off at 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

Parameterization = Literal["epsilon", "sample", "v", "flow"]
Pass = Literal["conditional", "unconditional", "image"]


@dataclass(frozen=True)
class Step:
    """One step of a run, before its predictions.

    sample: x_t = alpha * x0 + sigma * noise, [B, ...]; alpha and sigma are those of this step, next_alpha and next_sigma of the one that follows
    (next_sigma is 0 where this step is the last). index counts the run's steps from 0 and count is how many there are. parameterization says what the
    denoiser predicts: the noise ("epsilon"), x0 ("sample"), alpha * noise - sigma * x0 ("v"), or noise - x0 ("flow", where alpha = 1 - sigma).
    memory is the run's: guides keep there what they carry from step to step.
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


@dataclass(frozen=True)
class State(Step):
    """A step with its predictions, each [B, ...] like `sample`. None: that pass was not computed.

    `image` is the prediction with the image condition alone, for guidance with two scales.
    """

    conditional: torch.Tensor = None
    unconditional: torch.Tensor | None = None
    image: torch.Tensor | None = None


class Guide:
    """What all guides share: by default both passes at every step."""

    def passes(self, step: Step) -> tuple[Pass, ...]:
        """Which predictions `__call__` needs at this step, "conditional" always among them."""
        return ("conditional", "unconditional")

    def __call__(self, state: State) -> torch.Tensor:
        """One prediction [B, ...], in state.parameterization."""
        raise NotImplementedError
