"""The selective scan of Mamba with its skip connection and gate: whole sequences for prefill, a step that updates its
state in place for decode."""

import torch

from ... import backend, checks, sequence
from . import cpu, reference

_library = torch.library.Library("hasten", "FRAGMENT")
_library.define(
    "selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)"
)
_library.define(
    "selective_scan_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor(a!) state, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus) -> Tensor"
)


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x [B, T, D] -> y [B, T, D], and the final state if `return_state` (Mamba: Gu & Dao 2023, arXiv 2312.00752,
    algorithm 2).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t and y_t = (C_t . h_t + D x_t) silu(z_t), channel by channel, with a state h
    of N components per channel, in float32 whatever the inputs are. y is contiguous, of x's dtype.

    Args:
        x: float32, float16 or bfloat16 (float64 runs in plain torch), of any strides; fast are contiguous channels
            and contiguous tokens.
        dt: [B, T, D], time steps; as `z`, `B` and `C` of any strides and of any floating dtype.
        A: [D, N], at most 0 where dt is positive.
        B, C: [B, T, N], what writes to the state and what reads it.
        D: [D], what of x is added to the output; None for nothing.
        z: [B, T, D], the output's gate before its SiLU; None for no gate.
        dt_bias: [D], added to dt; None for nothing.
        dt_softplus: take softplus(dt + dt_bias) for dt.
        initial_state: [S, D, N] float32, where S is the batch, or the number of packed sequences; not changed. None for
            zeros.
        return_state: also return the final state, of the shape of `initial_state`.
        cu_seqlens: int32 or int64 [S + 1], rising from 0 to T: where packed sequences begin and end. x has one row
            then. (Whether they rise from 0 to T is looked at on a CPU alone.)

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes or devices that do not fit, T = 0, or a positive dt A, under which the state grows (on a CPU;
            on a GPU looking would wait for the device).
        NotImplementedError: an input that requires grad (see `hasten.kernels.checks`).
    """
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    tensors |= {"initial_state": initial_state, "cu_seqlens": cu_seqlens}
    checks.check_tensors(**tensors)
    if backend.is_reference():
        y, state = _run(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    else:
        checks.refuse_gradients(**tensors)
        y, state = _op(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    return (y, state) if return_state else y


def selective_scan_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
) -> torch.Tensor:
    """The same for a few tokens that continue `state` [B, D, N], which is updated in place: decode.

    Arguments, shapes ([B, T, D] with T = 1 in decode) and errors as in `selective_scan`.
    """
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "state": state, "D": D, "z": z, "dt_bias": dt_bias}
    checks.check_tensors(**tensors)
    checks.refuse_gradients(checks.IN_PLACE, **tensors)
    return _step_op(x, dt, A, B, C, state, D, z, dt_bias, dt_softplus)


def _check(x, dt, A, B, C, D, z, dt_bias, state, cu_seqlens=None, state_name="initial_state"):
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x: expected shape [B, T, D], each of at least 1, got shape {list(x.shape)}")
    checks.check_floating("x", x)
    rows, T, channels = x.shape
    if A.dim() != 2 or A.shape[0] != channels or not A.shape[1]:
        expected = f"[{channels}, N] with N of at least 1 for x of shape {list(x.shape)}"
        raise ValueError(f"A: expected shape {expected}, got shape {list(A.shape)}")
    N, device = A.shape[1], x.device
    tokens, writing, channel = (rows, T, channels), (rows, T, N), (channels,)
    for name, tensor, shape in (
        ("dt", dt, tokens),
        ("A", A, A.shape),
        ("B", B, writing),
        ("C", C, writing),
        ("D", D, channel),
        ("z", z, tokens),
        ("dt_bias", dt_bias, channel),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            checks.check_shape(name, tensor, list(shape))
        checks.check_floating(name, tensor)
        if tensor.device != device:
            checks.check_device(x, name, tensor)
    sequence.check_packing(x, cu_seqlens)
    if state is not None:
        sequences = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if state.shape != (sequences, channels, N):
            checks.check_shape(state_name, state, [sequences, channels, N])
        if state.dtype != sequence.state_dtype(x):
            raise TypeError(f"{state_name}: expected {sequence.state_dtype(x)}, got {state.dtype}")
        if state.device != device:
            checks.check_device(x, state_name, state)


def _run(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens):
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    arguments, name = (x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state), backend.choose(x)
    # Looking at values on a GPU would wait for it.
    looked_at = cu_seqlens is not None and (cu_seqlens.is_cpu or name != "triton")
    bounds = sequence.boundaries(cu_seqlens, x.shape[1]) if looked_at else None
    if name == "cpu":
        return _unless_it_grows(cpu.launch, (*arguments, bounds), dt, A, dt_bias, dt_softplus)
    _check_growth(dt, A, dt_bias, dt_softplus)
    if name == "triton":
        from . import triton

        return triton.launch(*arguments, cu_seqlens)
    y, state = reference.selective_scan(*arguments, bounds)
    return y.contiguous(), state


def _run_step(x, dt, A, B, C, state, D, z, dt_bias, dt_softplus):
    _check(x, dt, A, B, C, D, z, dt_bias, state, state_name="state")
    if not state.is_contiguous():
        checks.check_writable("state", state)
    arguments, name = (x, dt, A, B, C, state, D, z, dt_bias, dt_softplus), backend.choose(x)
    if name == "cpu":
        return _unless_it_grows(cpu.step, arguments, dt, A, dt_bias, dt_softplus)
    _check_growth(dt, A, dt_bias, dt_softplus)
    if name == "triton":
        from . import triton

        return triton.step(*arguments)
    y, new = reference.selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, state, None)
    state.copy_(new)
    return y.contiguous()


def _unless_it_grows(launcher, arguments, dt, A, dt_bias, dt_softplus):
    """What the compiled kernel returns. Where dt cannot be negative it finds a positive A itself, at once."""
    found = launcher(*arguments, True) if dt_softplus else None
    if found is None:
        _check_growth(dt, A, dt_bias, dt_softplus)
        found = launcher(*arguments, False)
    return found


@torch.no_grad()
def _check_growth(dt, A, dt_bias, dt_softplus):
    """Raises ValueError where a product of dt and A on a CPU is positive: by each channel's extremes."""
    if not A.is_cpu:
        return
    wide = sequence.state_dtype(A)
    steps = reference.time_steps(dt, dt_bias, dt_softplus, wide).flatten(0, 1).nan_to_num(0)
    rates = A.to(wide).nan_to_num(0)
    largest = torch.maximum(steps.amax(0) * rates.amax(1), steps.amin(0) * rates.amin(1))
    grows = ((steps.amax(0) > 0) & (rates.amax(1) > 0)) | ((steps.amin(0) < 0) & (rates.amin(1) < 0))
    if bool(grows.any()):
        raise ValueError(f"dt A: expected at most 0, for the state grows otherwise; got {largest[grows].max():.4g}")


def _fake(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens):
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = x.new_empty(sequences, *A.shape, dtype=sequence.state_dtype(x))
    return torch.empty_like(x, memory_format=torch.contiguous_format), state


def _fake_step(x, dt, A, B, C, state, D, z, dt_bias, dt_softplus):
    _check(x, dt, A, B, C, D, z, dt_bias, state, state_name="state")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library.impl("selective_scan", _run, "CompositeExplicitAutograd")
_library.impl("selective_scan_step", _run_step, "CompositeExplicitAutograd")
torch.library.register_fake("hasten::selective_scan", _fake, lib=_library)
torch.library.register_fake("hasten::selective_scan_step", _fake_step, lib=_library)
_op = torch.ops.hasten.selective_scan.default
_step_op = torch.ops.hasten.selective_scan_step.default
