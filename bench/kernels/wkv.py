"""RWKV-4's recurrence: prefill and the decode step against the definition in torch, which is what transformers runs."""

from functools import partial

import torch

from hasten.kernels.recurrence.wkv import reference, wkv

from ..runner import COLD_BYTES, OURS, Case
from .linear_attention import captured

CHANNELS = 2560  # RWKV-4 3B
TOKENS = {"cpu": 1024, "cuda": 4096}
OPERATIONS = 40  # per token and channel: four exponentials, of which two are of 0, and two sums


def cases(device: str) -> list[Case]:
    dtypes = (torch.bfloat16, torch.float32)
    return [_case(T, dtype, device) for T in (TOKENS[device], 1) for dtype in dtypes]


def _case(T: int, dtype: torch.dtype, device: str) -> Case:
    moved = 3 * T * CHANNELS * dtype.itemsize + (6 * 4 * CHANNELS if T == 1 else 0)

    def make():
        parameters = torch.randn(2, CHANNELS, device=device).unbind()
        count = min(1 + COLD_BYTES[device] // moved, 64)  # of a step, whose work is its call
        inputs = [torch.randn(2, 1, T, CHANNELS, device=device).to(dtype).unbind() for _ in range(count)]
        state = None
        if T == 1:
            state = tuple(torch.rand(3, 1, CHANNELS, device=device).unbind())
        ours = [partial(wkv, *parameters, *own, state, True) for own in inputs]
        theirs = [partial(reference.wkv, *parameters, *own, state) for own in inputs]
        return {
            OURS: [captured(call, device) for call in ours] if T == 1 else ours,
            "torch": [captured(call, device) for call in theirs] if T == 1 else theirs,
        }

    name = f"{CHANNELS} channels, " + ("a step" if T == 1 else f"prefill {T} tokens")
    return Case("wkv", name, dtype, device, moved, make, OPERATIONS * T * CHANNELS)
