"""RWKV-4's recurrence: a mean of all values so far, weighted by keys that age."""

import torch

from ... import backend, checks, sequence
from . import cpu, reference

_library = torch.library.Library("hasten", "FRAGMENT")
_library.define(
    "wkv(Tensor time_decay, Tensor time_first, Tensor key, Tensor value, Tensor? numerator, Tensor? denominator, "
    "Tensor? maximum) -> (Tensor, Tensor, Tensor, Tensor)"
)

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def wkv(
    time_decay: torch.Tensor,
    time_first: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: State | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, State]:
    """key, value [B, T, D] -> y [B, T, D], and the final state if `return_state` (RWKV: Peng et al. 2023, arXiv
    2305.13048, eq. 16 to 19, with a running maximum as in its appendix).

    y_t = sum_i exp(p_i) v_i / sum_i exp(p_i) over the tokens up to t, channel by channel, where p_i is
    k_i - (t - 1 - i) exp(time_decay), and time_first + k_t for token t itself. Sums are in float32; y is contiguous, of
    key's dtype. One token with a state is a step of decode.

    Args:
        time_decay, time_first: [D], of any floating dtype. A key ages by exp(time_decay) per token.
        key, value: float32, float16 or bfloat16 (float64 runs in plain torch), alike.
        state: (numerator, denominator, maximum), three of [B, D] float32, the sums over exp(maximum), and the largest
            exponent; not changed. None for no tokens before.
        return_state: also return the final state, three new tensors.

    Raises:
        TypeError: dtypes that do not fit, or a state that is not of three tensors.
        ValueError: shapes or devices that do not fit, or T = 0.
        NotImplementedError: an input that requires grad (see `hasten.kernels.checks`).
    """
    tensors = {"time_decay": time_decay, "time_first": time_first, "key": key, "value": value}
    if state is not None:
        if not isinstance(state, (tuple, list)) or len(state) != 3:
            raise TypeError(f"state: expected three tensors (numerator, denominator, maximum), got {state!r}")
        tensors |= {"numerator": state[0], "denominator": state[1], "maximum": state[2]}
    checks.check_tensors(**tensors)
    numerator, denominator, maximum = (None, None, None) if state is None else state
    if backend.is_reference():
        y, *state = _run(time_decay, time_first, key, value, numerator, denominator, maximum)
    else:
        checks.refuse_gradients(**tensors)
        y, *state = _op(time_decay, time_first, key, value, numerator, denominator, maximum)
    return (y, tuple(state)) if return_state else y


def _check(time_decay, time_first, key, value, *state):
    if key.dim() != 3 or 0 in key.shape:
        raise ValueError(f"key: expected shape [B, T, D], each of at least 1, got shape {list(key.shape)}")
    checks.check_floating("key", key)
    rows, _, channels = key.shape
    checks.check_shape("value", value, list(key.shape))
    checks.check_like(key, "value", value, "key")
    for name, tensor in (("time_decay", time_decay), ("time_first", time_first)):
        checks.check_shape(name, tensor, [channels])
        checks.check_floating(name, tensor)
        checks.check_device(key, name, tensor, "key")
    for name, tensor in zip(("numerator", "denominator", "maximum"), state, strict=True):
        if tensor is None:
            continue
        checks.check_shape(name, tensor, [rows, channels])
        if tensor.dtype != sequence.state_dtype(key):
            raise TypeError(f"{name}: expected {sequence.state_dtype(key)}, got {tensor.dtype}")
        checks.check_device(key, name, tensor, "key")


def _run(time_decay, time_first, key, value, *state):
    _check(time_decay, time_first, key, value, *state)
    before, name = None if state[0] is None else state, backend.choose(key)
    if name == "reference":
        y, after = reference.wkv(time_decay, time_first, key, value, before)
        return y.contiguous(), *after
    if name == "triton":
        from . import triton

        return triton.launch(time_decay, time_first, key, value, before)
    return cpu.launch(time_decay, time_first, key, value, before)


def _fake(time_decay, time_first, key, value, *state):
    _check(time_decay, time_first, key, value, *state)
    after = [key.new_empty(key.shape[0], key.shape[2], dtype=sequence.state_dtype(key)) for _ in range(3)]
    return torch.empty_like(key, memory_format=torch.contiguous_format), *after


_library.impl("wkv", _run, "CompositeExplicitAutograd")
torch.library.register_fake("hasten::wkv", _fake, lib=_library)
_op = torch.ops.hasten.wkv.default
