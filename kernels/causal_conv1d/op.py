"""Short depthwise causal convolution with state, as the layers of Gated DeltaNet,
Kimi Delta Attention and Mamba-2 have before their recurrence."""

from itertools import pairwise

import torch

from .. import backend, checks, sequence
from . import cpu, reference

MAX_WIDTH = 8
ACTIVATIONS = (None, "silu", "swish")

_library = torch.library.Library("hasten", "FRAGMENT")
_library.define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? cu_seqlens) "
    "-> (Tensor, Tensor)"
)
_library.define("causal_conv1d_update(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu) -> Tensor")


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x [B, D, T] -> y [B, D, T], and the last W - 1 inputs if `return_state`:
    y_t = act(bias + sum_w weight_w * x_{t - (W - 1) + w}), channel by channel.

    Sums are in float32. y has x's layout in memory; fast are a contiguous [B, D, T] and, faster,
    the transpose of a contiguous [B, T, D].

    Args:
        x: float32, float16 or bfloat16 (float64 runs in plain torch).
        weight, bias: [D, W] with W from 1 to 8, and [D]; of any floating dtype.
        activation: None, or "silu", also called "swish".
        initial_state: [N, D, W - 1], the inputs before x, of x's dtype; None for zeros. N is B,
            or the number of packed sequences.
        return_state: also return the last W - 1 inputs, [N, D, W - 1].
        cu_seqlens: int32 or int64 [N + 1], rising from 0 to T: where packed sequences begin and end. B is 1 then.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes or devices that do not fit, T = 0, or an unknown activation.
        NotImplementedError: an input that requires grad (see `hasten.kernels.checks`).
    """
    silu = _is_silu(activation)
    tensors = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    checks.check_tensors(**tensors)
    if backend.is_reference():
        y, state = _run(x, weight, bias, silu, initial_state, cu_seqlens)
    else:
        checks.refuse_gradients(**tensors)
        y, state = _op(x, weight, bias, silu, initial_state, cu_seqlens)
    return (y, state) if return_state else y


def causal_conv1d_update(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
) -> torch.Tensor:
    """The same for a few tokens that follow `state` [B, D, S], the last S >= W - 1 inputs,
    which is shifted in place: decode.

    Arguments, shapes (x [B, D, T], T = 1 in decode) and errors as in `causal_conv1d`.
    """
    tensors = {"x": x, "state": state, "weight": weight, "bias": bias}
    checks.check_tensors(**tensors)
    checks.refuse_gradients(checks.IN_PLACE, **tensors)
    return _update_op(x, state, weight, bias, _is_silu(activation))


def _is_silu(activation) -> bool:
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation: expected None, "silu" or "swish", got {activation!r}')
    return activation is not None


def _check(x, weight, bias):
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x: expected shape [B, D, T], each of at least 1, got shape {list(x.shape)}")
    checks.check_floating("x", x)
    if weight.dim() != 2 or weight.shape[0] != x.shape[1] or not 1 <= weight.shape[1] <= MAX_WIDTH:
        expected = f"[{x.shape[1]}, W] with W from 1 to {MAX_WIDTH}"
        raise ValueError(f"weight: expected shape {expected}, got shape {list(weight.shape)}")
    if bias is not None:
        checks.check_shape("bias", bias, [x.shape[1]])
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            checks.check_floating(name, tensor)
            checks.check_device(x, name, tensor)


def _check_sequence(x, weight, bias, initial_state, cu_seqlens):
    _check(x, weight, bias)
    sequence.check_packing(x, cu_seqlens)
    if initial_state is not None:
        N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        checks.check_shape("initial_state", initial_state, [N, x.shape[1], weight.shape[1] - 1])
        checks.check_like(x, "initial_state", initial_state)


def _check_update(x, state, weight, bias):
    _check(x, weight, bias)
    if state.dim() != 3 or state.shape[:2] != x.shape[:2] or state.shape[2] < weight.shape[1] - 1:
        expected = f"[{x.shape[0]}, {x.shape[1]}, S] with S of at least {weight.shape[1] - 1}"
        raise ValueError(f"state: expected shape {expected}, got shape {list(state.shape)}")
    checks.check_like(x, "state", state)


def _run(x, weight, bias, silu, initial_state, cu_seqlens):
    _check_sequence(x, weight, bias, initial_state, cu_seqlens)
    bounds = None if cu_seqlens is None else sequence.boundaries(cu_seqlens, x.shape[2])
    name = backend.choose(x)
    if name == "reference":
        y, state = reference.causal_conv1d(x, weight, bias, silu, initial_state, bounds)
        y = y.transpose(1, 2).contiguous().transpose(1, 2) if x.stride(1) == 1 else y.contiguous()
        return y, state.clone(memory_format=torch.contiguous_format)
    if name == "triton":
        from . import triton

        y = triton.launch(x, weight, bias, silu, initial_state, bounds)
    else:
        y = cpu.launch(x, weight, bias, silu, initial_state, bounds)
    return y, _last_inputs(x, weight.shape[1] - 1, initial_state, bounds)


def _last_inputs(x, count, initial_state, bounds) -> torch.Tensor:
    """The last `count` inputs of every sequence, [N, D, count]."""
    pieces = [x] if bounds is None else [x[..., begin:end] for begin, end in pairwise(bounds)]
    states = []
    for n, piece in enumerate(pieces):
        if piece.shape[2] < count:
            zeros = piece.new_zeros(*piece.shape[:2], count)
            before = zeros if initial_state is None else initial_state if bounds is None else initial_state[n : n + 1]
            piece = torch.cat([before, piece], -1)
        states.append(piece[..., piece.shape[2] - count :])
    return torch.cat(states).contiguous()


def _run_update(x, state, weight, bias, silu):
    _check_update(x, state, weight, bias)
    checks.check_writable("state", state)
    name = backend.choose(x)
    W = weight.shape[1]
    if name == "cpu" and state.is_contiguous():
        return cpu.update(x, state, weight, bias, silu)
    if name == "triton":
        from . import triton

        return triton.update(x, state, weight, bias, silu)
    y, _ = reference.causal_conv1d(x, weight, bias, silu, state[..., state.shape[2] - (W - 1) :], None)
    state.copy_(torch.cat([state, x], -1)[..., x.shape[2] :])
    return y


def _fake(x, weight, bias, silu, initial_state, cu_seqlens):
    _check_sequence(x, weight, bias, initial_state, cu_seqlens)
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    y = y if x.stride(1) == 1 else y.contiguous()
    return y, x.new_empty(N, x.shape[1], weight.shape[1] - 1)


def _fake_update(x, state, weight, bias, silu):
    _check_update(x, state, weight, bias)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library.impl("causal_conv1d", _run, "CompositeExplicitAutograd")
_library.impl("causal_conv1d_update", _run_update, "CompositeExplicitAutograd")
torch.library.register_fake("hasten::causal_conv1d", _fake, lib=_library)
torch.library.register_fake("hasten::causal_conv1d_update", _fake_update, lib=_library)
_op = torch.ops.hasten.causal_conv1d.default
_update_op = torch.ops.hasten.causal_conv1d_update.default
