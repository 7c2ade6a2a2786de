"""The Triton kernels of causal_conv1d compile for every target without spills, ahead of time: this needs no GPU."""

import pytest
from ahead_of_time import POINTERS, TARGETS, check_fits, check_no_spills, compile_ahead, in_threads
from harness import short

from hasten.kernels.causal_conv1d import triton as conv

INTEGERS = dict.fromkeys(("p_bounds", "p_blocks"), "*i32")
FLAGS = {"HAS_BIAS": True, "USE_SILU": True}


def cases():
    """(kernel, constexprs, the strides that are 1): both layouts, each flag and width; a flag that is off only takes
    away."""
    plain = {"W": 4, **FLAGS, "HAS_INITIAL": False, "IS_PACKED": False}
    for channels_last, tile in conv.TILES.items():
        ones = ("s_xd", "s_yd") if channels_last else ("s_xt", "s_yt")
        yield conv.causal_conv1d_kernel, {**plain, **tile}, ones
        yield conv.causal_conv1d_kernel, {**plain, **tile, "W": 8, "HAS_INITIAL": True, "IS_PACKED": True}, ones
    tile = conv.TILES[True]
    yield conv.causal_conv1d_kernel, {**plain, **tile, "W": 1, "HAS_BIAS": False, "USE_SILU": False}, ("s_xd", "s_yd")
    for W, S in ((4, 4), (8, 100)):
        yield conv.causal_conv1d_update_kernel, {"W": W, **FLAGS, **conv.update_tile(S)}, ("s_xt", "s_ss")


@pytest.mark.parametrize("dtype", POINTERS, ids=short)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target, dtype, tmp_path):
    def check(i, case):
        kernel, constants, ones = case
        folder = tmp_path / str(i)
        made = compile_ahead(kernel, constants | dict.fromkeys(ones, 1), dtype, target, folder, types=INTEGERS)
        check_fits(made, target)
        check_no_spills(made)
        if "s_xd" in ones:  # channels are contiguous: every load of x takes 16 bytes
            assert made.wide_loads >= constants["W"], f"{made.name}: {made.wide_loads} loads of 16 bytes"

    in_threads(check, cases())
