"""Column-sparse linear layer: against the dense layer of torch and against our own, at batch 1."""

from functools import partial

import torch
from torch.nn import functional

from hasten.kernels.column_sparse_linear import column_sparse_linear
from hasten.kernels.linear import linear
from hasten.kernels.storage import to_column_major

from ..runner import OURS, Case, copies

SHAPES = [(4096, 4096), (4096, 11008), (4096, 14336), (2048, 5632), (5632, 2048), (2048, 256)]  # K, N
PERCENT = [0, 25, 30, 40, 50, 65]  # of inactive columns
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def cases(device: str) -> list[Case]:
    return [_case(K, N, percent, dtype, device) for dtype in DTYPES for K, N in SHAPES for percent in PERCENT]


def _case(K: int, N: int, percent: int, dtype: torch.dtype, device: str) -> Case:
    inactive = K * percent // 100

    def make():
        x = torch.randn(1, K, dtype=dtype, device=device)
        cutoff = None
        if percent:  # exactly as many columns are inactive, at random places
            order = torch.randperm(K, device=device)
            cutoff = torch.full((K,), -1.0, device=device).index_fill(0, order[:inactive], torch.inf)
        weight = torch.randn(N, K, dtype=dtype, device=device)
        rows, columns = copies(weight), copies(weight, to_column_major)
        return {
            OURS: [partial(column_sparse_linear, x, w, cutoff) for w in columns],
            "torch": [partial(functional.linear, x, w) for w in rows],
            "hasten dense": [partial(linear, x, w) for w in rows],
        }

    moved = (N * (K - inactive) + N + K) * dtype.itemsize
    return Case("column_sparse_linear", f"{K}->{N} sparsity {percent}%", dtype, device, moved, make)
