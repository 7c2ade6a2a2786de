"""The cases of the kernels, one module per operator."""

from ..runner import Case
from . import (
    column_sparse_linear,
    delta_rule,
    linear,
    linear_attention,
    row_sparse_linear,
    selective_scan,
    token_scores,
)


def cases(device: str = "cpu") -> list[Case]:
    """All of them."""
    linears, recurrences = (
        (linear, column_sparse_linear, row_sparse_linear),
        (linear_attention, delta_rule, selective_scan),
    )
    operators = (*linears, *recurrences, token_scores)
    return [case for operator in operators for case in operator.cases(device)]
