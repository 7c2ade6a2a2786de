"""LinearAG (Castillo et al. 2023, arXiv 2312.12487, section 6): unconditional predictions estimated from what the run
has already computed.

At a predicted step t the unconditional prediction is taken to be a linear combination of the conditional predictions of
steps 0 to t and of the computed unconditional ones before t, with one scalar each. Estimates themselves are no
regressors: being combinations of these, they add nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from hasten.guidance.diffusion.classifier_free import combine
from hasten.guidance.diffusion.guide import (
    BOTH,
    CONDITIONAL,
    Guide,
    Parameterization,
    Pass,
    PredictedStep,
    Step,
    check_count,
    check_number,
    check_parameterization,
)

_MEMORY = "linear_ag"
_VERSION = 1


@dataclass(frozen=True)
class RunKey:
    """The runs that coefficients belong to. shape is that of one sample, [...] without the batch; scheduler names
    schedule and sampler.
    """

    model: str
    scheduler: str
    steps: int
    scale: float
    shape: tuple[int, ...]
    parameterization: Parameterization

    def __post_init__(self):
        for name in ("model", "scheduler"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a name, got {getattr(self, name)!r}")
        check_count("steps", self.steps, 1)
        check_number("scale", self.scale)
        if not isinstance(self.shape, (tuple, list)):
            raise ValueError(f"shape must be that of one sample, got {self.shape!r}")
        object.__setattr__(self, "shape", tuple(self.shape))
        check_parameterization(self.parameterization)

    def check(self, other: RunKey) -> None:
        """A ValueError that names both keys unless they are equal."""
        differing = [item.name for item in fields(self) if getattr(self, item.name) != getattr(other, item.name)]
        if differing:
            raise ValueError(f"LinearAG coefficients of {self} cannot serve {other}: {', '.join(differing)} differ")

    def check_step(self, step: Step) -> None:
        """A ValueError unless the step may be one of such a run."""
        run = {"steps": step.count, "shape": tuple(step.sample.shape[1:]), "parameterization": step.parameterization}
        self.check(RunKey(**{**asdict(self), **run}))


def alternating(steps: int) -> tuple[int, ...]:
    """The published choice of steps to predict: every second one of the first half of the run."""
    return tuple(range(1, steps // 2, 2))


@dataclass
class Trajectories:
    """What the fit needs of recorded runs: at each predicted step the Gram matrix [K + 2, K + 2] of the K regressors,
    the target and a row of ones, in float64, summed over all elements of all samples. Runs add to it one after the
    other; none is kept.
    """

    key: RunKey
    predicted: tuple[int, ...]
    grams: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        if not self.predicted or any(not 0 < step < self.key.steps for step in self.predicted):
            raise ValueError(f"steps to predict must lie in [1, {self.key.steps - 1}], got {self.predicted}")

    def add(self, step: int, regressors: list[torch.Tensor], target: torch.Tensor) -> None:
        """Adds the samples [B, ...] of one batch at step `step`."""
        rows = torch.stack([x.double().flatten() for x in (*regressors, target, torch.ones_like(target))])
        self.grams[step] = self.grams.get(step, 0) + (rows @ rows.T).cpu()


@dataclass(frozen=True)
class LinearRecorder(Guide):
    """Classifier-free guidance at every step that adds what it sees to `trajectories`: run it over some two hundred
    samples, then `fit`.
    """

    trajectories: Trajectories

    def __call__(self, step: PredictedStep) -> torch.Tensor:
        self.trajectories.key.check_step(step)
        conditional, unconditional = step.require(*BOTH)
        past = _remember(step, conditional)
        if step.index in self.trajectories.predicted:
            self.trajectories.add(step.index, past, unconditional)
        else:
            past.append(unconditional)
        return combine(conditional, unconditional, self.trajectories.key.scale)


@dataclass(frozen=True)
class Coefficients:
    """One scalar per regressor for each predicted step, in the order in which a run computes them: the conditional
    before the unconditional prediction of a step.

    r2: the share of the held-out target's variance that is explained, per predicted step. r2_over_conditional: the same
    against taking the conditional prediction in its place; 0 means that the fit is no better than not guiding, and
    errors are amplified by scale - 1.
    """

    key: RunKey
    betas: Mapping[int, tuple[float, ...]]
    r2: Mapping[int, float]
    r2_over_conditional: Mapping[int, float]

    def __post_init__(self):
        for count, step in enumerate(sorted(self.betas)):
            betas = self.betas[step]
            expected = 2 * step + 1 - count  # all passes so far but `count`, which were estimated
            if len(betas) != expected or not all(isinstance(beta, (int, float)) for beta in betas):
                raise ValueError(f"expected {expected} numbers as coefficients of step {step}, got {betas!r}")

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        Path(path).write_text(json.dumps({"version": _VERSION, **asdict(self)}, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, key: RunKey) -> Coefficients:
        """Reads JSON that `save` wrote for runs of this key; a ValueError names both keys if they differ, or the file
        if it is no such JSON.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            if document.pop("version") != _VERSION:
                raise ValueError("another version")
            by_step = {
                name: {int(step): value for step, value in document.pop(name).items()}
                for name in ("r2", "r2_over_conditional")
            }
            betas = {int(step): tuple(values) for step, values in document.pop("betas").items()}
            coefficients = cls(RunKey(**document.pop("key")), betas, **by_step)
            if document:
                raise ValueError(f"unknown {', '.join(document)}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no LinearAG coefficients of version {_VERSION}: {error}") from None
        coefficients.key.check(key)
        return coefficients


