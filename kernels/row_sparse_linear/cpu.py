"""The compiled gated linear layer: its C signature and its launcher."""

import torch

from .. import cpu, storage


class RowSparseLinearArguments(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("dtype", cpu.FLAG),
        ("threads", cpu.FLAG),
        ("y", cpu.POINTER),
        ("x", cpu.POINTER),
        ("weight", cpu.POINTER),
        ("gate", cpu.POINTER),
        ("bias", cpu.POINTER),
        ("threshold", cpu.POINTER),
        ("rows", cpu.SIZE),
        ("N", cpu.SIZE),
        ("K", cpu.SIZE),
    )


_row_sparse_linear = cpu.Function("row_sparse_linear", RowSparseLinearArguments)


def launch(
    x: torch.Tensor,
    rows: int,
    weight: torch.Tensor,
    gate: torch.Tensor,
    threshold: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [..., K] of `rows` rows, 1 to 8, weight [N, K], gate [..., N], threshold [] fp32, bias [N] or None,
    contiguous -> [..., N]."""
    N, K = weight.shape
    y = torch.empty_like(gate)
    _row_sparse_linear(
        RowSparseLinearArguments(
            dtype=storage.DTYPE_CODES[x.dtype],
            threads=torch.get_num_threads(),
            y=y.data_ptr(),
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            gate=gate.data_ptr(),
            bias=cpu.address(bias),
            threshold=threshold.data_ptr(),
            rows=rows,
            N=N,
            K=K,
        )
    )
    return y
