"""Contextually aware thresholding, CATS (Lee et al. 2024, arXiv 2404.08763): neuron i of a gated MLP
scores |act(gate)_i|."""

import torch


def cats(down: torch.Tensor) -> torch.Tensor:
    """The factor of every neuron in its score, 1.

    down [H, I], the weight of the down projection -> float32 [I].
    """
    return torch.ones(down.shape[-1], device=down.device)