def fit(trajectories: Trajectories, held_out: Trajectories, ridge: float = 1e-10) -> Coefficients:
    """Least squares with a ridge penalty of `ridge` times the regressors' mean square, scored on other runs than those
    fitted.
    """
    check_number("ridge", ridge, low=0)
    trajectories.key.check(held_out.key)
    for name, runs in (("trajectories", trajectories), ("held_out", held_out)):
        missing = sorted(set(trajectories.predicted) - set(runs.grams))
        if missing:
            raise ValueError(f"{name} hold no recorded runs for step {missing[0]}")
    if held_out is trajectories:
        raise ValueError("held_out must be other runs than those fitted")
    betas, r2, over_conditional = {}, {}, {}
    for step in trajectories.predicted:
        gram = trajectories.grams[step]
        beta = _solve(gram[:-2, :-2], gram[:-2, -2], ridge)
        betas[step] = tuple(beta.tolist())
        r2[step], over_conditional[step] = _scores(held_out.grams[step], beta)
    return Coefficients(trajectories.key, betas, r2, over_conditional)


@dataclass(frozen=True)
class LinearAG(Guide):
    """Classifier-free guidance whose unconditional prediction is estimated at the steps that the coefficients know,
    computed at the others before `stop`, and no longer needed from `stop` on: with the published choice, N + N / 4
    evaluations rather than 2 N.

    It keeps the predictions of the run up to its last predicted step in memory.

    Args:
        coefficients: of `fit` or `Coefficients.load`.
        key: of the runs that it will guide; a ValueError names both keys unless it is the coefficients'.
        stop: None: half of the run.
    """

    coefficients: Coefficients
    key: RunKey
    stop: int | None = None

    def __post_init__(self):
        self.coefficients.key.check(self.key)
        if self.stop is not None:
            check_count("stop", self.stop, 0)

    def passes(self, step: Step) -> tuple[Pass, ...]:
        self.key.check_step(step)
        alone = step.index >= self._stop or step.index in self.coefficients.betas or self.key.scale == 1
        return CONDITIONAL if alone else BOTH

    def __call__(self, step: PredictedStep) -> torch.Tensor:
        predictions = step.require(*self.passes(step))
        conditional = predictions[0]
        if step.index >= self._stop or self.key.scale == 1:
            step.memory.pop(_MEMORY, None)
            step.record({"scale": 1.0})
            return conditional
        step.record({"scale": self.key.scale})
        if step.index > max(self.coefficients.betas, default=-1):
            step.memory.pop(_MEMORY, None)
            return combine(*predictions, self.key.scale)
        past = _remember(step, conditional)
        if step.index in self.coefficients.betas:
            betas = self.coefficients.betas[step.index]
            if len(past) != len(betas):
                raise ValueError(
                    f"step {step.index}: LinearAG needs the predictions of all earlier steps, {len(betas)}, "
                    f"and was asked at some only: {len(past)}"
                )
            weighted = zip(betas, past, strict=True)
            unconditional = sum(beta * x.to(torch.promote_types(x.dtype, torch.float32)) for beta, x in weighted)
            return combine(conditional, unconditional.to(conditional.dtype), self.key.scale)
        past.append(predictions[1])
        return combine(conditional, predictions[1], self.key.scale)

    @property
    def _stop(self):
        return self.key.steps // 2 if self.stop is None else self.stop


def _remember(step, conditional):
    """The run's regressors so far, this step's conditional prediction the last of them."""
    past = step.memory.setdefault(_MEMORY, [])
    past.append(conditional)
    return past


def _solve(gram, products, ridge):
    """(gram + ridge * mean diagonal)^-1 products through the eigenvectors: regressors of neighbouring steps are nearly
    the same.
    """
    values, vectors = torch.linalg.eigh(gram)
    damped = values.clamp_min(0) + ridge * gram.diagonal().mean()
    inverse = torch.where(damped > 0, 1 / damped, torch.zeros_like(damped))
    return vectors @ (inverse * (vectors.T @ products))


def _scores(gram, beta):
    """1 - residual / baseline, the baseline the target's mean and the last regressor but the target: the step's
    conditional prediction.
    """
    ones, target = gram[-1, -1], gram[-2, -2]

    def residual(weights):
        combination = torch.cat([weights, -torch.ones(1, dtype=torch.float64)])
        return (combination @ gram[:-1, :-1] @ combination).clamp_min(0)

    conditional = torch.zeros_like(beta)
    conditional[-1] = 1
    left = residual(beta)
    return float(1 - left / (target - gram[-2, -1] ** 2 / ones)), float(1 - left / residual(conditional))
