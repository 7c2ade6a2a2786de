"""Linear layer that skips the rows of outputs whose gate is nearly zero."""

from .op import row_sparse_linear

__all__ = ["row_sparse_linear"]
