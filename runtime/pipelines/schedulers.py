"""The schedulers of diffusers, as data: the noise levels of their timesteps, the noise that their steps draw anew, and
what the denoiser predicts.

This is the one place that knows schedulers. They differ in the alpha and sigma of x_t = alpha * x0 + sigma * noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hasten.errors import UnsupportedModelError
from hasten.guidance.diffusion.guide import Parameterization

PREDICTIONS: dict[str, Parameterization] = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


@dataclass(frozen=True, slots=True)
class Level:
    """A noise level: x_t = alpha * x0 + sigma * noise for the guide.

    to_guide times the scheduler's sample is the guide's sample; to_sample times the denoiser's input is the scheduler's
    sample.
    """

    alpha: float
    sigma: float
    to_guide: float = 1.0
    to_sample: float = 1.0


@dataclass(frozen=True, slots=True)
class Timestep:
    """One evaluation of the denoiser: `time` as the scheduler counts it, its noise level, where its step leads."""

    time: float
    level: Level
    end: Level

    def is_at(self, time: float) -> bool:
        """Whether a loop at `time` is at this timestep; loops round theirs."""
        return abs(self.time - time) <= 1e-3 * max(abs(time), 1)


def _cumulative(scheduler) -> list[Level]:
    """DDIM and its relatives: variance preserving, alpha = sqrt(alphas_cumprod). They end at `final_alpha_cumprod`,
    without one at x0.
    """
    return _at(scheduler, [*(int(timestep) for timestep in scheduler.timesteps), -1])


def _ddim_ends(scheduler) -> list[Level]:
    """DDIM's steps all lead T // N timesteps down; only with "leading" timesteps (its `timestep_spacing`) is that where
    the next one begins.
    """
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return _at(scheduler, [int(timestep) - stride for timestep in scheduler.timesteps])


def _at(scheduler, timesteps: list[int]) -> list[Level]:
    """The variance-preserving levels at these timesteps, below 0 the last one of the run."""
    products = scheduler.alphas_cumprod.double().tolist()
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    chosen = [products[timestep] if timestep >= 0 else final for timestep in timesteps]
    return [Level(product**0.5, (1 - product) ** 0.5) for product in chosen]


def _preserving(scheduler) -> list[Level]:
    """DPM-Solver and its relatives: `sigmas` are sigma / alpha of a variance-preserving sample, with use_flow_sigmas
    those of a flow.
    """
    if getattr(scheduler.config, "use_flow_sigmas", False):
        return _flow(scheduler)
    return [Level(1 / (1 + sigma * sigma) ** 0.5, sigma / (1 + sigma * sigma) ** 0.5) for sigma in _sigmas(scheduler)]


def _exploding(scheduler) -> list[Level]:
    """Euler and its relatives: the sample is x0 + sigma * noise, the denoiser gets it divided by sqrt(1 + sigma^2).

    A prediction v belongs to what the denoiser gets, so with v that is the guide's sample too.
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


@dataclass(frozen=True)
class Sampler:
    """How a scheduler of diffusers samples.

    levels: of every evaluation, and last where the run ends.
    ends: of every evaluation, where its step leads, unless to the level of the next.
    eta: pairs (eta, settings of the scheduler's configuration). With these settings its steps are of first order and
        draw that share of their noise anew: 0 none, as DDIM and Euler, 1 as Euler ancestral. With none of them its
        steps read earlier predictions too, or draw all noise anew. An eta that the call gives to `step` comes before.
    """

    levels: Callable[[Any], list[Level]]
    ends: Callable[[Any], list[Level]] | None = None
    eta: tuple[tuple[float, dict[str, Any]], ...] = ()


SAMPLERS: dict[str, Sampler] = {
    "DDIMScheduler": Sampler(_cumulative, _ddim_ends, eta=((0.0, {}),)),
    "DDPMScheduler": Sampler(_cumulative, eta=((1.0, {}),)),
    "LCMScheduler": Sampler(_cumulative),
    "PNDMScheduler": Sampler(_cumulative),
    "DEISMultistepScheduler": Sampler(_preserving, eta=((0.0, {"solver_order": 1}),)),
    "DPMSolverMultistepScheduler": Sampler(
        _preserving,
        eta=(
            (0.0, {"solver_order": 1, "algorithm_type": "dpmsolver"}),
            (0.0, {"solver_order": 1, "algorithm_type": "dpmsolver++"}),
            (1.0, {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}),
        ),
    ),
    "UniPCMultistepScheduler": Sampler(_preserving),
    "EulerAncestralDiscreteScheduler": Sampler(_exploding, eta=((1.0, {}),)),
    "EulerDiscreteScheduler": Sampler(_exploding, eta=((0.0, {}),)),
    "LMSDiscreteScheduler": Sampler(_exploding),
    "FlowMatchEulerDiscreteScheduler": Sampler(_flow, eta=((0.0, {"stochastic_sampling": False}),)),
}


def check(scheduler) -> None:
    """Refuses a scheduler whose samples or steps are not known.

    Raises:
        UnsupportedModelError: it has neither sigmas nor alphas_cumprod, is not in SAMPLERS, is of second order, or its
            prediction type is not known.
    """
    kind = type(scheduler).__name__

    def refuse(reason: str, remedy: str = f"use one of {', '.join(SAMPLERS)}"):
        raise UnsupportedModelError("scheduler", kind, reason, remedy)

    if not hasattr(scheduler, "sigmas") and not hasattr(scheduler, "alphas_cumprod"):
        refuse("it has neither sigmas nor alphas_cumprod, so that the noise in its samples is not known")
    if getattr(scheduler, "order", 1) != 1 or getattr(scheduler.config, "skip_prk_steps", True) is False:
        refuse(
            "it evaluates the denoiser several times in one step, between steps too, "
            "where a guide's next noise level has no meaning"
        )
    if kind not in SAMPLERS:
        refuse("it is not known whether its samples are variance preserving, variance exploding or a flow")
    prediction = getattr(scheduler.config, "prediction_type", "flow_prediction")
    if prediction not in PREDICTIONS:
        refuse(f"prediction_type={prediction!r} is not known", f"set it to one of {', '.join(PREDICTIONS)}")


def timesteps(scheduler) -> tuple[Timestep, ...]:
    """What the scheduler's last `set_timesteps` laid down, copied to the CPU once."""
    sampler = SAMPLERS[type(scheduler).__name__]
    times = torch.as_tensor(scheduler.timesteps).double().tolist()
    levels = sampler.levels(scheduler)
    ends = levels[1:] if sampler.ends is None else sampler.ends(scheduler)
    return tuple(Timestep(*each) for each in zip(times, levels[:-1], ends, strict=True))


def parameterization(scheduler) -> Parameterization:
    """What the denoiser predicts, by the scheduler's configuration."""
    return PREDICTIONS[getattr(scheduler.config, "prediction_type", "flow_prediction")]


def eta(scheduler) -> float | None:
    """The scheduler's eta, see `Sampler`; None: its steps are not of first order, or draw all noise anew."""
    for value, settings in SAMPLERS[type(scheduler).__name__].eta:
        if all(getattr(scheduler.config, name) == setting for name, setting in settings.items()):
            return value
    return None
