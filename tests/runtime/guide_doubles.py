"""Guides for tests of what runs guides."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from tiny_pipelines import SCALE, STEPS

from hasten.guidance.diffusion.guide import BOTH, CONDITIONAL, Guide


@dataclass(frozen=True)
class Plain(Guide):
    """Classifier-free guidance in the first `stop` steps; it records its scale and a norm for each row."""

    scale: float = SCALE
    stop: int = STEPS

    def passes(self, step):
        return BOTH if step.index < self.stop else CONDITIONAL

    def __call__(self, step):
        if step.unconditional is None:
            return step.conditional
        difference = step.conditional - step.unconditional
        norms = torch.linalg.vector_norm(difference.flatten(1), dim=1)
        step.record({"scale": self.scale, "norms": norms})
        return step.unconditional + self.scale * difference


@dataclass(frozen=True)
class Aim(Guide):
    """Whatever the denoiser says: the prediction that means x0 = target, from the step's own sample, alpha
    and sigma.
    """

    target: torch.Tensor
    noises: list[torch.Tensor] = field(default_factory=list)
    ends: list[torch.Tensor] = field(default_factory=list)

    def passes(self, step):
        return CONDITIONAL

    def __call__(self, step):
        noise = (step.sample - step.alpha * self.target) / step.sigma
        self.noises.append(noise)
        self.ends.append(step.next_alpha * self.target + step.next_sigma * noise)
        return {
            "epsilon": noise,
            "sample": self.target,
            "v": step.alpha * noise - step.sigma * self.target,
            "flow": noise - self.target,
        }[step.parameterization]

    def check_noise(self):
        """A deterministic solver keeps x0 and noise where they are, so alpha and sigma were right at every step if the
        noise is the same at each.
        """
        assert len(self.noises) > 1
        for noise in self.noises[1:]:
            torch.testing.assert_close(noise, self.noises[0], rtol=0, atol=1e-3)


@dataclass(frozen=True)
class Remembering(Guide):
    """Guidance with the running sum of all differences so far: every step depends on the memory."""

    def __call__(self, step):
        momentum = step.memory.get("momentum", 0) + step.conditional - step.unconditional
        step.memory["momentum"] = momentum
        return step.conditional + 0.3 * momentum


@dataclass(frozen=True)
class Failing(Guide):
    """At one step an exception, or a prediction of the given value; with `once` only the first time."""

    at: int
    value: float | None = None
    once: bool = False
    failed: list[int] = field(default_factory=list)

    def passes(self, step):
        return CONDITIONAL

    def __call__(self, step):
        if step.index < self.at or (self.once and self.failed):
            return step.conditional
        self.failed.append(step.index)
        if self.value is None:
            raise KeyError("lost")
        return torch.full_like(step.conditional, self.value)


@dataclass(frozen=True)
class Asking(Guide):
    """Guidance with whatever passes it is given."""

    wanted: tuple[str, ...]

    def passes(self, step):
        return self.wanted

    def __call__(self, step):
        return step.conditional


class Samples(Guide):
    """Keeps x_t as `passes` sees it and as the call does."""

    def __init__(self):
        self.before, self.exact = [], []

    def passes(self, step):
        self.before.append(step.sample)
        return CONDITIONAL

    def __call__(self, step):
        self.exact.append(step.sample)
        return step.conditional
