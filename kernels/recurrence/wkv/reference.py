"""The definition of RWKV-4's recurrence, token by token."""

import torch

from ...sequence import state_dtype

EMPTY = -1e38  # the maximum of no keys


def wkv(
    time_decay: torch.Tensor,
    time_first: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """key, value [B, T, D], time_decay, time_first [D] -> y [B, T, D] and the final state, three of [B, D].

    y_t = sum_{i <= t} exp(p_ti) v_i / sum_{i <= t} exp(p_ti) with p_tt = time_first + k_t and, for i < t,
    p_ti = k_i - (t - 1 - i) exp(time_decay). The sums are kept over exp(maximum), the largest exponent so far.
    """
    dtype = state_dtype(key)
    decay, first = -time_decay.to(dtype).exp(), time_first.to(dtype)
    if state is None:
        zeros = torch.zeros_like(key[:, 0], dtype=dtype)
        state = zeros, zeros, zeros + EMPTY
    numerator, denominator, maximum = state
    outputs = []
    for t in range(key.shape[1]):
        k, v = key[:, t].to(dtype), value[:, t].to(dtype)
        highest = torch.maximum(maximum, k + first)
        past, present = (maximum - highest).exp(), (k + first - highest).exp()
        outputs.append((past * numerator + present * v) / (past * denominator + present))
        highest = torch.maximum(maximum + decay, k)
        past, present = (maximum + decay - highest).exp(), (k - highest).exp()
        numerator, denominator, maximum = past * numerator + present * v, past * denominator + present, highest
    return torch.stack(outputs, 1).to(key.dtype), (numerator, denominator, maximum)
