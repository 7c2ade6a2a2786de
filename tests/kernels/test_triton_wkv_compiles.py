"""The Triton kernel of wkv compiles for every target without spills, ahead of time: this needs no GPU."""

import pytest
from ahead_of_time import POINTERS, TARGETS, check_fits, check_no_spills, compile_ahead
from harness import short

from hasten.kernels.recurrence.wkv import triton as rwkv

STATE = ("p_numerator", "p_denominator", "p_maximum")
LAST = ("p_last_numerator", "p_last_denominator", "p_last_maximum")
TYPES = dict.fromkeys((*STATE, *LAST, "p_decay", "p_first"), "*fp32")


@pytest.mark.parametrize("dtype", POINTERS, ids=short)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target, dtype, tmp_path):
    for absent in ((), STATE):
        constants = {"BD": rwkv.BD, "s_kd": 1, "s_vd": 1, **dict.fromkeys(absent, None)}
        made = compile_ahead(rwkv.wkv_kernel, constants, dtype, target, tmp_path, types=TYPES, num_warps=1)
        check_fits(made, target)
        check_no_spills(made)
