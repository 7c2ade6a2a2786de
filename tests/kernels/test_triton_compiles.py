"""Every Triton kernel that a launcher can pick compiles for every target without spills and with 16-byte loads.

Ahead of time: this needs no GPU.
"""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels made for the interpreter do not compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402 (after the skips)
from triton.compiler import ASTSource  # noqa: E402

from hasten.kernels import triton_common  # noqa: E402
from hasten.kernels.column_sparse_linear import triton as column_sparse_linear  # noqa: E402
from hasten.kernels.linear import triton as linear  # noqa: E402
from hasten.kernels.row_sparse_linear import triton as row_sparse_linear  # noqa: E402

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
SPILLS = 8  # bytes: the assembler may lay one or two values aside before the loop and fetch them after it
OPERATORS = ["linear", "row_sparse_linear", "column_sparse_linear"]
FP32_POINTERS = ("p_part", "p_cutoff", "p_threshold")
TARGETS = {  # and the shared memory that one program may have
    "cuda80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "cuda90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "cuda100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
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


def compile_ahead(kernel, constexprs, dtype, target, aligned=True):
    """As a launch compiles it for pointers and sizes that 16 divides, or (aligned=False) for others."""
    signature, attributes = {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = "*fp32" if name in FP32_POINTERS else POINTERS[dtype]
        else:
            signature[name] = "i32"
        if aligned and name not in constexprs and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": triton_common.THREADS // target.warp_size, **triton_common.OPTIONS}
    return triton.compile(ASTSource(kernel, signature, constexprs, attributes), target=target, options=options)


def spilled(compiled, folder):
    """What spilled to memory, by name and count, and the registers that a thread takes."""
    if "amdgcn" in compiled.asm:
        # Scalar registers spill into lanes of vector registers, not to memory.
        pattern = r"\.(vgpr_spill_count|private_segment_fixed_size|vgpr_count):\s+(\d+)"
        usage = {name: int(count) for name, count in re.findall(pattern, compiled.asm["amdgcn"])}
        return usage, usage.pop("vgpr_count")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output)}
    return usage, usage.pop("REG")


def check(case, dtype, target, shared, folder, aligned):
    kernel, constexprs, loads = case
    compiled = compile_ahead(kernel, constexprs, dtype, target, aligned)
    spills, registers = spilled(compiled, folder)
    where = f"{kernel.fn.__name__} {constexprs} {dtype} aligned={aligned}"
    assert compiled.metadata.shared <= shared, f"{where}: {compiled.metadata.shared} bytes of shared memory"
    if aligned:
        assert len(spills) >= 2 and max(spills.values()) <= SPILLS, f"{where}: {spills}"
        code = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        wide = len(re.findall(r"ld\.global\S*\.v4\.|(?:global|buffer)_load_dwordx4", code))
        assert wide >= loads, f"{where}: {wide} loads of 16 bytes, expected {loads}"
    print(f"{where} on {target.arch}: {registers} registers, {compiled.metadata.shared} bytes of shared memory")


@pytest.mark.parametrize("dtype", POINTERS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_without_spills(operator, target, dtype, tmp_path):
    todo = [(case, True) for case in cases(operator, dtype)]
    if target == "cuda90":  # odd sizes: narrow loads; they may spill
        todo += [(todo[0][0], False), (todo[-1][0], False)]

    def run(i):
        case, aligned = todo[i]
        folder = tmp_path / str(i)
        folder.mkdir()
        check(case, dtype, *TARGETS[target], folder, aligned)

    with ThreadPoolExecutor(2) as pool:  # the compiler works outside Python's lock
        list(pool.map(run, range(len(todo))))


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_for_sizes_of_one(operator):
    for kernel, constexprs, _ in list(cases(operator, torch.float16))[-3:]:
        ones = {name: 1 for name in ("N", "K") if name in kernel.arg_names}  # a launch makes constants of them
        compile_ahead(kernel, {**constexprs, **ones}, torch.float16, TARGETS["cuda90"][0], aligned=False)


@pytest.mark.parametrize("dtype", POINTERS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("module", [linear, row_sparse_linear, column_sparse_linear], ids=OPERATORS)
def test_config(module, dtype):
    for B, N, K, multiprocessors in product(BATCHES, SIZES, SIZES, MULTIPROCESSORS):
        tile = module.config(B, N, K, dtype, multiprocessors)
        splits = tile.pop("splits", 1)
        assert 1 <= splits <= min(column_sparse_linear.REDUCE_TILE["BLOCK_S"], -(-K // tile["BLOCK_K"]))
        assert tile["B"] >= B and all(size >= 1 and size & (size - 1) == 0 for size in tile.values())
    assert len(tiles(module, dtype)) <= 6, "every further tile is one more compilation for a user"
