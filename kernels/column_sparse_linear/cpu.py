"""The compiled linear layer that skips columns: its C signature and its launcher."""

import torch

from .. import cpu, storage


class ColumnSparseLinearArguments(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("dtype", cpu.FLAG),
        ("threads", cpu.FLAG),
        ("y", cpu.POINTER),
        ("x", cpu.POINTER),
        ("weight", cpu.POINTER),
        ("bias", cpu.POINTER),
        ("cutoff", cpu.POINTER),
        ("rows", cpu.SIZE),
        ("N", cpu.SIZE),
        ("K", cpu.SIZE),
    )


_column_sparse_linear = cpu.Function("column_sparse_linear", ColumnSparseLinearArguments)


def launch(
    x: torch.Tensor, rows: int, weight: torch.Tensor, cutoff: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [..., K] of `rows` rows, 1 to 8, weight [N, K] with contiguous weight.t(), cutoff [K] fp32 or None,
    bias [N] or None -> [..., N]."""
    *leading, K = x.shape
    N = weight.shape[0]
    y = x.new_empty(*leading, N)
    _column_sparse_linear(
        ColumnSparseLinearArguments(
            dtype=storage.DTYPE_CODES[x.dtype],
            threads=torch.get_num_threads(),
            y=y.data_ptr(),
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            bias=cpu.address(bias),
            cutoff=cpu.address(cutoff),
            rows=rows,
            N=N,
            K=K,
        )
    )
    return y
