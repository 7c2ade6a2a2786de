"""How the Triton kernels are called."""

from ..triton_recurrence import launch, step

__all__ = ["launch", "step"]
