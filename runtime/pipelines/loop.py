"""Inside `hasten.guided`: the wrappers around a pipeline's denoiser and its scheduler's step.

The denoiser's wrapper computes the passes that the guide asks for. In the scheduler's `step`, where x_t is exact, the
guide's prediction takes the place of what the pipeline itself combined, whatever that does (scales, norms, casts).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hasten.errors import StateError
from hasten.guidance.diffusion.guide import Guide, Pass
from hasten.pipelines import schedulers
from hasten.pipelines.families import Family
from hasten.pipelines.passes import fill, fill_all, split, take
from hasten.pipelines.record import Run
from hasten.pipelines.session import Session


class Loop:
    """The wrappers for one pipeline under one guide: `install` puts them on, also again, `uninstall` takes them off."""

    def __init__(self, pipe: Any, family: Family, guide: Guide, run: Run, rescale: bool):
        self.pipe, self.family = pipe, family
        self.session = Session(guide, pipe.scheduler, run, family.order)
        self.rescale = functools.partial(family.rescale, pipe) if rescale else None
        self.patches: list[tuple[Any, str, Any, Callable]] = []

    def install(self) -> None:
        """Wraps whatever is not wrapped yet: offloading puts a new forward on a denoiser after each call of the
        pipeline.
        """
        for names, wrapper in ((self.family.denoisers, self._denoise), (self.family.beside, self._beside)):
            for module in (getattr(self.pipe, name, None) for name in names):
                if module is None:
                    continue
                # A module compiled in place runs this instead of its forward.
                compiled = getattr(module, "_compiled_call_impl", None) is not None
                self._patch(module, "_compiled_call_impl" if compiled else "forward", wrapper)
        self._patch(self.session.scheduler, "set_timesteps", self._start)
        self._patch(self.session.scheduler, "step", self._finish)

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
        self.session.reset()

    def _begin(self) -> None:
        """The first evaluation of a call of the pipeline: finds where in the scheduler's timesteps it begins."""
        scheduler = self.session.scheduler
        if self.pipe.scheduler is not scheduler:
            raise StateError("the pipeline's scheduler was replaced inside hasten.guided; set it before")
        timesteps, count = schedulers.timesteps(scheduler), self.pipe.num_timesteps
        first = getattr(scheduler, "begin_index", None)
        if first is None:
            first = len(timesteps) - count
        self.session.begin(timesteps[: first + count], first, count)

    def _open(self, hidden: Any) -> None:
        """Begins a step at its first call of the denoiser, which gets x_t as `hidden`: asks the guide for its passes.

        order: the passes that the loop computes in this step. outputs: the denoiser's, by pass, as the loop gets them.
        """
        if self.session.call is None:
            self._begin()
        self.order: tuple[Pass, ...] = self._order(len(hidden))
        self.outputs: dict[Pass, Any] = {}
        batch = len(hidden) // len(self.order) if self.family.layout == "batched" else len(hidden)
        sample = torch.stack(hidden[:batch]).squeeze(2) if self.family.lists else hidden[:batch]
        if self.family.more_channels:
            sample = sample[:, : self.pipe.unet.config.out_channels]
        passes = self.session.open(len(self.session.call.record.steps), sample)
        if self.order != self.family.order and len(passes) > 1:
            self._refuse_unguided()

    def _order(self, rows: int) -> tuple[Pass, ...]:
        """The passes of a step whose first call of the denoiser gets so many rows.

        A batched loop may guide at some steps only, and then gives the conditional rows alone at the others.
        """
        batch = self.session.call.batch
        if self.family.layout == "sequential":
            guided = True
        elif batch is None:
            guided = self.pipe.do_classifier_free_guidance
        else:
            guided = rows == len(self.family.order) * batch
        return self.family.order if guided else ("conditional",)

    def _refuse_unguided(self) -> None:
        opened, run = self.session.step, self.session.run
        missing = ", ".join(name for name in opened.passes if name != "conditional")
        raise ValueError(
            f"step {opened.step.index}: the guide {run.guide} needs the {missing} prediction, "
            f"and this call of {run.pipeline} makes no such pass ({self.family.off})"
        )

    def _refuse_calls(self, expected: str) -> None:
        raise StateError(
            f"step {self.session.step.step.index}: {self.session.run.pipeline} calls its denoiser more than {expected} "
            "in a step"
        )

    def _hidden(self, args: tuple, kwargs: dict) -> Any:
        return args[0] if args else kwargs[self.family.input]

    def _denoise(self, forward: Callable, *args, **kwargs) -> Any:
        hidden = self._hidden(args, kwargs)
        if self.session.step is None:
            self._open(hidden)
        if kwargs.get("skip_layers") is not None:
            raise ValueError(
                "skip_guidance_layers is guidance of the pipeline's own, which hasten.guided replaces; leave it out"
            )
        if self.family.layout == "sequential":
            return self._next_pass(forward, args, kwargs)
        return self._batch(forward, hidden, args, kwargs)

    def _next_pass(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """One pass for each call, the conditional one first. For one that the guide does not need, the loop gets that
        first one again.
        """
        if len(self.outputs) == len(self.order):
            self._refuse_calls(f"{len(self.outputs)} times")
        name = self.order[len(self.outputs)]
        computed = name in self.session.step.passes
        self.outputs[name] = forward(*args, **kwargs) if computed else self.outputs["conditional"]
        return self.outputs[name]

    def _batch(self, forward: Callable, hidden: Any, args: tuple, kwargs: dict) -> Any:
        """All passes along the batch. The loop gets as many rows as it gave, the conditional ones where others were
        left out.
        """
        if self.outputs:
            self._refuse_calls("once")
        kept = self._kept()
        inputs = take((args, kwargs), len(hidden), self.order, kept, self.family.lists)
        output, *rest = forward(*inputs[0], **inputs[1])
        self.outputs = split(output, kept)
        return (fill(output, self.order, kept), *rest)

    def _beside(self, forward: Callable, *args, **kwargs) -> Any:
        """A ControlNet gets the same batch as the denoiser, except in guess mode, where it only gets the conditional
        rows.
        """
        if kwargs.get("guess_mode"):
            return forward(*args, **kwargs)
        hidden = self._hidden(args, kwargs)
        if self.session.step is None:
            self._open(hidden)
        kept = self._kept()
        inputs = take((args, kwargs), len(hidden), self.order, kept, self.family.lists)
        return fill_all(forward(*inputs[0], **inputs[1]), self.order, kept)

    def _kept(self) -> tuple[Pass, ...]:
        """The passes of this step's batch that are computed."""
        return tuple(name for name in self.order if name in self.session.step.passes)

    def _finish(
        self, step: Callable, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args, **kwargs
    ) -> Any:
        """Ends a step: the guide combines what was computed, and the scheduler steps with that."""
        opened, sequential = self.session.step, self.family.layout == "sequential"
        if opened is None or "conditional" not in self.outputs:
            raise StateError(
                "the scheduler steps without a prediction of the denoiser that hasten wrapped; "
                "was it replaced on the way?"
            )
        # Once in a call of the pipeline, since reading a timestep may wait for the device.
        if opened.step.index == 0:
            self._check_place(timestep, sample, kwargs.get("eta"))
        computed = {name: output for name, output in self.outputs.items() if name in opened.passes}
        if len(computed) < len(opened.passes):
            self._refuse_unguided()
        predictions = {
            name: self.family.to_sample(output[0] if sequential else output) for name, output in computed.items()
        }
        prediction = self.session.combine(predictions, model_output.dtype, sample, self.rescale)
        result = step(prediction, timestep, sample, *args, **kwargs)
        self.session.close(calls=len(predictions) if sequential else 1)
        return result

    def _check_place(self, timestep: Any, sample: torch.Tensor, eta: float | None) -> None:
        """Is the scheduler's first step the one that it was taken for?"""
        self.session.check_sampler(eta)
        call, rows = self.session.call, len(self.session.step.step.sample)
        expected = call.timesteps[call.first]
        if not expected.is_at(float(timestep)):
            raise ValueError(
                f"the loop begins at timestep {float(timestep):g}, expected {expected.time:g}, {call.count} steps "
                "before the end of the scheduler's: a run that stops before its last step is not supported"
            )
        if len(sample) != rows:
            raise ValueError(
                f"the loop's batch holds {len(sample)} samples, its denoiser got {rows}: {self.family.off}?"
            )


_ABSENT = object()
