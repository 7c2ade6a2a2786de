"""Where the samples of diffusers' schedulers stand: alpha and sigma of every evaluation, and what the denoiser predicts.

This is the one place that knows schedulers. A family is the space of the sample that `step` takes, x_t = alpha * x0 + sigma * noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hasten.errors import UnsupportedModelError
from hasten.guidance.diffusion.guide import Parameterization, Step

PREDICTIONS: dict[str, Parameterization] = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


@dataclass(frozen=True)
class Level:
    """Of one evaluation: x_t = alpha * x0 + sigma * noise for the guide, and what takes there.

    to_guide times the scheduler's sample is the guide's sample; to_sample times the denoiser's input is the scheduler's sample.
    """

    alpha: float
    sigma: float
    to_guide: float = 1.0
    to_sample: float = 1.0

    def step(
        self,
        after: Level,
        sample: torch.Tensor,
        *,
        index: int,
        count: int,
        parameterization: Parameterization,
        memory: dict,
    ) -> Step:
        """The guide's step at this level, with `after` where its step leads and the scheduler's `sample`."""
        return Step(
            sample=sample * self.to_guide if self.to_guide != 1 else sample,
            alpha=self.alpha,
            sigma=self.sigma,
            next_alpha=after.alpha,
            next_sigma=after.sigma,
            index=index,
            count=count,
            parameterization=parameterization,
            memory=memory,
        )


@dataclass(frozen=True)
class Schedule:
    """What one call of `set_timesteps` laid down: of K evaluations the `timesteps`, the `levels`, and the `ends`, where the step from each leads."""

    timesteps: tuple[float, ...]
    levels: tuple[Level, ...]
    ends: tuple[Level, ...]
    parameterization: Parameterization


def _cumulative(scheduler) -> list[Level]:
    """DDIM and its relatives: variance preserving, alpha = sqrt(alphas_cumprod). They end at `final_alpha_cumprod`, without one at x0."""
    return _at(scheduler, [*(int(timestep) for timestep in scheduler.timesteps), -1])


def _ddim_ends(scheduler) -> list[Level]:
    """DDIM's steps all lead T // N timesteps down, which is where the next one begins with "leading" timesteps alone (its `timestep_spacing`)."""
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return _at(scheduler, [int(timestep) - stride for timestep in scheduler.timesteps])


def _at(scheduler, timesteps: list[int]) -> list[Level]:
    """The variance-preserving levels at these timesteps, the last one of the run at those below 0."""
    products = scheduler.alphas_cumprod.double().tolist()
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    chosen = [products[timestep] if timestep >= 0 else final for timestep in timesteps]
    return [Level(product**0.5, (1 - product) ** 0.5) for product in chosen]


def _preserving(scheduler) -> list[Level]:
    """DPM-Solver and its relatives: `sigmas` are sigma / alpha of a variance-preserving sample, or with use_flow_sigmas of x0 + sigma (noise - x0)."""
    if getattr(scheduler.config, "use_flow_sigmas", False):
        return _flow(scheduler)
    return [Level(1 / (1 + sigma * sigma) ** 0.5, sigma / (1 + sigma * sigma) ** 0.5) for sigma in _sigmas(scheduler)]


def _exploding(scheduler) -> list[Level]:
    """Euler and its relatives: the sample is x0 + sigma * noise, the denoiser sees it divided by sqrt(1 + sigma^2).

    A prediction v belongs to what the denoiser sees, so with v that is the guide's sample too.
    """
    levels = []
    for sigma in _sigmas(scheduler):
        scale = (1 + sigma * sigma) ** 0.5
        if scheduler.config.prediction_type == "v_prediction":
            levels.append(Level(1 / scale, sigma / scale, to_guide=1 / scale, to_sample=scale))
        else:
            levels.append(Level(1.0, sigma, to_sample=scale))
    return levels


