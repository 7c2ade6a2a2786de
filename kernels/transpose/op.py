"""A transposed copy of matrices: what storing a weight by columns costs."""

import torch

from .. import backend, checks
from . import cpu, reference

SIZES = (2, 4)  # bytes of the elements that the compiled kernel moves


def transpose(x: torch.Tensor) -> torch.Tensor:
    """x [..., R, C] of any dtype and device -> [..., C, R], contiguous, without gradients.

    Raises:
        TypeError: x is no tensor.
        ValueError: x has fewer than two dimensions.
    """
    checks.check_tensors(x=x)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape [..., R, C], got shape {list(x.shape)}")
    x = x.detach()
    compiled = x.is_contiguous() and x.element_size() in SIZES and x.is_floating_point() and x.numel()
    if not compiled or backend.choose(x) != "cpu":
        return reference.transpose(x)
    return cpu.launch(x)
