"""Every Triton kernel that a launcher can pick compiles for every target without spills and with 16-byte loads.

Ahead of time: this needs no GPU.
"""

from itertools import product

import pytest
import torch
from ahead_of_time import POINTERS, TARGETS, check_fits, check_no_spills, compile_ahead, in_threads
from harness import short

from hasten.kernels import triton_common
from hasten.kernels.column_sparse_linear import triton as column_sparse_linear
from hasten.kernels.linear import triton as linear
from hasten.kernels.row_sparse_linear import triton as row_sparse_linear

OPERATORS = ["linear", "row_sparse_linear", "column_sparse_linear"]
FP32 = dict.fromkeys(("p_part", "p_cutoff", "p_threshold"), "*fp32")
BATCHES = range(1, 9)
SIZES = (1, 33, 128, 1000, 1024, 2048, 4096, 11008, 14336, 151936)
MULTIPROCESSORS = (1, 16, 108, 132, 148, 304)


def tiles(module, dtype):
    """Every set of constexprs that config picks for this dtype."""
    found = []
    for B, N, K, multiprocessors in product(BATCHES, SIZES, SIZES, MULTIPROCESSORS):
        tile = {**module.config(B, N, K, dtype, multiprocessors)}
        tile.pop("splits", None)  # a runtime argument
        if tile not in found:
            found.append(tile)
    return found


def cases(operator, dtype):
    """Every (kernel, constexprs, 16-byte loads that its weight takes per thread)."""
    if operator == "column_sparse_linear":
        for tile, has_cutoff in product(tiles(column_sparse_linear, dtype), (True, False)):
            loads = tile["BLOCK_K"] // tile["SHARES"]
            yield column_sparse_linear.partial_kernel, {**tile, "HAS_CUTOFF": has_cutoff}, loads
        for has_bias in (True, False):
            yield column_sparse_linear.reduce_kernel, {**column_sparse_linear.REDUCE_TILE, "HAS_BIAS": has_bias}, 4
        return
    module, kernel = {
        "linear": (linear, linear.linear_kernel),
        "row_sparse_linear": (row_sparse_linear, row_sparse_linear.row_sparse_linear_kernel),
    }[operator]
    for tile in tiles(module, dtype):
        yield kernel, {**tile, "HAS_BIAS": True}, row_loads(tile)
    yield kernel, {**tile, "HAS_BIAS": False}, row_loads(tile)  # the largest; a bias only adds to it


def row_loads(tile):
    return tile["BLOCK_N"] * tile["BLOCK_K"] // (triton_common.THREADS * tile["VEC"])


@pytest.mark.parametrize("dtype", POINTERS, ids=short)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_without_spills(operator, target, dtype, tmp_path):
    todo = [(*case, True) for case in cases(operator, dtype)]
    if target == "cuda90":  # odd sizes: narrow loads; they may spill
        todo += [(*todo[0][:-1], False), (*todo[-1][:-1], False)]

    def check(i, case):
        kernel, constants, loads, aligned = case
        folder = tmp_path / str(i)
        made = compile_ahead(kernel, constants, dtype, target, folder, types=FP32, aligned=lambda name: aligned)
        check_fits(made, target)
        if aligned:
            check_no_spills(made)
            assert made.wide_loads >= loads, f"{made.name}: {made.wide_loads} loads of 16 bytes, expected {loads}"

    in_threads(check, todo)


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_for_sizes_of_one(operator, tmp_path):
    for kernel, constants, _ in list(cases(operator, torch.float16))[-3:]:
        ones = {name: 1 for name in ("N", "K") if name in kernel.arg_names}  # a launch makes constants of them
        settings = {"types": FP32, "aligned": lambda name: False}
        compile_ahead(kernel, constants | ones, torch.float16, "cuda90", tmp_path, **settings)


@pytest.mark.parametrize("dtype", POINTERS, ids=short)
@pytest.mark.parametrize("module", [linear, row_sparse_linear, column_sparse_linear], ids=OPERATORS)
def test_config(module, dtype):
    for B, N, K, multiprocessors in product(BATCHES, SIZES, SIZES, MULTIPROCESSORS):
        tile = module.config(B, N, K, dtype, multiprocessors)
        splits = tile.pop("splits", 1)
        assert 1 <= splits <= min(column_sparse_linear.REDUCE_TILE["BLOCK_S"], -(-K // tile["BLOCK_K"]))
        assert tile["B"] >= B and all(size >= 1 and size & (size - 1) == 0 for size in tile.values())
    assert len(tiles(module, dtype)) <= 6, "every further tile is one more compilation for a user"
