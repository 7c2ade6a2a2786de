"""A guide as a guider component of diffusers, for modular pipelines and the classic ones that ask a guider."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput

from hasten.errors import StateError, UnsupportedModelError
from hasten.guidance.diffusion.guide import BOTH, Guide
from hasten.pipelines import schedulers
from hasten.pipelines.families import DENOISERS
from hasten.pipelines.record import Run
from hasten.pipelines.session import Session


class Guider(BaseGuidance):
    """A guide inside loops that ask a guider: one pass for each prediction, the conditional one first; see
    `hasten.guider`.

    A guider is shown neither x_t nor its noise level. x_t is read from the denoiser's input in the conditional pass,
    and the level from the scheduler. So the guide is asked right after the conditional pass, and the unconditional one
    is added to the step's batches where the guide wants it: the loop goes through them one after the other. x_t has the
    dtype that the denoiser computes in.

    `run` is the record of all calls so far, as in `hasten.guided`.
    """

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond"]

    def __init__(self, guide: Guide, scheduler: Any):
        super().__init__()
        self.run = Run(str(guide), "a modular pipeline")
        self.session = Session(guide, scheduler, self.run, BOTH)
        self._timesteps: torch.Tensor | None = None
        self._batches: list[Any] = []
        self.register_to_config(guide=str(guide))

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        """Begins a step; the first one of a call that this guider is shown also begins the call."""
        last = self._step
        super().set_state(step, num_inference_steps, timestep)
        self._hidden = None
        # Every call sets its timesteps, which makes a new tensor of them.
        if last is None or step <= last or self._timesteps is not self.session.scheduler.timesteps:
            self._begin()

    def _begin(self) -> None:
        scheduler = self.session.scheduler
        schedulers.check(scheduler)
        if getattr(scheduler, "num_inference_steps", None) is None:
            raise StateError(
                "the guider's scheduler has no timesteps: give hasten.guider the scheduler of the pipeline"
            )
        self.session.check_sampler()
        self._timesteps = scheduler.timesteps
        timesteps, now = schedulers.timesteps(scheduler), float(self._timestep)
        found = min(range(len(timesteps)), key=lambda i: abs(timesteps[i].time - now))
        if not timesteps[found].is_at(now):
            raise StateError(
                f"the loop is at timestep {now:g}, which the guider's scheduler does not have: "
                "give hasten.guider the scheduler of the pipeline"
            )
        self.session.begin(timesteps, found - self._step, self._num_inference_steps)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        return self._prepared([self._prepare_batch(data, i, name) for i, name in enumerate(self._input_predictions)])

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        return self._prepared(
            [
                self._prepare_batch_from_block_state(input_fields, data, i, name)
                for i, name in enumerate(self._input_predictions)
            ]
        )

    def _prepared(self, batches: list[Any]) -> list[Any]:
        """The conditional batch alone; `cleanup_models` adds the other while the loop goes through them."""
        conditional, self._unconditional = batches
        self._batches = [conditional]
        return self._batches

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)
        module = getattr(denoiser, "_orig_mod", denoiser)
        if type(module).__name__ not in DENOISERS:
            raise UnsupportedModelError(
                "",
                type(module).__name__,
                "the hook on its input is missing: hasten.pipelines.families.DENOISERS does not say where it holds x_t",
                f"use a pipeline with one of {', '.join(DENOISERS)}, or add it there",
            )
        if getattr(denoiser, "_compiled_call_impl", None) is not None:
            raise UnsupportedModelError(
                "", type(module).__name__, "compiled in place it runs no hooks", "compile it with torch.compile(model)"
            )
        name = DENOISERS[type(module).__name__]

        def keep(_, args: tuple, kwargs: dict) -> None:
            handle.remove()
            self._hidden = args[0] if args else kwargs[name]

        handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Ends a pass. After the conditional one, asks the guide whether it wants the other."""
        if not self.is_conditional or not self._enabled:
            return
        conditional = self._batches[0].noise_pred
        hidden = torch.stack(self._hidden).squeeze(2) if isinstance(self._hidden, list) else self._hidden
        if len(self.session.open(self._step, hidden[:, : conditional.shape[1]])) > 1:
            self._require_unconditional()
            self._batches.append(self._unconditional)

    def _require_unconditional(self) -> None:
        given = self._batches[0].as_dict()
        missing = [
            name
            for name in given
            if name != "noise_pred" and given[name] is not None and getattr(self._unconditional, name, None) is None
        ]
        if missing:
            raise ValueError(
                f"step {self._step}: the guide {self.run.guide} needs the unconditional prediction, "
                f"and the pipeline has no unconditional {missing[0]}"
            )

    def __call__(self, data: list[Any]) -> GuiderOutput:
        return self.forward(**{getattr(batch, self._identifier_key): batch.noise_pred for batch in data})

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        if not self._enabled:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
        predictions = {"conditional": pred_cond}
        if pred_uncond is not None:
            predictions["unconditional"] = pred_uncond
        prediction = self.session.combine(predictions, pred_cond.dtype)
        self.session.close(calls=len(predictions))
        return GuiderOutput(pred=prediction, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        """How many passes a step may have; pipelines ask it to know whether they need unconditional embeddings."""
        return len(self._input_predictions) if self._enabled else 1
