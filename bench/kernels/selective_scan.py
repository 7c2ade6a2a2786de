"""The selective scan of Mamba: prefill and the decode step against transformers' own form in torch, with time steps and
rates as its layers are initialised with."""

from functools import partial

import torch
from torch.nn import functional

from hasten.kernels.recurrence.selective_scan import selective_scan, selective_scan_step

from ..runner import COLD_BYTES, OURS, Case
from .linear_attention import captured

SHAPES = {"Mamba 130M": 1536, "Mamba 2.8B": 5120, "Falcon-Mamba 7B": 8192}  # channels
N = 16
TOKENS = {"cpu": 256, "cuda": 4096}
OPERATIONS = 16  # of a component: a product, a power of two, an addition, and what reads it


def cases(device: str) -> list[Case]:
    found = [_prefill(name, D, torch.bfloat16, device) for name, D in SHAPES.items()]
    found.append(_prefill("Mamba 2.8B", SHAPES["Mamba 2.8B"], torch.float32, device))
    return found + [_step(name, D, torch.bfloat16, device) for name, D in SHAPES.items()]


def layer(D: int, T: int, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor | bool]:
    """What a layer gives the scan: A of -1 to -N, time steps from 0.001 to 0.1, dt with contiguous tokens, the rest
    with contiguous channels."""
    rows = torch.randn(1, T, 2 * D + 2 * N, device=device).to(dtype)
    x, z, B, C = rows.split([D, D, N, N], -1)
    steps = 10 ** (2 * torch.rand(D, device=device) - 3)
    return {
        "x": x.contiguous(),
        "dt": (0.1 * torch.randn(1, D, T, device=device)).to(dtype).transpose(1, 2),
        "A": -torch.arange(1, N + 1, device=device).float().repeat(D, 1),
        "B": B,
        "C": C,
        "D": torch.ones(D, device=device),
        "z": z,
        "dt_bias": steps + torch.log(-torch.expm1(-steps)),
        "dt_softplus": True,
    }


def _prefill(name: str, D: int, dtype: torch.dtype, device: str) -> Case:
    T = TOKENS[device]
    moved = T * (4 * D + 2 * N) * dtype.itemsize

    def make():
        layers = [layer(D, T, dtype, device) for _ in range(1 + COLD_BYTES[device] // moved)]
        return {
            OURS: [partial(selective_scan, **own, return_state=True) for own in layers],
            "transformers": [partial(_torch_scan, **own) for own in layers],
        }

    return Case("selective_scan", f"{name}, prefill {T} tokens", dtype, device, moved, make, OPERATIONS * T * D * N)


def _step(name: str, D: int, dtype: torch.dtype, device: str) -> Case:
    moved = 3 * 4 * D * N

    def make():
        count = 1 + COLD_BYTES[device] // (2 * 4 * D * N)
        own = layer(D, 1, dtype, device)
        layers = [own | {"A": own["A"].clone(), "state": torch.zeros(1, D, N, device=device)} for _ in range(count)]
        ours = [partial(selective_scan_step, **own) for own in layers]
        theirs = [partial(_torch_step, **own) for own in layers]
        return {
            OURS: [captured(call, device) for call in ours],
            "transformers": [captured(call, device) for call in theirs],
        }

    return Case("selective_scan_step", name, dtype, device, moved, make)


def _torch_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """`mamba_selective_scan` of transformers: all factors at once, then token by token."""
    x, dt, z = (tensor.transpose(1, 2) for tensor in (x, dt, z))
    dt = functional.softplus(dt + dt_bias.to(dt.dtype)[..., None])
    decays = torch.exp(A[None, :, None, :] * dt[..., None])
    added = dt[..., None] * B[:, None].float() * x[..., None].float()
    state, outputs = x.new_zeros(x.shape[0], *A.shape), []
    for t in range(x.shape[2]):
        state = decays[:, :, t] * state + added[:, :, t]
        outputs.append((state.to(x.dtype) @ C[:, t, :, None])[:, :, 0])
    y = (torch.stack(outputs, -1) + x * D[None, :, None]) * functional.silu(z)
    return y, state


def _torch_step(x, dt, A, B, C, state, D, z, dt_bias, dt_softplus):
    """`mamba_selective_state_update` of transformers."""
    x, dt, B, C, z = (tensor[:, 0] for tensor in (x, dt, B, C, z))
    dt = functional.softplus(dt + dt_bias.to(dt.dtype))
    decay = torch.exp(dt.float()[..., None] * A)
    new = state * decay + dt.float()[..., None] * B.float()[:, None] * x.float()[..., None]
    state.copy_(new)
    y = (new.to(C.dtype) @ C[..., None])[..., 0] + x * D
    return (y * functional.silu(z)).to(x.dtype)
