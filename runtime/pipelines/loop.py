"""Inside `hasten.guided`: the wrappers around a pipeline's denoiser and its scheduler's step, and what passes between the two in one step.

The denoiser's wrapper computes the passes that the guide asks for and remembers them. The scheduler's `step` is where x_t is exact and where the
guide's prediction takes the place of the pipeline's own combination, whatever that does (scales, norms, casts).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from hasten.errors import StateError
from hasten.guidance.diffusion.guide import Guide, Pass, Step
from hasten.guidance.diffusion.lag import FiniteCheck
from hasten.pipelines import schedulers
from hasten.pipelines.families import Family
from hasten.pipelines.passes import fill, fill_all, split, take
from hasten.pipelines.predictions import asked_passes, guided_prediction
from hasten.pipelines.record import PipelineCall, Run


class Loop:
    """The wrappers for one pipeline under one guide. `install` puts them in place, also again, and `uninstall` takes them off."""

    def __init__(self, pipe: Any, family: Family, guide: Guide, run: Run, rescale: bool):
        self.pipe, self.family, self.guide, self.run, self.rescale = pipe, family, guide, run, rescale
        self.scheduler = pipe.scheduler
        self.patches: list[tuple[Any, str, Any, Callable]] = []
        self.call: PipelineCall | None = None
        self.step: Step | None = None

    def install(self) -> None:
        """Wraps whatever is not wrapped yet: offloading puts a new forward on a denoiser after each call of the pipeline."""
        for names, wrapper in ((self.family.denoisers, self._denoise), (self.family.beside, self._beside)):
            for module in (getattr(self.pipe, name, None) for name in names):
                if module is None:
                    continue
                # A module compiled in place runs this instead of its forward.
                compiled = getattr(module, "_compiled_call_impl", None) is not None
                self._patch(module, "_compiled_call_impl" if compiled else "forward", wrapper)
        self._patch(self.scheduler, "set_timesteps", self._start)
        self._patch(self.scheduler, "step", self._finish)

    def uninstall(self) -> None:
        while self.patches:
            owner, name, saved, ours = self.patches.pop()
            if vars(owner).get(name) is not ours:
                continue
            if saved is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, saved)

    def _patch(self, owner: Any, name: str, wrapper: Callable) -> None:
        inner = getattr(owner, name)
        wrapped = getattr(inner, "hasten_loop", self)
        if wrapped is not self:
            raise StateError(
                f"the {type(owner).__name__} is guided already, as part of another pipeline; leave that block first"
            )
        if hasattr(inner, "hasten_loop"):
            return

        @functools.wraps(inner)  # pipelines read the signatures of these methods
        def ours(*args, **kwargs):
            return wrapper(inner, *args, **kwargs)

        ours.hasten_loop = self
        self.patches.append((owner, name, vars(owner).get(name, _ABSENT), ours))
        setattr(owner, name, ours)

    def _start(self, set_timesteps: Callable, *args, **kwargs) -> None:
        """Every call of a pipeline sets its timesteps once, before its loop."""
        set_timesteps(*args, **kwargs)
        self.install()
        self.call, self.step = None, None

    def _begin(self, hidden: Any) -> None:
        """The first evaluation of a call of the pipeline: where in the scheduler's timesteps it begins, and a new memory."""
        if self.pipe.scheduler is not self.scheduler:
            raise StateError("the pipeline's scheduler was replaced inside hasten.guided; set it before")
        self.schedule = schedulers.schedule(self.scheduler)
        self.count = self.pipe.num_timesteps
        begin = getattr(self.scheduler, "begin_index", None)
        self.begin = len(self.schedule.timesteps) - self.count if begin is None else begin
        self.index, self.batch, self.memory = 0, None, {}
        self.finite = FiniteCheck(self.count, hidden[0].device)
        self.call = PipelineCall(type(self.scheduler).__name__)
        self.run.pipeline_calls.append(self.call)
        self.started = time.perf_counter()

    def _open(self, hidden: Any) -> None:
        """Begins a step at its first call of the denoiser, which got x_t as `hidden`: asks the guide which passes it needs."""
        if self.call is None:
            self._begin(hidden)
        if self.index >= self.count or self.begin + self.index >= len(self.schedule.levels):
            raise StateError(
                f"the pipeline makes more than its {self.count} steps; the scheduler's timesteps were changed on the way"
            )
        ways = len(self.family.order) if self.family.layout == "batched" else 1
        rows = len(hidden)
        self.guided = (ways == 1 or rows == ways * self.batch) if self.batch else self._pipeline_guides()
        batch = rows // ways if self.guided else rows
        sample = torch.stack(hidden[:batch]).squeeze(2) if self.family.lists else hidden[:batch]
        if self.family.more_channels:
            sample = sample[:, : self.pipe.unet.config.out_channels]
        self.step = self._step(sample * self._level().to_sample)
        self.passes = asked_passes(self.guide, self.step, self.family.order, self.run.pipeline)
        self.outputs: dict[Pass, Any] = {}
        self.rows = self.calls = 0
        if not self.guided and len(self.passes) > 1:
            self._refuse_unguided()

    def _pipeline_guides(self) -> bool:
        return self.family.layout == "sequential" or self.pipe.do_classifier_free_guidance

    def _refuse_unguided(self) -> None:
        missing = ", ".join(name for name in self.passes if name != "conditional")
        raise ValueError(
            f"step {self.index}: the guide {self.guide} needs the {missing} prediction, and this call of {self.run.pipeline} makes no such pass "
            f"({self.family.off})"
        )

    def _level(self) -> schedulers.Level:
        return self.schedule.levels[self.begin + self.index]

    def _step(self, sample: torch.Tensor) -> Step:
        return self._level().step(
            self.schedule.ends[self.begin + self.index],
            sample,
            index=self.index,
            count=self.count,
            parameterization=self.schedule.parameterization,
            memory=self.memory,
        )

    def _hidden(self, args: tuple, kwargs: dict) -> Any:
        return args[0] if args else kwargs[self.family.input]

    def _denoise(self, forward: Callable, *args, **kwargs) -> Any:
        hidden = self._hidden(args, kwargs)
        if self.step is None:
            self._open(hidden)
        if kwargs.get("skip_layers") is not None:
            raise ValueError(
                "skip_guidance_layers is guidance of the pipeline's own, which hasten.guided replaces; leave it out"
            )
        if self.family.layout == "sequential":
            return self._next_pass(forward, hidden, args, kwargs)
        return self._batch(forward, hidden, args, kwargs)

    def _next_pass(self, forward: Callable, hidden: Any, args: tuple, kwargs: dict) -> Any:
        """One pass for each call, the conditional one first. For one that the guide does not need, the loop gets that first one again."""
        if len(self.outputs) == len(self.family.order):
            raise StateError(
                f"step {self.index}: {self.run.pipeline} calls its denoiser more than {len(self.outputs)} times in a step"
            )
        name = self.family.order[len(self.outputs)]
        if name in self.passes:
            self.outputs[name] = forward(*args, **kwargs)
            self.rows, self.calls = self.rows + len(hidden), self.calls + 1
        else:
            self.outputs[name] = self.outputs["conditional"]
        return self.outputs[name]

    def _batch(self, forward: Callable, hidden: Any, args: tuple, kwargs: dict) -> Any:
        """All passes along the batch. The loop gets as many rows as it gave, the conditional ones where others were left out."""
        if self.outputs:
            raise StateError(f"step {self.index}: {self.run.pipeline} calls its denoiser more than once in a step")
        order, kept = self._order(), self._kept()
        inputs = take((args, kwargs), len(hidden), order, kept, self.family.lists)
        output, *rest = forward(*inputs[0], **inputs[1])
        self.rows, self.calls = len(output), 1
        self.outputs = split(output, kept)
        return (fill(output, order, kept), *rest)

    def _beside(self, forward: Callable, *args, **kwargs) -> Any:
        """A ControlNet gets the same batch as the denoiser, except in guess mode, where it only gets the conditional rows."""
        if kwargs.get("guess_mode"):
            return forward(*args, **kwargs)
        hidden = self._hidden(args, kwargs)
        if self.step is None:
            self._open(hidden)
        order, kept = self._order(), self._kept()
        inputs = take((args, kwargs), len(hidden), order, kept, self.family.lists)
        return fill_all(forward(*inputs[0], **inputs[1]), order, kept)

    def _order(self) -> tuple[Pass, ...]:
        """The passes that the loop puts along this step's batch."""
        return self.family.order if self.guided else ("conditional",)

    def _kept(self) -> tuple[Pass, ...]:
        """Those that are computed."""
        return tuple(name for name in self._order() if name in self.passes)

    def _finish(
        self, step: Callable, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args, **kwargs
    ) -> Any:
        """Ends a step: the guide combines what was computed, and the scheduler steps with that."""
        if self.step is None or "conditional" not in self.outputs:
            raise StateError(
                "the scheduler steps without a prediction of the denoiser that hasten wrapped; was it replaced on the way?"
            )
        self._check_place(timestep, sample, kwargs.get("eta"))
        predictions = {name: self.family.to_sample(output if self.family.layout == "batched" else output[0])
                       for name, output in self.outputs.items() if name in self.passes}  # fmt: skip
        if len(predictions) < len(self.passes):
            self._refuse_unguided()
        prediction = guided_prediction(self.guide, self._step(sample).with_predictions(**predictions))
        # A guide that does not guide at this step returns the conditional prediction itself; with one pass it may guide by an estimate.
        if self.rescale and prediction is not predictions["conditional"]:
            prediction = self.family.rescale(self.pipe, prediction, predictions["conditional"])
        prediction = prediction.to(model_output.dtype)
        self.finite(self.index, *predictions.values(), prediction)
        if self.index + 1 == self.count:
            self.finite.finish()
        result = step(prediction, timestep, sample, *args, **kwargs)
        self.call.add(self.step, self.rows, self.calls, full=len(sample) * len(self.family.order))
        self.call.seconds = time.perf_counter() - self.started
        self.step, self.index, self.batch = None, self.index + 1, len(sample)
        return result

    def _check_place(self, timestep: Any, sample: torch.Tensor, eta: float | None) -> None:
        """Once in a call of the pipeline, since reading a timestep may wait for the device: is this the step that we take it for?"""
        if self.index:
            return
        self.guide.check_sampler(self.call.scheduler, schedulers.eta(self.scheduler) if eta is None else eta)
        expected = self.schedule.timesteps[self.begin]
        if abs(float(timestep) - expected) > 1e-3 * max(abs(expected), 1):
            raise ValueError(
                f"the loop begins at timestep {float(timestep):g}, expected {expected:g}, {self.count} steps before the end of the scheduler's: "
                "a run that stops before its last step is not supported"
            )
        if len(sample) != len(self.step.sample):
            raise ValueError(
                f"the loop's batch holds {len(sample)} samples, its denoiser got {len(self.step.sample)}: {self.family.off}?"
            )


_ABSENT = object()
