"""The Triton kernels of causal_conv1d compile for every target without spills, ahead of time: this needs no GPU."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels made for the interpreter do not compile", allow_module_level=True)

from test_triton_compiles import POINTERS, SPILLS, TARGETS, spilled  # noqa: E402 (after the skips)
from triton.compiler import ASTSource  # noqa: E402

from hasten.kernels import triton_common  # noqa: E402
from hasten.kernels.causal_conv1d import triton as conv  # noqa: E402

INTEGERS = ("p_bounds", "p_blocks")
FLAGS = {"HAS_BIAS": True, "USE_SILU": True}


def cases():
    """(kernel, constexprs, the strides that are 1): both layouts, each flag and width; a flag that is off only takes away."""
    plain = {"W": 4, **FLAGS, "HAS_INITIAL": False, "IS_PACKED": False}
    for channels_last, tile in conv.TILES.items():
        ones = ("s_xd", "s_yd") if channels_last else ("s_xt", "s_yt")
        yield conv.causal_conv1d_kernel, {**plain, **tile}, ones
        yield conv.causal_conv1d_kernel, {**plain, **tile, "W": 8, "HAS_INITIAL": True, "IS_PACKED": True}, ones
    tile = conv.TILES[True]
    yield conv.causal_conv1d_kernel, {**plain, **tile, "W": 1, "HAS_BIAS": False, "USE_SILU": False}, ("s_xd", "s_yd")
    for W, S in ((4, 4), (8, 100)):
        yield conv.causal_conv1d_update_kernel, {"W": W, **FLAGS, **conv.update_tile(S)}, ("s_xt", "s_ss")


def compile_ahead(kernel, constexprs, ones, dtype, target):
    """As a launch compiles it for pointers and sizes that 16 divides."""
    constants = {**constexprs, **dict.fromkeys(ones, 1)}
    signature, attributes = {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "*i32" if name in INTEGERS else POINTERS[dtype] if name.startswith("p_") else "i32"
        if not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": triton_common.THREADS // target.warp_size, **triton_common.OPTIONS}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


@pytest.mark.parametrize("dtype", POINTERS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", TARGETS)
def test_compiles_without_spills(name, dtype, tmp_path):
    target, shared = TARGETS[name]
    todo = list(cases())

    def run(i):
        kernel, constexprs, ones = todo[i]
        (folder := tmp_path / str(i)).mkdir()
        compiled = compile_ahead(kernel, constexprs, ones, dtype, target)
        spills, registers = spilled(compiled, folder)
        where = f"{kernel.fn.__name__} {constexprs} {dtype}"
        assert compiled.metadata.shared <= shared, f"{where}: {compiled.metadata.shared} bytes of shared memory"
        assert len(spills) >= 2 and max(spills.values()) <= SPILLS, f"{where}: {spills}"
        if "s_xd" in ones:  # channels are contiguous: every load of x takes 16 bytes
            code = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
            wide = len(re.findall(r"ld\.global\S*\.v4\.|(?:global|buffer)_load_dwordx4", code))
            assert wide >= constexprs["W"], f"{where}: {wide} loads of 16 bytes"
        print(f"{where} on {target.arch}: {registers} registers, {compiled.metadata.shared} bytes of shared memory")

    with ThreadPoolExecutor(2) as pool:  # the compiler works outside Python's lock
        list(pool.map(run, range(len(todo))))
