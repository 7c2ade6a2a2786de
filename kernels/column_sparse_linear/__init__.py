"""Linear layer that skips the columns of inputs that are nearly zero."""

from .op import column_sparse_linear

__all__ = ["column_sparse_linear"]
