"""Changes of a next-token law before the draw: repetition penalty, temperature, top-k and top-p, in this order."""

from __future__ import annotations

import math

import torch


def check_warp(*, temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float) -> None:
    """Refuses settings that are no law.

    Raises:
        ValueError: names the setting and its value.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, or None, got {top_p}")
    if not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
        raise ValueError(f"repetition_penalty must be above 0, got {repetition_penalty}")


def warp(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of the warped law. A weight that is drawn from them refers to that law, not to the model's.

    Args:
        logits: [R, V], any float dtype.
        temperature: divides the logits; 0 leaves them as they are, for a greedy choice.
        top_k: keep the k largest and those equal to the k-th.
        top_p: keep the smallest set of likeliest tokens with at least this probability (Holtzman et al., 2020).
        repetition_penalty: logits of seen tokens are divided by it where positive and multiplied where negative (Keskar
            et al., 2019).
        seen: bool [R, V], the tokens of the texts so far. Needed with a repetition penalty.

    Returns:
        [R, V], float32 or, for float64 logits, float64; -inf for what was cut.

    Raises:
        ValueError: a repetition penalty without `seen`.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if repetition_penalty != 1.0:
        if seen is None:
            raise ValueError(f"repetition_penalty {repetition_penalty} needs seen, the tokens of the texts so far")
        penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        cut = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, ids, cut), -torch.inf)
    return logits
