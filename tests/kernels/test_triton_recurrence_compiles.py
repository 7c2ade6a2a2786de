"""The Triton kernels of the recurrences compile for every target; for heads of 128 without spills on cuda 90.

Ahead of time: this needs no GPU.
"""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels made for the interpreter do not compile", allow_module_level=True)

import test_triton_compiles as shared  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402 (after the skips)

from hasten.kernels import triton_common  # noqa: E402
from hasten.kernels.recurrence import triton as triton_recurrence  # noqa: E402

INPUTS = ("p_o", "p_q", "p_k", "p_v")
INT64 = ("p_bounds",)
KINDS = (triton_recurrence.SCALAR, triton_recurrence.VECTOR)


def compile_ahead(kernel, constexprs, dtype, target, num_warps, aligned=True):
    """As a launch compiles it for pointers and head sizes that 16 divides, or (aligned=False) for others."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if aligned and (name.startswith("p_") or name in ("K", "V")):
            attributes[(i,)] = [["tt.divisibility", 16]]
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = shared.POINTERS[dtype] if name in INPUTS else "*i64" if name in INT64 else "*fp32"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    options = {"num_warps": num_warps, **triton_common.OPTIONS}
    return triton.compile(ASTSource(kernel, signature, constexprs, attributes), target=target, options=options)


def cases(dtype, hip, size):
    for kind in KINDS:
        for delta in (False, True):
            tile = triton_recurrence.config(size, size, dtype, kind, delta, hip)
            num_warps = triton_recurrence.num_warps(tile, hip)
            rest = {"DELTA": delta, "UNIT": delta}
            yield triton_recurrence.chunks_kernel, {**tile, **rest, "USE_INITIAL": True}, num_warps
            step = triton_recurrence.step_config(size, size, kind)
            yield triton_recurrence.step_kernel, {**step, **rest}, num_warps


@pytest.mark.parametrize("dtype", shared.POINTERS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("target", shared.TARGETS)
def test_compiles(target, dtype, tmp_path):
    gpu, memory = shared.TARGETS[target]
    sizes = (128, 24, 256) if target == "cuda90" and dtype != torch.float16 else (128,)
    todo = [(size, *case) for size in sizes for case in cases(dtype, target == "gfx942", size)]

    for i, (size, kernel, constexprs, num_warps) in enumerate(todo):
        compiled = compile_ahead(kernel, constexprs, dtype, gpu, num_warps, aligned=size % 16 == 0)
        folder = tmp_path / str(i)
        folder.mkdir()
        spills, registers = shared.spilled(compiled, folder)
        where = f"{kernel.fn.__name__} {constexprs} {dtype} on {target}"
        print(f"{where}: {registers} registers, {spills}, {compiled.metadata.shared} bytes of shared memory")
        assert compiled.metadata.shared <= memory, where
        if target == "cuda90" and size == 128:
            assert max(spills.values()) <= shared.SPILLS, f"{where}: {spills}"
