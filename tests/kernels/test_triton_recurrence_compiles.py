"""The Triton kernels of the recurrences compile for every target; for heads of 128 without spills on cuda 90.

Ahead of time: this needs no GPU.
"""

import pytest
import torch
from ahead_of_time import POINTERS, TARGETS, check_fits, check_no_spills, compile_ahead
from harness import short

from hasten.kernels.recurrence import triton as recurrence

FP32 = ("p_beta", "p_decay", "p_initial", "p_final", "p_state")
TYPES = dict.fromkeys(FP32, "*fp32") | {"p_bounds": "*i64", "scale": "fp32"}
KINDS = (recurrence.SCALAR, recurrence.VECTOR)


def cases(dtype, hip, size):
    for kind in KINDS:
        for delta in (False, True):
            tile = recurrence.config(size, size, dtype, kind, delta, hip)
            num_warps = recurrence.num_warps(tile, hip)
            rest = {"DELTA": delta, "UNIT": delta}
            yield recurrence.chunks_kernel, {**tile, **rest, "USE_INITIAL": True}, num_warps
            step = recurrence.step_config(size, size, kind)
            yield recurrence.step_kernel, {**step, **rest}, num_warps


@pytest.mark.parametrize("dtype", POINTERS, ids=short)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target, dtype, tmp_path):
    sizes = (128, 24, 256) if target == "cuda90" and dtype != torch.float16 else (128,)
    for size in sizes:

        def aligned(name, size=size):
            return size % 16 == 0 and (name.startswith("p_") or name in ("K", "V"))

        for kernel, constants, num_warps in cases(dtype, target == "gfx942", size):
            settings = {"types": TYPES, "num_warps": num_warps, "aligned": aligned}
            made = compile_ahead(kernel, constants, dtype, target, tmp_path, **settings)
            check_fits(made, target)
            if target == "cuda90" and size == 128:
                check_no_spills(made)
