"""Dense linear layer."""

from .op import linear

__all__ = ["linear"]
