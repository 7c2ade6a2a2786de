"""A guide's session with one pipeline: what a wrapped denoising loop and a guider component have in common.

A call of the pipeline is `begin`, and each of its steps is `open` (the guide says which passes it needs), `combine`
(the guide's prediction, checked) and `close` (the step goes into the record).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hasten.errors import StateError
from hasten.guidance.diffusion.adaptive import agreement
from hasten.guidance.diffusion.guide import Guide, Parameterization, Pass, Step
from hasten.guidance.diffusion.lag import FiniteCheck
from hasten.pipelines import schedulers
from hasten.pipelines.record import PipelineCall, Run, StepRecord
from hasten.pipelines.schedulers import Timestep

Rescale = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class GuidedCall:
    """A call of the pipeline while it runs.

    Its step i of `count` is evaluated at timesteps[first + i]. record: its entry in the run. memory: what the guide
    carries from step to step. batch: the number of samples, None until the first step is closed.
    """

    timesteps: tuple[Timestep, ...]
    first: int
    count: int
    parameterization: Parameterization
    record: PipelineCall
    started: float
    memory: dict = field(default_factory=dict)
    finite: FiniteCheck | None = None
    batch: int | None = None


@dataclass(slots=True)
class GuidedStep:
    """A step of a call while it runs: x_t as the denoiser got it, and the passes that the guide asks for.

    predictions: those that were computed, [B, ...] each, once they are combined.
    """

    step: Step
    passes: tuple[Pass, ...]
    predictions: dict[Pass, torch.Tensor] = field(default_factory=dict)


class Session:
    """A guide and a scheduler over the calls of one pipeline, and the run that they are recorded in.

    Args:
        available: the passes that the pipeline can make.

    Attributes:
        call: the call that runs, None before the first.
        step: the step that is open, None between steps.
    """

    def __init__(self, guide: Guide, scheduler: Any, run: Run, available: tuple[Pass, ...]):
        self.guide, self.scheduler, self.run, self.available = guide, scheduler, run, available
        self.reset()

    def reset(self) -> None:
        """Forgets a call that has ended, or failed on the way; its record stays in the run."""
        self.call: GuidedCall | None = None
        self.step: GuidedStep | None = None

    def check_sampler(self, eta: float | None = None) -> None:
        """Asks the guide whether it is meant for this scheduler.

        Args:
            eta: of this call; None: the scheduler's own.

        Raises:
            ValueError: it is not.
        """
        eta = schedulers.eta(self.scheduler) if eta is None else eta
        self.guide.check_sampler(type(self.scheduler).__name__, eta)

    def begin(self, timesteps: tuple[Timestep, ...], first: int, count: int) -> None:
        """Begins a call of `count` steps at timesteps[first], with an empty memory."""
        record = PipelineCall(type(self.scheduler).__name__)
        self.run.pipeline_calls.append(record)
        parameterization = schedulers.parameterization(self.scheduler)
        self.reset()
        self.call = GuidedCall(timesteps, first, count, parameterization, record, time.perf_counter())

    def open(self, index: int, hidden: torch.Tensor) -> tuple[Pass, ...]:
        """Begins step `index` at x_t [B, ...] as the denoiser gets it: the passes that the guide asks for.

        Raises:
            StateError: the call has no more steps.
            ValueError: the guide asks for a pass that the pipeline does not make, or for no conditional one.
        """
        call = self.call
        if call.first + index >= len(call.timesteps):
            raise StateError(
                f"{self.run.pipeline} makes more than {index} steps, which is all that its scheduler has for this call"
            )
        step = self._step(index, hidden * call.timesteps[call.first + index].level.to_sample)
        passes = self.guide.passes(step)
        if "conditional" not in passes or set(passes) - set(self.available):
            raise ValueError(
                f"the guide {self.guide} asks for {passes} at step {index}; {self.run.pipeline} makes "
                f"{self.available}, and the conditional pass is always among them"
            )
        self.step = GuidedStep(step, passes)
        return passes

    def combine(
        self,
        predictions: dict[Pass, torch.Tensor],
        dtype: torch.dtype,
        sample: torch.Tensor | None = None,
        rescale: Rescale | None = None,
    ) -> torch.Tensor:
        """What the guide makes of the predictions, [B, ...], in `dtype`.

        How far the conditional and the unconditional prediction agree is recorded, unless the guide has recorded it.

        Args:
            predictions: one for each pass that was computed.
            sample: x_t as the scheduler has it, if that is known more exactly than from the denoiser's input.
            rescale: applied as rescale(prediction, conditional) wherever the guide guides: where its prediction is not
                the conditional one itself.

        Raises:
            ValueError: the guide's prediction is no tensor of the sample's shape, or a prediction is not finite; on an
                accelerator the latter comes up to one step late.
        """
        step = self.step.step if sample is None else self._step(self.step.step.index, sample)
        self.step.predictions = predictions
        prediction = self.guide(step.with_predictions(**predictions))
        if not isinstance(prediction, torch.Tensor) or prediction.shape != step.sample.shape:
            found = tuple(prediction.shape) if isinstance(prediction, torch.Tensor) else prediction
            raise ValueError(
                f"step {step.index}: the guide {self.guide} returned {found}, "
                f"expected a tensor {tuple(step.sample.shape)}"
            )
        conditional = predictions["conditional"]
        if "unconditional" in predictions and "cosine" not in step.recorded:
            step.record({"space": "model", **agreement(conditional, predictions["unconditional"])})
        if rescale is not None and prediction is not conditional:
            prediction = rescale(prediction, conditional)
        prediction = prediction.to(dtype)
        self._check_finite(step.index, *predictions.values(), prediction)
        return prediction

    def close(self, calls: int) -> None:
        """Ends the step, for whose predictions the denoiser was called `calls` times, and records it."""
        call, step, predictions = self.call, self.step.step, self.step.predictions
        call.batch = len(predictions["conditional"])
        call.record.steps.append(
            StepRecord(
                index=step.index,
                sigma=step.sigma,
                rows=sum(len(prediction) for prediction in predictions.values()),
                calls=calls,
                full=call.batch * len(self.available),
                recorded=step.recorded,
            )
        )
        call.record.seconds = time.perf_counter() - call.started
        self.step = None

    def _step(self, index: int, sample: torch.Tensor) -> Step:
        """The guide's step at the scheduler's sample [B, ...]."""
        call = self.call
        at = call.timesteps[call.first + index]
        return Step(
            sample=sample * at.level.to_guide if at.level.to_guide != 1 else sample,
            alpha=at.level.alpha,
            sigma=at.level.sigma,
            next_alpha=at.end.alpha,
            next_sigma=at.end.sigma,
            index=index,
            count=call.count,
            parameterization=call.parameterization,
            memory=call.memory,
        )

    def _check_finite(self, index: int, *predictions: torch.Tensor) -> None:
        call = self.call
        if call.finite is None:
            call.finite = FiniteCheck(call.count, predictions[-1].device)
        call.finite(index, *predictions)
        if index + 1 == call.count:
            call.finite.finish()
