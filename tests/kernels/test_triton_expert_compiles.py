"""Every Triton kernel of expert_linear that the launcher can pick compiles for every target without spills.

Ahead of time: this needs no GPU.
"""

from itertools import product

import pytest
import torch
from ahead_of_time import POINTERS, TARGETS, check_fits, check_no_spills, compile_ahead, in_threads
from harness import short

from hasten.kernels import triton_common
from hasten.kernels.expert_linear import triton

TYPES = {"p_part": "*fp32", "p_cutoff": "*fp32", "p_ids": "*i64"}
# T, (P, E), N, K
SHAPES = list(
    product(range(1, 9), [(1, 1), (2, 8), (4, 32), (8, 128), (16, 64)], (1, 33, 1536, 28672), (64, 768, 14336))
)
MULTIPROCESSORS = (1, 16, 132, 304)


def tiles(config, dtype, *, with_K):
    """Every set of constexprs that a config picks for this dtype."""
    found = []
    for (T, (P, E), N, K), multiprocessors in product(SHAPES, MULTIPROCESSORS):
        tile = {**config(T, P, E, N, *([K] if with_K else []), dtype, multiprocessors)}
        splits = tile.pop("splits", 1)  # a runtime argument
        assert 1 <= splits <= min(triton.REDUCE_TILE["BLOCK_S"], -(-K // tile["BLOCK_K"]))
        assert tile["B"] >= T and tile["PAIRS"] >= T * P
        assert all(size >= 1 and size & (size - 1) == 0 for size in tile.values())
        if tile not in found:
            found.append(tile)
    assert len(found) <= 6, "every further tile is one more compilation for a user"
    return found


def cases(dtype):
    """Every (kernel, constexprs, 16-byte loads that its weight takes per thread)."""
    for tile in tiles(triton.row_config, dtype, with_K=False):
        loads = tile["BLOCK_N"] * tile["BLOCK_K"] // (triton_common.THREADS * tile["VEC"])
        yield triton.expert_rows_kernel, {**tile, "HAS_BIAS": True}, loads
    for tile, has_cutoff in product(tiles(triton.column_config, dtype, with_K=True), (True, False)):
        yield triton.expert_columns_kernel, {**tile, "HAS_CUTOFF": has_cutoff}, tile["BLOCK_K"] // tile["SHARES"]
    for has_bias in (True, False):
        yield triton.expert_reduce_kernel, {**triton.REDUCE_TILE, "HAS_BIAS": has_bias}, 4


@pytest.mark.parametrize("dtype", POINTERS, ids=short)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target, dtype, tmp_path):
    todo = [(*case, True) for case in cases(dtype)]
    if target == "cuda90":  # odd sizes: narrow loads; they may spill
        todo += [(*todo[0][:-1], False), (*todo[-3][:-1], False)]

    def check(i, case):
        kernel, constants, loads, aligned = case
        settings = {"types": TYPES, "aligned": lambda name: aligned}
        made = compile_ahead(kernel, constants, dtype, target, tmp_path / str(i), **settings)
        check_fits(made, target)
        if aligned:
            check_no_spills(made)
            assert made.wide_loads >= loads, f"{made.name}: {made.wide_loads} loads of 16 bytes, expected {loads}"

    in_threads(check, todo)


def test_compiles_for_sizes_of_one(tmp_path):
    for i, (kernel, constants, _) in enumerate(list(cases(torch.float16))[::3]):
        ones = {name: 1 for name in ("N", "K") if name in kernel.arg_names}  # a launch makes constants of them
        settings = {"types": TYPES, "aligned": lambda name: False}
        compile_ahead(kernel, constants | ones, torch.float16, "cuda90", tmp_path / str(i), **settings)
