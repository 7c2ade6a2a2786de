"""The compiled transposed copy: its C signature and its launcher."""

import torch

from .. import cpu


class TransposeArguments(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("size", cpu.FLAG),
        ("threads", cpu.FLAG),
        ("y", cpu.POINTER),
        ("x", cpu.POINTER),
        ("count", cpu.SIZE),
        ("R", cpu.SIZE),
        ("C", cpu.SIZE),
    )


_transpose = cpu.Function("transpose", TransposeArguments)


def launch(x: torch.Tensor) -> torch.Tensor:
    """x [..., R, C], contiguous, of 2 or 4 bytes an element -> [..., C, R]."""
    R, C = x.shape[-2:]
    y = torch.empty((*x.shape[:-2], C, R), dtype=x.dtype)
    _transpose(
        TransposeArguments(
            size=x.element_size(),
            threads=torch.get_num_threads(),
            y=y.data_ptr(),
            x=x.data_ptr(),
            count=x.numel() // (R * C),
            R=R,
            C=C,
        )
    )
    return y
