"""Adapters for the layers of Mamba-2."""

import torch
import torch.nn.functional as F

from hasten.acceleration.techniques.adapted_forwards import check_state, refuse_others
from hasten.kernels.recurrence.linear_attention import linear_attention, linear_attention_step
from hasten.kernels.sequence import state_dtype


def chunk_mamba2(
    hidden_states,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    dt_bias=None,
    initial_states=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    **others,
):
    """For `mamba2_chunk_scan`, in chunks of ours: k = B, v = x, written with strength dt, q = C, decay = dt A.
    The state [K, V] is transformers' [head_dim, state_size], transposed."""
    refuse_others(others)
    dt = _time_step(dt, dt_bias, dt_softplus).clamp(*dt_limit)
    state, dtype = None, state_dtype(B)
    if initial_states is not None:
        check_state("recurrent state", initial_states, [B.shape[0], *hidden_states.shape[2:], B.shape[-1]])
        state = initial_states.to(dtype).transpose(-1, -2)
    output, state = linear_attention(
        C,
        B,
        hidden_states,
        beta=dt,
        decay=dt * A.float(),
        initial_state=state,
        return_state=True,
        out_dtype=dtype,
    )
    if D is not None:
        output = torch.addcmul(output, D.to(dtype)[:, None], hidden_states.to(dtype))
    return (output, state.transpose(-1, -2)) if return_final_states else output


def step_mamba2(
    state,
    hidden_states,
    dt,
    A,
    B,
    C,
    D=None,
    dt_bias=None,
    dt_softplus=False,
    z=None,
    **others,
):
    """For `mamba2_selective_state_update`: the state is updated in place.
    dt, A, D and their biases are the same for a whole head there."""
    refuse_others(others)
    check_state("recurrent state", state, [*hidden_states.shape, B.shape[-1]])
    dt = _time_step(dt[..., 0], None if dt_bias is None else dt_bias[:, 0], dt_softplus)
    x = hidden_states.float()
    kept = state.float()
    output = linear_attention_step(
        C.float()[:, None],
        B.float()[:, None],
        x[:, None],
        kept.transpose(-1, -2),
        beta=dt[:, None],
        decay=(dt * A[:, 0, 0].float())[:, None],
    )[:, 0]
    if kept is not state:
        state.copy_(kept)
    if D is not None:
        output = output + D[:, :1].float() * x
    return (output if z is None else output * F.silu(z)).to(hidden_states.dtype)


def _time_step(dt, bias, softplus) -> torch.Tensor:
    dt = dt.float() if bias is None else dt.float() + bias.float()
    return F.softplus(dt) if softplus else dt
