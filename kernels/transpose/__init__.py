"""Matrices stored anew with contiguous columns."""

from .op import transpose

__all__ = ["transpose"]
