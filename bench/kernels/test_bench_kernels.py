"""The kernels' cases for pytest-benchmark: `pytest bench/kernels/test_bench_kernels.py -k "linear and bfloat16"`."""

from itertools import cycle

import pytest
import torch

from hasten.bench.kernels import cases
from hasten.bench.runner import OURS

CASES = cases("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.case} {case.dtype}")
def test_kernel(benchmark, case):
    calls = cycle(case.make()[OURS])

    @torch.no_grad()
    def call():
        next(calls)()
        if case.device == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
