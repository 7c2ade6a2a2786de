"""The compiled recurrence of RWKV-4: its C signature and launcher."""

import torch

from ... import cpu, storage


class WkvArguments(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("dtype", cpu.FLAG),
        ("threads", cpu.FLAG),
        ("y", cpu.POINTER),
        ("key", cpu.POINTER),
        ("value", cpu.POINTER),
        ("time_decay", cpu.POINTER),
        ("time_first", cpu.POINTER),
        ("numerator", cpu.POINTER),
        ("denominator", cpu.POINTER),
        ("maximum", cpu.POINTER),
        ("last_numerator", cpu.POINTER),
        ("last_denominator", cpu.POINTER),
        ("last_maximum", cpu.POINTER),
        ("B", cpu.SIZE),
        ("T", cpu.SIZE),
        ("D", cpu.SIZE),
        ("key_row", cpu.SIZE),
        ("key_token", cpu.SIZE),
        ("value_row", cpu.SIZE),
        ("value_token", cpu.SIZE),
    )


_wkv = cpu.Function("wkv", WkvArguments)


def launch(time_decay, time_first, key, value, state) -> tuple[torch.Tensor, ...]:
    """Arguments as in `reference`; y [B, T, D], and the final numerator, denominator and maximum [B, D]."""
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    time_decay, time_first = time_decay.float().contiguous(), time_first.float().contiguous()
    before = (None, None, None) if state is None else [x.contiguous() for x in state]
    B, T, D = key.shape
    y = key.new_empty(B, T, D)
    after = [key.new_empty(B, D, dtype=torch.float32) for _ in range(3)]
    _wkv(
        WkvArguments(
            dtype=storage.DTYPE_CODES[key.dtype],
            threads=torch.get_num_threads(),
            y=y.data_ptr(),
            key=key.data_ptr(),
            value=value.data_ptr(),
            time_decay=time_decay.data_ptr(),
            time_first=time_first.data_ptr(),
            numerator=cpu.address(before[0]),
            denominator=cpu.address(before[1]),
            maximum=cpu.address(before[2]),
            last_numerator=after[0].data_ptr(),
            last_denominator=after[1].data_ptr(),
            last_maximum=after[2].data_ptr(),
            B=B,
            T=T,
            D=D,
            key_row=key.stride(0),
            key_token=key.stride(1),
            value_row=value.stride(0),
            value_token=value.stride(1),
        )
    )
    return y, *after
