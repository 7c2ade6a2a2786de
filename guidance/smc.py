"""Sequential Monte Carlo (SMC): weighted particles that stand for a law, and an unbiased estimate of its normaliser.

Source: Del Moral, Doucet and Jasra, "Sequential Monte Carlo samplers" (2006), with resampling where the effective
sample size falls; for language models Lew et al., "Sequential Monte Carlo steering" (2023). Resampling schemes: Douc,
Cappe and Moulines (2005). Without resampling this is importance sampling.
"""

from __future__ import annotations

from typing import Literal

import torch

from hasten.guidance.inverse_cdf import Generators, inverse_cdf, uniforms

Scheme = Literal["systematic", "stratified", "multinomial", "residual"]

SCHEMES = ("systematic", "stratified", "multinomial", "residual")


def effective_sample_size(log_weights: torch.Tensor) -> torch.Tensor:
    """(sum w)^2 / sum w^2 over the last dimension of log weights [..., N]: from 1 to N, 0 where all weights are 0."""
    scaled = _scaled(log_weights)
    return scaled.sum(-1).square() / scaled.square().sum(-1).clamp(min=torch.finfo(scaled.dtype).tiny)


def log_mean_weight(log_weights: torch.Tensor) -> torch.Tensor:
    """log of the mean weight over the last dimension of log weights [..., N], -inf where every weight is 0."""
    return log_weights.logsumexp(-1) - torch.tensor(log_weights.shape[-1], dtype=log_weights.dtype).log()


def systematic(log_weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Systematic resampling: particle i is continued floor or ceil of N w_i / sum w times.

    Args:
        log_weights: [P, N], any float dtype and device.
        uniform: float64 [P, 1] in [0, 1], one number a row.

    Returns:
        int64 [P, N], the ancestor of each particle.
    """
    count = log_weights.shape[1]
    slots = torch.arange(count, dtype=torch.float64, device=log_weights.device)
    return inverse_cdf(_normalised(log_weights.double()), (slots + uniform) / count)


def ancestors(log_weights: torch.Tensor, scheme: Scheme, generator: Generators) -> torch.Tensor:
    """Which particle each of N new ones continues, so that particle i is continued N w_i / sum w times in the mean.

    Args:
        log_weights: float64 [P, N] on the CPU, in each row at least one above -inf.
        scheme: "systematic" (one uniform number a row), "stratified" (one per particle, each in its stratum),
            "multinomial" (independent), "residual" (floor(N w_i / sum w) certain copies, the others independent).
        generator: on the CPU, one or a sequence of P.

    Returns:
        int64 [P, N]; never a particle of weight 0.

    Raises:
        ValueError: an unknown scheme.
    """
    rows, count = log_weights.shape
    if scheme == "systematic":
        return systematic(log_weights, uniforms(rows, 1, generator))
    weights = _normalised(log_weights)
    slots = torch.arange(count, dtype=torch.float64)
    if scheme == "stratified":
        return inverse_cdf(weights, (slots + uniforms(rows, count, generator)) / count)
    if scheme == "multinomial":
        return inverse_cdf(weights, uniforms(rows, count, generator))
    if scheme == "residual":
        copies = (count * weights).floor()
        certain = copies.cumsum(-1)
        others = inverse_cdf(count * weights - copies, uniforms(rows, count, generator))
        copied = torch.searchsorted(certain, slots.expand(rows, -1).contiguous(), right=True)
        return torch.where(slots < certain[:, -1:], copied, others)
    raise ValueError(f"resampling must be one of {', '.join(SCHEMES)}, got {scheme!r}")


class Population:
    """The weights of P independent populations of N particles.

    The mean weight of a population estimates the normaliser of its law without bias, after every step, resampled or
    not; where a critic is used, after the critic has scored the complete texts.

    Attributes:
        log_weights: float64 [P, N] on the CPU; a particle at -inf is dead until another takes its place.
    """

    def __init__(self, populations: int, particles: int):
        self.log_weights = torch.zeros(populations, particles, dtype=torch.float64)
        self._twists = torch.zeros(populations, particles, dtype=torch.float64)

    def reweight(self, log_increments: torch.Tensor) -> None:
        """Multiplies the weights by exp of increments [P, N]; 0 for a particle that has finished."""
        dead = self.log_weights == -torch.inf
        self.log_weights = (self.log_weights + log_increments.double()).masked_fill_(dead, -torch.inf)

    def twist(self, scores: torch.Tensor) -> None:
        """Weighs by a critic: the log scores [P, N] of the present texts take the place of those given before.

        Scores of prefixes steer which particles survive and leave the law alone, since the next scores replace them;
        the scores of the last call, of the complete texts, are factors of the law. A score of -inf kills.
        """
        self.reweight(scores.double() - self._twists)
        self._twists = scores.double().masked_fill(self.log_weights == -torch.inf, 0.0)

    def effective_sample_size(self) -> torch.Tensor:
        """float64 [P]."""
        return effective_sample_size(self.log_weights)

    def log_z(self) -> torch.Tensor:
        """log of the estimated normaliser, float64 [P]; its exp is unbiased."""
        return log_mean_weight(self.log_weights)

    def resample(
        self, threshold: float, scheme: Scheme, generator: Generators, going_on: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Resamples populations whose effective sample size is below threshold * N; their weights become their mean.

        Args:
            threshold: 0 never resamples, 1 does whenever the weights differ.
            going_on: bool [P], populations that may be resampled; finished ones only lose by it. None: all.

        Returns:
            int64 [P, N], the ancestor of each particle; a particle's own index where its population was not resampled.
            A population in which all are dead is never resampled.
        """
        count = self.log_weights.shape[1]
        chosen = (self.effective_sample_size() < threshold * count * (1 - 1e-12)) & self.log_weights.isfinite().any(-1)
        if going_on is not None:
            chosen = chosen & going_on
        parents = torch.arange(count).expand(len(chosen), -1).clone()
        if chosen.any():
            rows = chosen.nonzero()[:, 0]
            own = generator if isinstance(generator, torch.Generator) else [generator[row] for row in rows.tolist()]
            weights = self.log_weights[rows]
            parents[rows] = ancestors(weights, scheme, own)
            self.log_weights[rows] = log_mean_weight(weights)[:, None].expand(-1, count)
            self._twists[rows] = self._twists[rows].gather(1, parents[rows])
        return parents


def _scaled(log_weights: torch.Tensor) -> torch.Tensor:
    """The weights over the largest of their row; zeros where all are 0."""
    top = log_weights.amax(-1, keepdim=True)
    return (log_weights - torch.where(top.isfinite(), top, 0.0)).exp()


def _normalised(log_weights: torch.Tensor) -> torch.Tensor:
    weights = _scaled(log_weights)
    return weights / weights.sum(-1, keepdim=True)
