"""The delta rule (DeltaNet, Gated DeltaNet, Kimi Delta Attention): prefill and decode step against the same in torch."""

from functools import partial

import torch

from hasten.kernels.delta_rule import chunked, delta_rule, delta_rule_step

from ..runner import OURS, Case
from .linear_attention import SIZE, log_decay, operations

HEADS = 16
STEP_HEADS = 32
NAMES = {"scalar": "gated delta rule", "vector": "Kimi delta attention"}


def cases(device: str) -> list[Case]:
    found = [_prefill(kind, dtype, device) for kind in NAMES for dtype in (torch.bfloat16, torch.float32)]
    return found + [_step(kind, torch.bfloat16, device) for kind in NAMES]


def _inputs(T: int, heads: int, kind: str, dtype: torch.dtype, device: str):
    q, k, v = torch.randn(3, 1, T, heads, SIZE, dtype=dtype, device=device)
    return q, k, v, torch.rand(1, T, heads, device=device), log_decay(kind, T, heads, device)


def _prefill(kind: str, dtype: torch.dtype, device: str) -> Case:
    T = 4096

    def make():
        q, k, v, beta, decay = _inputs(T, HEADS, kind, dtype, device)
        return {
            OURS: [partial(delta_rule, q, k, v, beta, decay=decay, scale=SIZE**-0.5, l2_norm=True)],
            "hasten in torch": [partial(chunked.delta_rule, q, k, v, beta, decay, SIZE**-0.5, None, True)],
        }

    moved = 4 * T * HEADS * SIZE * dtype.itemsize
    # Beyond linear attention: the triangle of K K^T, the correction by the state, and the substitution.
    extra = T * HEADS * (2 * SIZE * SIZE + 2 * 2 * SIZE * 32)
    return Case(
        "delta_rule", f"prefill {T} tokens, {NAMES[kind]}", dtype, device, moved, make, operations(T, HEADS) + extra
    )


def _step(kind: str, dtype: torch.dtype, device: str) -> Case:
    def make():
        q, k, v, beta, decay = _inputs(1, STEP_HEADS, kind, dtype, device)
        states = [
            torch.zeros(1, STEP_HEADS, SIZE, SIZE, device=device)
            for _ in range(1 + (600 << 20) // (STEP_HEADS * SIZE * SIZE * 4))
        ]
        settings = {"decay": decay, "scale": SIZE**-0.5, "l2_norm": True}
        return {
            OURS: [partial(delta_rule_step, q, k, v, beta, state, **settings) for state in states],
            "torch": [partial(_torch_step, q, k, v, beta, state, decay) for state in states],
        }

    moved = 2 * STEP_HEADS * SIZE * SIZE * 4
    return Case("delta_rule_step", f"{STEP_HEADS} heads of {SIZE}, {NAMES[kind]}", dtype, device, moved, make)


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
