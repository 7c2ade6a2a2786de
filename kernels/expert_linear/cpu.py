"""The compiled linear layers of experts: their C signature and their launcher."""

import torch

from .. import cpu, storage


class ExpertLinearArguments(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("dtype", cpu.FLAG),
        ("threads", cpu.FLAG),
        ("column_major", cpu.FLAG),
        ("unused", cpu.FLAG),
        ("y", cpu.POINTER),
        ("x", cpu.POINTER),
        ("weight", cpu.POINTER),
        ("bias", cpu.POINTER),
        ("ids", cpu.POINTER),
        ("cutoff", cpu.POINTER),
        ("T", cpu.SIZE),
        ("P", cpu.SIZE),
        ("E", cpu.SIZE),
        ("N", cpu.SIZE),
        ("K", cpu.SIZE),
        ("token_stride", cpu.SIZE),
        ("pick_stride", cpu.SIZE),
    )


_expert_linear = cpu.Function("expert_linear", ExpertLinearArguments)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None,
    cutoff: torch.Tensor | None,
    column_major: bool,
) -> torch.Tensor:
    """x [T, K] or [T, P, K], weight [E, N, K], ids [T, P], bias [E, N] or None, cutoff [E, K] fp32 or None -> [T, P, N]

    All contiguous but a column-major weight, of which weight.mT is; a cutoff needs that.
    """
    (T, P), (E, N, K) = ids.shape, weight.shape
    per_token = x.dim() == 2
    y = x.new_empty(T, P, N)
    _expert_linear(
        ExpertLinearArguments(
            dtype=storage.DTYPE_CODES[x.dtype],
            threads=torch.get_num_threads(),
            column_major=column_major,
            y=y.data_ptr(),
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            bias=cpu.address(bias),
            ids=ids.data_ptr(),
            cutoff=cpu.address(cutoff),
            T=T,
            P=P,
            E=E,
            N=N,
            K=K,
            token_stride=K if per_token else P * K,
            pick_stride=0 if per_token else K,
        )
    )
    return y
