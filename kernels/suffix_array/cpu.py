"""The compiled suffix array: its C signature and its launcher."""

import torch

from .. import cpu


class SuffixArrayArguments(cpu.Arguments):
    __slots__ = ()
    _fields_ = (("order", cpu.POINTER), ("text", cpu.POINTER), ("count", cpu.SIZE))


_suffix_array = cpu.Function("suffix_array", SuffixArrayArguments)


def launch(text: torch.Tensor) -> torch.Tensor:
    """text [N] uint8, contiguous -> [N] int32."""
    order = torch.empty(text.numel(), dtype=torch.int32)
    _suffix_array(SuffixArrayArguments(order=order.data_ptr(), text=text.data_ptr(), count=text.numel()))
    return order