def _flow(scheduler) -> list[Level]:
    """Flow matching: the sample is (1 - sigma) * x0 + sigma * noise."""
    return [Level(1 - sigma, sigma) for sigma in _sigmas(scheduler)]


def _sigmas(scheduler) -> list[float]:
    return scheduler.sigmas.double().tolist()


# Of every evaluation, and last where the run ends.
LEVELS: dict[str, Callable[[object], list[Level]]] = {
    "DDIMScheduler": _cumulative,
    "DDPMScheduler": _cumulative,
    "LCMScheduler": _cumulative,
    "PNDMScheduler": _cumulative,
    "DEISMultistepScheduler": _preserving,
    "DPMSolverMultistepScheduler": _preserving,
    "UniPCMultistepScheduler": _preserving,
    "EulerAncestralDiscreteScheduler": _exploding,
    "EulerDiscreteScheduler": _exploding,
    "LMSDiscreteScheduler": _exploding,
    "FlowMatchEulerDiscreteScheduler": _flow,
}
# Where steps do not lead to the next evaluation's level.
ENDS: dict[str, Callable[[object], list[Level]]] = {"DDIMScheduler": _ddim_ends}


def check(scheduler) -> None:
    """Refuses a scheduler whose samples or steps are not known.

    Raises:
        UnsupportedModelError: it has neither sigmas nor alphas_cumprod, is not in LEVELS, is of second order, or its prediction type is not known.
    """
    kind = type(scheduler).__name__

    def refuse(reason: str, remedy: str = f"use one of {', '.join(LEVELS)}"):
        raise UnsupportedModelError("scheduler", kind, reason, remedy)

    if not hasattr(scheduler, "sigmas") and not hasattr(scheduler, "alphas_cumprod"):
        refuse("it has neither sigmas nor alphas_cumprod, so that the noise in its samples is not known")
    if getattr(scheduler, "order", 1) != 1 or getattr(scheduler.config, "skip_prk_steps", True) is False:
        refuse(
            "it evaluates the denoiser several times in one step, between steps too, where a guide's next noise level has no meaning"
        )
    if kind not in LEVELS:
        refuse("it is not known whether its samples are variance preserving, variance exploding or a flow")
    prediction = getattr(scheduler.config, "prediction_type", "flow_prediction")
    if prediction not in PREDICTIONS:
        refuse(f"prediction_type={prediction!r} is not known", f"set it to one of {', '.join(PREDICTIONS)}")


def schedule(scheduler) -> Schedule:
    """The noise levels that the scheduler's last `set_timesteps` laid down, copied once to the CPU."""
    timesteps = tuple(torch.as_tensor(scheduler.timesteps).double().tolist())
    kind = type(scheduler).__name__
    levels = LEVELS[kind](scheduler)
    ends = ENDS[kind](scheduler) if kind in ENDS else levels[1:]
    return Schedule(timesteps, tuple(levels[:-1]), tuple(ends), parameterization(scheduler))


def parameterization(scheduler) -> Parameterization:
    """What the denoiser predicts, by the scheduler's configuration."""
    return PREDICTIONS[getattr(scheduler.config, "prediction_type", "flow_prediction")]


def eta(scheduler) -> float | None:
    """How much noise a first-order step of this scheduler draws anew: 0 none, as DDIM and Euler, 1 as Euler ancestral. None: its steps are no such steps,
    because they read earlier predictions too or draw all noise anew.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    if kind in ("DPMSolverMultistepScheduler", "DEISMultistepScheduler"):
        noise = {"sde-dpmsolver++": 1.0, "sde-dpmsolver": None}.get(config.algorithm_type, 0.0)
        return noise if config.solver_order == 1 else None
    if kind in ("DDPMScheduler", "EulerAncestralDiscreteScheduler"):
        return 1.0
    first_order = ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")
    return 0.0 if kind in first_order and not getattr(config, "stochastic_sampling", False) else None
