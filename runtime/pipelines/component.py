"""A guide as a guider component of diffusers, for modular pipelines and the classic ones that ask a guider."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput

from hasten.errors import StateError, UnsupportedModelError
from hasten.guidance.diffusion.guide import BOTH, Guide, Step
from hasten.guidance.diffusion.lag import FiniteCheck
from hasten.pipelines import schedulers
from hasten.pipelines.predictions import asked_passes, guided_prediction
from hasten.pipelines.record import PipelineCall, Run

# The denoisers whose loops were read, and the argument that holds x_t: its first channels or tokens along dimension 1, or a list with one for a row.
DENOISERS = {
    "QwenImageTransformer2DModel": "hidden_states",
    "SD3Transformer2DModel": "hidden_states",
    "UNet2DConditionModel": "sample",
    "WanTransformer3DModel": "hidden_states",
    "ZImageTransformer2DModel": "x",
}


class Guider(BaseGuidance):
    """Runs a guide inside loops that ask a guider: one pass for each prediction, the conditional one first; see `hasten.guider`.

    A guider is shown neither x_t nor its noise level. x_t is read from the denoiser's input in the conditional pass, and the level from the scheduler.
    So the guide is asked right after the conditional pass, and the unconditional one is added to the step's batches where the guide wants it: the
    loop goes through them one after the other. x_t has the dtype that the denoiser computes in.

    `run` is the record of all runs so far, as in `hasten.guided`.
    """

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond"]

    def __init__(self, guide: Guide, scheduler: Any):
        super().__init__()
        self.guide, self.scheduler = guide, scheduler
        self.run = Run(str(guide), "a modular pipeline")
        self._timesteps: torch.Tensor | None = None
        self._batches: list[Any] = []
        self.register_to_config(guide=str(guide))

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        """Begins a step; the first one that a run shows to this guider also begins the run, with an empty memory."""
        last = self._step
        super().set_state(step, num_inference_steps, timestep)
        self._hidden = None
        # Every run sets its timesteps, which makes a new tensor of them.
        if last is None or step <= last or self._timesteps is not self.scheduler.timesteps:
            self._begin_run()

    def _begin_run(self) -> None:
        schedulers.check(self.scheduler)
        if getattr(self.scheduler, "num_inference_steps", None) is None:
            raise StateError(
                "the guider's scheduler has no timesteps: give hasten.guider the scheduler of the pipeline"
            )
        self.guide.check_sampler(type(self.scheduler).__name__, schedulers.eta(self.scheduler))
        self._timesteps = self.scheduler.timesteps
        self._schedule = schedulers.schedule(self.scheduler)
        now = float(self._timestep)
        found = min(range(len(self._timesteps)), key=lambda i: abs(self._schedule.timesteps[i] - now))
        if abs(self._schedule.timesteps[found] - now) > 1e-3 * max(now, 1):
            raise StateError(
                f"the loop is at timestep {now:g}, which the guider's scheduler does not have: give hasten.guider the scheduler of the pipeline"
            )
        self._begin = found - self._step
        self._memory: dict = {}
        self._finite: FiniteCheck | None = None
        self._call = PipelineCall(type(self.scheduler).__name__)
        self._started = time.perf_counter()
        self.run.pipeline_calls.append(self._call)

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
                "the hook on its input is missing: hasten.guiders.DENOISERS does not say where it holds x_t",
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
        self._at = self._step_at(hidden[:, : conditional.shape[1]])
        if len(asked_passes(self.guide, self._at, BOTH, self.run.pipeline)) > 1:
            self._require_unconditional()
            self._batches.append(self._unconditional)

    def _step_at(self, hidden: torch.Tensor) -> Step:
        index = self._begin + self._step
        if index >= len(self._schedule.levels):
            raise StateError(f"the loop makes more than the {self._step} steps that its scheduler has")
        level = self._schedule.levels[index]
        return level.step(
            self._schedule.ends[index],
            hidden * level.to_sample,
            index=self._step,
            count=self._num_inference_steps,
            parameterization=self._schedule.parameterization,
            memory=self._memory,
        )

    def _require_unconditional(self) -> None:
        given = self._batches[0].as_dict()
        missing = [
            name
            for name in given
            if name != "noise_pred" and given[name] is not None and getattr(self._unconditional, name, None) is None
        ]
        if missing:
            raise ValueError(
                f"step {self._step}: the guide {self.guide} needs the unconditional prediction, and the pipeline has no unconditional {missing[0]}"
            )

    def __call__(self, data: list[Any]) -> GuiderOutput:
        return self.forward(**{getattr(batch, self._identifier_key): batch.noise_pred for batch in data})

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        if not self._enabled:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
        state = self._at.with_predictions(pred_cond, pred_uncond)
        prediction = guided_prediction(self.guide, state).to(pred_cond.dtype)
        if self._finite is None:
            self._finite = FiniteCheck(self._num_inference_steps, prediction.device)
        self._finite(self._step, pred_cond, pred_uncond, prediction)
        if self._step + 1 == self._num_inference_steps:
            self._finite.finish()
        passes = len(self._batches)
        self._call.add(state, rows=passes * len(pred_cond), calls=passes, full=len(BOTH) * len(pred_cond))
        self._call.seconds = time.perf_counter() - self._started
        return GuiderOutput(pred=prediction, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        """How many passes a step may have; pipelines ask before their loop, to know whether they need unconditional embeddings."""
        return len(self._input_predictions) if self._enabled else 1
