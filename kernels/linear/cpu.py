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


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] of 1 to 8 rows, weight [N, K], bias [N] or None, all contiguous -> [..., N] in x's dtype."""
    N, K = weight.shape
    y = x.new_empty(*x.shape[:-1], N)
    _linear(
        LinearArguments(
            dtype=storage.DTYPE_CODES[x.dtype],
            threads=torch.get_num_threads(),
            y=y.data_ptr(),
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            bias=cpu.address(bias),
            rows=x.numel() // K,
            N=N,
            K=K,
        )
    )
    return y
