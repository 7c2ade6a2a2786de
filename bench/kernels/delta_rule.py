"""The delta rule (DeltaNet, Gated DeltaNet, Kimi Delta Attention):
prefill and decode step against the same in torch."""

from functools import partial

import torch
from torch.nn.functional import softplus

from hasten.kernels.recurrence.delta_rule import chunked, delta_rule, delta_rule_step

from ..runner import OURS, Case
from .linear_attention import (
    SIZE,
    STATE_BYTES,
    STEP_HEADS,
    TYPICAL,
    captured,
    cold_states,
    cold_tokens,
    flash_linear_attention,
    inverse_softplus,
    operations,
    time_steps,
)

HEADS = {"cpu": 16, "cuda": 32}
NAMES = {"scalar": "gated delta rule", "vector": "Kimi delta attention"}


def cases(device: str) -> list[Case]:
    found = [_prefill(kind, dtype, device) for kind in NAMES for dtype in (torch.bfloat16, torch.float32)]
    return found + [_step(kind, torch.bfloat16, device) for kind in NAMES]


def _gates(T: int, heads: int, kind: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """beta, and log decays as Qwen3-Next and Kimi-Linear have them at their initialisation: down to -20 a token."""
    rates = torch.empty(heads, device=device).uniform_(*{"scalar": (0.01, 16), "vector": (1, 16)}[kind])
    if kind == "scalar":
        decay = -rates * softplus(torch.randn(1, T, heads, device=device) + 1)
    else:
        bias = inverse_softplus(time_steps(heads * SIZE, device)).view(heads, SIZE)
        decay = -rates[:, None] * softplus(torch.randn(1, T, heads, SIZE, device=device) + bias)
    return torch.rand(1, T, heads, device=device), decay


def _prefill(kind: str, dtype: torch.dtype, device: str) -> Case:
    T, heads = TYPICAL[device], HEADS[device]

    def make():
        inputs, (beta, decay) = cold_tokens(T, heads, dtype, device), _gates(T, heads, kind, device)
        settings = {"decay": decay, "scale": SIZE**-0.5, "l2_norm": True}
        contenders = {
            OURS: [partial(delta_rule, *qkv, beta, **settings) for qkv in inputs],
            "hasten in torch": [
                partial(chunked.delta_rule, *qkv, beta, decay, SIZE**-0.5, None, True) for qkv in inputs
            ],
        }
        if fla := flash_linear_attention(device):
            peer = {"scalar": fla.chunk_gated_delta_rule, "vector": fla.chunk_kda}[kind]
            settings = {"g": decay, "beta": beta.to(dtype), "use_qk_l2norm_in_kernel": True}
            contenders["flash-linear-attention"] = [partial(peer, *qkv, **settings) for qkv in inputs]
        return contenders

    moved = 4 * T * heads * SIZE * dtype.itemsize
    # Beyond linear attention: the triangle of K K^T, the correction by the state, and the substitution.
    work = operations(T, heads) + T * heads * (2 * SIZE * SIZE + 2 * 2 * SIZE * 32)
    return Case("delta_rule", f"prefill {T} tokens, {NAMES[kind]}", dtype, device, moved, make, work)


def _step(kind: str, dtype: torch.dtype, device: str) -> Case:
    def make():
        q, k, v = torch.randn(3, 1, 1, STEP_HEADS, SIZE, dtype=dtype, device=device)
        beta, decay = _gates(1, STEP_HEADS, kind, device)
        states = cold_states(device)
        settings = {"decay": decay, "scale": SIZE**-0.5, "l2_norm": True}
        ours = [partial(delta_rule_step, q, k, v, beta, state, **settings) for state in states]
        theirs = [partial(_torch_step, q, k, v, beta, state, decay) for state in states]
        return {OURS: [captured(call, device) for call in ours], "torch": [captured(call, device) for call in theirs]}

    name = f"{STEP_HEADS} heads of {SIZE}, {NAMES[kind]}"
    return Case("delta_rule_step", name, dtype, device, 2 * STATE_BYTES, make)


def _torch_step(q, k, v, beta, state, decay):
    """The step as one writes it in torch, with the state multiplied and added to in place."""
    dtype = q.dtype
    q, k, v = (x[:, 0].float() for x in (q, k, v))
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    factor = decay[:, 0].float().exp()
    state.mul_(factor[..., None] if factor.dim() == 3 else factor[..., None, None])
    u = beta[:, 0, :, None].float() * (v - (k[..., None, :] @ state)[..., 0, :])
    state.add_(k[..., None] * u[..., None, :])
    return (SIZE**-0.5 * (q[..., None, :] @ state)[..., 0, :]).to(dtype)
