"""What a denoiser predicts, and the exact conversions between the four ways to say it.

With x_t = alpha * x0 + sigma * noise: "epsilon" is the noise, "sample" x0, "v" alpha * noise - sigma * x0 (Salimans &
Ho 2022, arXiv 2202.00512, appendix D), "flow" noise - x0 (Lipman et al. 2022, arXiv 2210.02747, with time running from
data to noise). Each together with x_t determines x0 and noise, so each determines the others.
"""

from __future__ import annotations

import torch

from hasten.guidance.diffusion.guide import Parameterization, PredictedStep, check_parameterization

TOLERANCE = 1e-3  # of alpha + sigma = 1 and alpha^2 + sigma^2 = 1, for schedules that were kept in half precision


def denoised(
    prediction: torch.Tensor,
    sample: torch.Tensor,
    alpha: float,
    sigma: float,
    parameterization: Parameterization,
) -> torch.Tensor:
    """x0 [B, ...], at least in float32.

    Args:
        prediction, sample: [B, ...].
        alpha, sigma: of this step.

    Raises:
        ValueError: an unknown prediction type, "v" where alpha^2 + sigma^2 is not 1, "flow" where alpha + sigma is not
            1, "epsilon" at alpha = 0 (pure noise says nothing about x0).
    """
    prediction, sample = _operands(prediction, sample, alpha, sigma, parameterization)
    if parameterization == "sample":
        return prediction
    if parameterization == "epsilon":
        _nonzero("alpha", alpha, "x0", parameterization)
        return (sample - sigma * prediction) / alpha
    if parameterization == "v":
        return (alpha * sample - sigma * prediction) / (alpha * alpha + sigma * sigma)
    return (sample - sigma * prediction) / (alpha + sigma)


def noise(
    prediction: torch.Tensor,
    sample: torch.Tensor,
    alpha: float,
    sigma: float,
    parameterization: Parameterization,
) -> torch.Tensor:
    """The noise [B, ...], at least in float32. Arguments and errors as in `denoised`, but "sample" at sigma = 0 is what
    has no answer.
    """
    prediction, sample = _operands(prediction, sample, alpha, sigma, parameterization)
    if parameterization == "epsilon":
        return prediction
    if parameterization == "sample":
        _nonzero("sigma", sigma, "the noise", parameterization)
        return (sample - alpha * prediction) / sigma
    if parameterization == "v":
        return (sigma * sample + alpha * prediction) / (alpha * alpha + sigma * sigma)
    return (sample + alpha * prediction) / (alpha + sigma)


def convert(
    prediction: torch.Tensor,
    sample: torch.Tensor,
    alpha: float,
    sigma: float,
    source: Parameterization,
    target: Parameterization,
) -> torch.Tensor:
    """A prediction [B, ...] of type `source` as one of type `target`, at least in float32. Arguments and errors as in
    `denoised`.
    """
    _check_level(target, alpha, sigma)
    if source == target:
        return _operands(prediction, sample, alpha, sigma, source)[0]
    if target == "sample":
        return denoised(prediction, sample, alpha, sigma, source)
    if target == "epsilon":
        return noise(prediction, sample, alpha, sigma, source)
    x0 = denoised(prediction, sample, alpha, sigma, source)
    n = noise(prediction, sample, alpha, sigma, source)
    if target == "flow":
        return n - x0
    return alpha * n - sigma * x0


def to_denoised(step: PredictedStep, prediction: torch.Tensor) -> torch.Tensor:
    """A prediction of the step's parameterization as x0, at least in float32."""
    return denoised(prediction, step.sample, step.alpha, step.sigma, step.parameterization)


def from_denoised(step: PredictedStep, x0: torch.Tensor) -> torch.Tensor:
    """x0 as a prediction of the step's parameterization, in the dtype of the step's predictions."""
    back = convert(x0, step.sample, step.alpha, step.sigma, "sample", step.parameterization)
    return back.to(step.conditional.dtype)


def _operands(prediction, sample, alpha, sigma, parameterization):
    """Both tensors in one dtype of at least float32; a ValueError unless predictions of this type exist at
    this level.
    """
    _check_level(parameterization, alpha, sigma)
    wide = torch.promote_types(torch.promote_types(prediction.dtype, sample.dtype), torch.float32)
    return prediction.to(wide), sample.to(wide)


def _check_level(parameterization, alpha, sigma):
    check_parameterization(parameterization)
    if parameterization == "flow":
        _near_one("alpha + sigma", alpha + sigma, parameterization)
    if parameterization == "v":
        _near_one("alpha^2 + sigma^2", alpha * alpha + sigma * sigma, parameterization)


def _near_one(name, value, parameterization):
    if abs(value - 1) > TOLERANCE:
        raise ValueError(
            f"the prediction type {parameterization!r} belongs to a schedule with {name} = 1, this one has {value}: "
            "is the prediction type that of the model?"
        )


def _nonzero(name, value, wanted, parameterization):
    if value == 0:
        raise ValueError(f"{wanted} does not follow from a prediction of type {parameterization!r} where {name} is 0")
