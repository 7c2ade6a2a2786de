"""The Triton kernels of token_scores compile for every target without spills, ahead of time: this needs no GPU."""

from itertools import product

import pytest
import torch
from ahead_of_time import POINTERS, TARGETS, check_fits, check_no_spills, compile_ahead, in_threads
from harness import short

from hasten.kernels import triton_common
from hasten.kernels.token_scores import triton

LAUNCHES = [(1, 64), (1, 128), (1, 256), (2, 128), (3, 20), (7, 64), (200, 128), (16, 256)]  # rows on a head, D
TYPES = dict.fromkeys(("p_logits", "p_most", "p_sum", "p_scores"), "*fp32") | {
    "p_mask": "*u8",
    "p_columns": "*i64",
    "scale": "fp32",
    "softcap": "fp32",
}
WORDS = {1: "*i8", 2: "*i16", 4: "*i32"}


def tiles(dtype):
    """Every set of constexprs that the launcher of the logits picks."""
    found = []
    for rows, D in LAUNCHES:
        tile = triton.logits_tile(rows, D, dtype)
        assert tile["BD"] >= D and all(size & (size - 1) == 0 for size in tile.values())
        assert tile["USE_DOT"] or tile["BR"] >= rows
        if tile not in found:
            found.append(tile)
    return found


@pytest.mark.parametrize("dtype", POINTERS, ids=short)
@pytest.mark.parametrize("target", TARGETS)
def test_scores_compile_without_spills(target, dtype, tmp_path):
    flags = {"HAS_MASK": True, "HAS_SOFTCAP": True}
    cases = [(triton.logits_kernel, {**tile, **flags}) for tile in tiles(dtype)]
    cases += [(triton.logits_kernel, {**cases[0][1], "HAS_MASK": False, "p_mask": None, "HAS_SOFTCAP": False})]
    cases += [(triton.mean_kernel, triton.MEAN_TILE)]

    def check(i, case):
        kernel, constants = case
        made = compile_ahead(kernel, constants, dtype, target, tmp_path / str(i), types=TYPES)
        check_fits(made, target)
        check_no_spills(made)
        if kernel is triton.logits_kernel:
            vector = triton_common.vector_length(dtype)
            loads = constants["BT"] * constants["BD"] // (triton_common.THREADS * vector)
            asynchronous = target == "cuda80" and constants["USE_DOT"]
            assert asynchronous or made.wide_loads >= loads, f"{made.name}: {made.wide_loads} loads of 16 bytes"

    in_threads(check, cases)


@pytest.mark.parametrize("width", WORDS)
@pytest.mark.parametrize("target", TARGETS)
def test_gathering_compiles_without_spills(target, width, tmp_path):
    def check(i, case):
        count, longest = case
        pointers = {f"p_{side}{k}": WORDS[width] for side in "xy" for k in range(count)}
        missing = {f"p_{side}{k}": None for side in "xy" for k in range(count, triton.GATHERED)}
        ones = {f"{name}{k}": 1 for name in ("K", "s_b", "s_t") for k in range(count, triton.GATHERED)}
        constants = {"COUNT": count, "BLOCK": triton.gather_block(longest), **missing, **ones}
        folder = tmp_path / str(i)
        made = compile_ahead(triton.gather_kernel, constants, torch.float32, target, folder, types=TYPES | pointers)
        check_fits(made, target)
        check_no_spills(made)
        if width == 4 and longest > 1:
            assert made.wide_loads >= count, f"{made.name}: {made.wide_loads} loads of 16 bytes"

    in_threads(check, product((1, 2, 3, 4), (1, 4096)))


def test_compiles_for_sizes_of_one(tmp_path):
    tile = triton.logits_tile(1, 1, torch.float16)
    ones = dict.fromkeys(("H", "G", "D", "s_kb", "s_kg", "s_kt"), 1)  # a launch makes constants of them
    settings = {"types": TYPES, "aligned": lambda name: False}
    constants = {**tile, **ones, "HAS_MASK": True, "HAS_SOFTCAP": False}
    compile_ahead(triton.logits_kernel, constants, torch.float16, "cuda90", tmp_path / "logits", **settings)
