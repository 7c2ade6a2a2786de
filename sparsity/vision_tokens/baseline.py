"""Random scores, the baseline that every other score has to beat."""

import torch


def random_scores(seed: int, rows: int, length: int) -> torch.Tensor:
    """Uniform scores in [0, 1), float32 [rows, length] on the CPU: the same for the same arguments, and without any
    change to torch's own generators."""
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))
