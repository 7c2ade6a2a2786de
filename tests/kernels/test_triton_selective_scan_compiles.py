"""The Triton kernels of the selective scan compile for every target without spills, ahead of time: this needs no GPU."""

import pytest
import torch
from ahead_of_time import POINTERS, TARGETS, check_fits, check_no_spills, compile_ahead
from harness import short

from hasten.kernels.recurrence.selective_scan import triton as scan

FP32 = ("p_A", "p_initial", "p_final", "p_total", "p_states", "p_D", "p_bias")
TYPES = dict.fromkeys(FP32, "*fp32") | {"p_bounds": "*i64"}
CHANNELS_LAST = dict.fromkeys(("s_xd", "s_dtd", "s_Bn", "s_Cn", "s_zd"), 1)
NONE = {  # what is None in a launch: whole sequences or a step, the states of chunks, their outputs, packed sequences
    "whole": ("p_total", "p_bounds"),
    "states of chunks": ("p_y", "p_initial", "p_bounds"),
    "outputs of chunks": ("p_final", "p_total", "p_bounds"),
    "packed": ("p_total",),
    "plain": ("p_D", "p_z", "p_bias", "p_initial", "p_total", "p_bounds"),
}


def cases(N, dtype):
    """(kernel, constexprs): in bfloat16 all that a launch can ask for."""
    sizes = scan.tile(N)
    for name in NONE if dtype == torch.bfloat16 else ("whole",):
        constants = {**sizes, "SOFTPLUS": name != "plain", **dict.fromkeys(NONE[name], None)}
        yield scan.scan_kernel, constants | CHANNELS_LAST
    if dtype == torch.bfloat16:
        tokens_last = {"SOFTPLUS": True, "p_total": None, "p_bounds": None, "s_xt": 1, "s_dtt": 1}
        yield scan.scan_kernel, {**sizes, **tokens_last}
        yield scan.carry_kernel, sizes


@pytest.mark.parametrize("dtype", POINTERS, ids=short)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target, dtype, tmp_path):
    for N in (16, 256) if target == "cuda90" else (16,):
        for kernel, constants in cases(N, dtype):
            warps = 1 if target == "gfx942" else 2
            aligned = {"aligned": lambda name, N=N: N % 16 == 0 or name.startswith("p_")}
            made = compile_ahead(kernel, constants, dtype, target, tmp_path, types=TYPES, num_warps=warps, **aligned)
            check_fits(made, target)
            check_no_spills(made)
