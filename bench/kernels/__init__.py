"""The cases of the kernels, one module per operator."""

from ..runner import Case
from . import column_sparse_linear, linear, row_sparse_linear


def cases(device: str = "cpu") -> list[Case]:
    """All of them."""
    return [*linear.cases(device), *column_sparse_linear.cases(device), *row_sparse_linear.cases(device)]
