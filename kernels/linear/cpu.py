"""The compiled dense linear layer: its C signature and its launcher."""

import torch

from .. import cpu, storage


class LinearArguments(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("dtype", cpu.FLAG),
        ("threads", cpu.FLAG),
        ("y", cpu.POINTER),
        ("x", cpu.POINTER),
        ("weight", cpu.POINTER),
        ("bias", cpu.POINTER),
        ("rows", cpu.SIZE),
        ("N", cpu.SIZE),
        ("K", cpu.SIZE),
    )


_linear = cpu.Function("linear", LinearArguments)


def launch(x: torch.Tensor, rows: int, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] of `rows` rows, 1 to 8, weight [N, K], bias [N] or None, all contiguous -> [..., N] in x's dtype."""
    *leading, K = x.shape
    N = weight.shape[0]
    y = x.new_empty(*leading, N)
    _linear(
        LinearArguments(
            dtype=storage.DTYPE_CODES[x.dtype],
            threads=torch.get_num_threads(),
            y=y.data_ptr(),
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            bias=cpu.address(bias),
            rows=rows,
            N=N,
            K=K,
        )
    )
    return y
