"""Row-sparse gated linear layer: against the dense layer of torch and against our own, at batch 1."""

from functools import partial

import torch
from torch.nn import functional

from hasten.kernels.linear import linear
from hasten.kernels.row_sparse_linear import row_sparse_linear

from ..runner import OURS, Case, copies

SHAPES = [(4096, 11008), (2048, 5632)]  # K, N
PERCENT = [0, 50, 65, 80]  # of inactive rows
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def cases(device: str) -> list[Case]:
    return [_case(K, N, percent, dtype, device) for dtype in DTYPES for K, N in SHAPES for percent in PERCENT]


def _case(K: int, N: int, percent: int, dtype: torch.dtype, device: str) -> Case:
    inactive = N * percent // 100

    def make():
        x = torch.randn(1, K, dtype=dtype, device=device)
        gate = torch.ones(N, dtype=dtype, device=device)
        gate[torch.randperm(N, device=device)[:inactive]] = 0.25
        gate, threshold = gate.view(1, N), torch.tensor(0.5, device=device)
        weights = copies(torch.randn(N, K, dtype=dtype, device=device))
        return {
            OURS: [partial(row_sparse_linear, x, w, gate, threshold) for w in weights],
            "torch": [partial(_gated, functional.linear, x, w, gate) for w in weights],
            "hasten dense": [partial(_gated, linear, x, w, gate) for w in weights],
        }

    moved = ((N - inactive) * K + 2 * N + K) * dtype.itemsize
    return Case("row_sparse_linear", f"{K}->{N} sparsity {percent}%", dtype, device, moved, make)


def _gated(layer, x, weight, gate):
    return gate * layer(x, weight)
