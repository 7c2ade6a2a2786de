"""The compiled selective scan: its C signature and launcher."""

import torch

from ... import cpu, storage


class StridedTokens(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("data", cpu.POINTER),
        ("dtype", cpu.SIZE),
        ("row", cpu.SIZE),
        ("token", cpu.SIZE),
        ("component", cpu.SIZE),
    )


class SelectiveScanArguments(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("dtype", cpu.FLAG),
        ("threads", cpu.FLAG),
        ("y", cpu.POINTER),
        ("A", cpu.POINTER),
        ("D", cpu.POINTER),
        ("bias", cpu.POINTER),
        ("initial", cpu.POINTER),
        ("state", cpu.POINTER),
        ("bounds", cpu.POINTER),
        ("sequences", cpu.SIZE),
        ("T", cpu.SIZE),
        ("channels", cpu.SIZE),
        ("N", cpu.SIZE),
        ("initial_stride", cpu.SIZE),
        ("state_stride", cpu.SIZE),
        ("softplus", cpu.FLAG),
        ("refuse", cpu.FLAG),
        ("x", StridedTokens),
        ("dt", StridedTokens),
        ("B", StridedTokens),
        ("C", StridedTokens),
        ("z", StridedTokens),
    )


_scan = cpu.Function("selective_scan", SelectiveScanArguments)


def launch(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, bounds, refuse_positive
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as in `reference`. ValueError, and nothing computed, where `refuse_positive` holds and some
    A is positive."""
    sequences = x.shape[0] if bounds is None else len(bounds) - 1
    initial = None if initial_state is None else initial_state.contiguous()
    state = x.new_empty(sequences, *A.shape, dtype=torch.float32)
    y = _run(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial, state, bounds, refuse_positive)
    return y, state


def step(x, dt, A, B, C, state, D, z, dt_bias, dt_softplus, refuse_positive) -> torch.Tensor:
    """y, as `launch`; `state` [B, D, N] is updated in place."""
    own = state if state.stride()[1:] == (A.shape[1], 1) else state.contiguous()
    y = _run(x, dt, A, B, C, D, z, dt_bias, dt_softplus, own, own, None, refuse_positive)
    if own is not state:
        state.copy_(own)
    return y


def _run(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial, state, bounds, refuse_positive):
    A, D, dt_bias = _floats(A), _floats(D), _floats(dt_bias)
    packed = None if bounds is None else torch.tensor(bounds, device="cpu")
    dt, B, C, z = _readable(dt), _readable(B), _readable(C), _readable(z)
    rows, T, channels = x.shape
    y = x.new_empty(rows, T, channels)
    if T > 1:
        storage.ask_for_huge_pages(y)
    _scan(
        SelectiveScanArguments(
            dtype=storage.DTYPE_CODES[x.dtype],
            threads=torch.get_num_threads(),
            y=y.data_ptr(),
            A=A.data_ptr(),
            D=cpu.address(D),
            bias=cpu.address(dt_bias),
            initial=cpu.address(initial),
            state=state.data_ptr(),
            bounds=cpu.address(packed),
            sequences=state.shape[0],
            T=T,
            channels=channels,
            N=A.shape[1],
            initial_stride=0 if initial is None else initial.stride(0),
            state_stride=state.stride(0),
            softplus=dt_softplus,
            refuse=refuse_positive,
            x=_strided(x),
            dt=_strided(dt),
            B=_strided(B),
            C=_strided(C),
            z=() if z is None else _strided(z),
        )
    )
    return y


def _floats(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None else tensor.float().contiguous()


def _readable(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """In a dtype that the kernel reads."""
    return tensor.float() if tensor is not None and tensor.dtype == torch.float64 else tensor


def _strided(tensor: torch.Tensor) -> tuple[int, ...]:
    """The fields of StridedTokens."""
    return (tensor.data_ptr(), storage.DTYPE_CODES[tensor.dtype], *tensor.stride())
