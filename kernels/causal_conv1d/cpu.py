"""The compiled short convolutions: their C signatures and launchers."""

import torch

from .. import cpu, storage


class CausalConv1dArguments(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("dtype", cpu.FLAG),
        ("threads", cpu.FLAG),
        ("silu", cpu.FLAG),
        ("unused", cpu.FLAG),
        ("y", cpu.POINTER),
        ("x", cpu.POINTER),
        ("weight", cpu.POINTER),
        ("bias", cpu.POINTER),
        ("initial", cpu.POINTER),
        ("bounds", cpu.POINTER),
        ("N", cpu.SIZE),
        ("B", cpu.SIZE),
        ("T", cpu.SIZE),
        ("D", cpu.SIZE),
        ("W", cpu.SIZE),
        ("row_stride", cpu.SIZE),
        ("token_stride", cpu.SIZE),
        ("channel_stride", cpu.SIZE),
    )


class CausalConv1dUpdateArguments(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("dtype", cpu.FLAG),
        ("threads", cpu.FLAG),
        ("silu", cpu.FLAG),
        ("unused", cpu.FLAG),
        ("y", cpu.POINTER),
        ("x", cpu.POINTER),
        ("state", cpu.POINTER),
        ("weight", cpu.POINTER),
        ("bias", cpu.POINTER),
        ("B", cpu.SIZE),
        ("D", cpu.SIZE),
        ("T", cpu.SIZE),
        ("S", cpu.SIZE),
        ("W", cpu.SIZE),
    )


_by_token = cpu.Function("causal_conv1d", CausalConv1dArguments)
_by_channel = cpu.Function("causal_conv1d_by_channel", CausalConv1dArguments)
_update = cpu.Function("causal_conv1d_update", CausalConv1dUpdateArguments)


def launch(x, weight, bias, silu, initial_state, bounds) -> torch.Tensor:
    """The outputs of `reference`, in x's layout."""
    if x.stride(1) != 1 and x.stride(2) != 1:
        x = x.contiguous()
    by_token = x.stride(1) == 1
    B, D, T = x.shape
    weights = weight.float().t().contiguous() if by_token else weight.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    initial = initial_state.transpose(1, 2) if by_token and initial_state is not None else initial_state
    initial = None if initial is None else initial.contiguous()
    packed = None if bounds is None else torch.tensor(bounds)
    y = x.new_empty(B, T, D).transpose(1, 2) if by_token else x.new_empty(B, D, T)
    convolve = _by_token if by_token else _by_channel
    convolve(
        CausalConv1dArguments(
            dtype=storage.DTYPE_CODES[x.dtype],
            threads=torch.get_num_threads(),
            silu=silu,
            y=y.data_ptr(),
            x=x.data_ptr(),
            weight=weights.data_ptr(),
            bias=cpu.address(bias),
            initial=cpu.address(initial),
            bounds=cpu.address(packed),
            N=B if bounds is None else len(bounds) - 1,
            B=B,
            T=T,
            D=D,
            W=weight.shape[1],
            row_stride=x.stride(0),
            token_stride=x.stride(2),
            channel_stride=x.stride(1),
        )
    )
    return y


def update(x, state, weight, bias, silu) -> torch.Tensor:
    """A few tokens x [B, D, T] that follow `state` [B, D, S], contiguous, which is shifted in place."""
    x, weight = x.contiguous(), weight.float().contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = x.new_empty(x.shape)
    B, D, T = x.shape
    _update(
        CausalConv1dUpdateArguments(
            dtype=storage.DTYPE_CODES[x.dtype],
            threads=torch.get_num_threads(),
            silu=silu,
            y=y.data_ptr(),
            x=x.data_ptr(),
            state=state.data_ptr(),
            weight=weight.data_ptr(),
            bias=cpu.address(bias),
            B=B,
            D=D,
            T=T,
            S=state.shape[2],
            W=weight.shape[1],
        )
    )
    return y
