"""Negative token merging (Singh et al. 2024, arXiv 2412.01339): pushes the tokens of an image away from their best
matches in a reference.
"""

from __future__ import annotations

import torch

from hasten.guidance.diffusion.guide import check_number


def negative_token_merging(
    tokens: torch.Tensor,
    reference: torch.Tensor | None = None,
    alpha: float = 0.9,
    threshold: float = 0.65,
) -> torch.Tensor:
    """x_i + alpha * (x_i - r_j), r_j the reference token of the largest cosine with x_i, wherever that cosine is above
    the threshold (section 3.2). The published implementation takes its argmax over the image's own tokens instead, and
    indexes the reference with the result.

    It makes the images of a batch differ; it saves nothing, and it makes every image depend on the reference.

    Args:
        tokens: [B, N, C], the image tokens of an attention block's output.
        reference: [M, C]; None: the tokens of the first image, which therefore stays as it is.
        alpha: strength; negative values pull.
        threshold: in [-1, 1].
    """
    check_number("alpha", alpha)
    check_number("threshold", threshold, -1, 1)
    reference = tokens[0] if reference is None else reference
    if tokens.ndim != 3 or reference.ndim != 2 or reference.shape[1] != tokens.shape[2]:
        raise ValueError(
            f"expected tokens [B, N, C] and reference [M, C], got {tuple(tokens.shape)} and {tuple(reference.shape)}"
        )
    unit = torch.nn.functional.normalize
    cosines = unit(tokens, dim=-1) @ unit(reference, dim=-1).T  # [B, N, M]
    best = cosines.max(dim=-1)
    pushed = tokens + alpha * (tokens - reference[best.indices])
    return torch.where((best.values > threshold)[..., None], pushed, tokens)
