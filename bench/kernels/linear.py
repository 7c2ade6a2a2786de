"""Dense linear layer: hasten against torch, at the shapes of decoding."""

from functools import partial

import torch
from torch.nn import functional

from hasten.kernels.linear import linear

from ..runner import OURS, Case, copies

SHAPES = [(4096, 4096), (4096, 11008), (4096, 14336)]  # K, N
BATCHES = [1, 2, 4, 8]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def cases(device: str) -> list[Case]:
    return [_case(B, K, N, dtype, device) for dtype in DTYPES for K, N in SHAPES for B in BATCHES]


def _case(B: int, K: int, N: int, dtype: torch.dtype, device: str) -> Case:
    def make():
        x = torch.randn(B, K, dtype=dtype, device=device)
        weights = copies(torch.randn(N, K, dtype=dtype, device=device))
        return {
            OURS: [partial(linear, x, w) for w in weights],
            "torch": [partial(functional.linear, x, w) for w in weights],
        }

    return Case("linear", f"{K}->{N} batch {B}", dtype, device, (N * K + B * (N + K)) * dtype.itemsize, make)
