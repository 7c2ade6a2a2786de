"""Triton's kernels compiled ahead of time, which needs no GPU: for which targets, and what the result says of
registers, spills and shared memory."""

import re
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import torch
from harness import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("kernels made for the interpreter do not compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402 (after the skips)
from triton.compiler import ASTSource  # noqa: E402

from hasten.kernels import triton_common  # noqa: E402

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
SPILLS = 8  # bytes: the assembler may lay one or two values aside before a loop and fetch them after it
TARGETS = {  # and the shared memory that one program may have
    "cuda80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "cuda90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "cuda100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}


@dataclass(frozen=True)
class Compiled:
    """What a target's compiler made of a kernel."""

    name: str
    registers: int  # of a thread
    spills: dict[str, int]  # bytes, by kind of memory
    shared: int  # bytes of a program
    wide_loads: int  # loads of 16 bytes
    code: str  # PTX, or AMD's assembly


def compile_ahead(
    kernel,
    constants: dict,
    dtype: torch.dtype,
    target: str,
    folder: Path,
    *,
    types: dict[str, str] | None = None,
    num_warps: int | None = None,
    aligned: Callable[[str], bool] = lambda name: True,
) -> Compiled:
    """As a launch compiles it.

    Args:
        constants: constexprs, and what a launch makes constants of.
        types: of parameters that are neither pointers `p_...` to `dtype` nor int32.
        num_warps: None for triton_common.THREADS threads.
        aligned: which pointers and sizes 16 divides.
    """
    gpu, _ = TARGETS[target]
    signature, attributes = {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        default = POINTERS[dtype] if name.startswith("p_") else "i32"
        signature[name] = "constexpr" if name in constants else (types or {}).get(name, default)
        if name not in constants and aligned(name) and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": num_warps or triton_common.THREADS // gpu.warp_size, **triton_common.OPTIONS}
    return _compile(kernel, signature, constants, attributes, options, target, folder, f"{constants} {dtype}")


def compile_call(kernel, arguments: tuple, options: dict, target: str, folder: Path) -> Compiled:
    """As the call kernel[grid](*arguments, **options) compiles it; tensors may be on the device "meta"."""
    signature, constants, attributes = {}, {}, {}
    given = dict(zip((parameter.name for parameter in kernel.params), arguments, strict=False))
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        value = given[name] if name in given else options[name]
        sized = type(value) is int and not parameter.do_not_specialize
        if name not in given or value is None or (sized and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if sized and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    settings = {name: value for name, value in options.items() if name not in constants}
    dtypes = {name: kind for name, kind in signature.items() if kind.startswith("*")}
    return _compile(kernel, signature, constants, attributes, settings, target, folder, f"{options} {dtypes}")


def _compile(kernel, signature, constants, attributes, options, target, folder, description) -> Compiled:
    gpu, _ = TARGETS[target]
    made = triton.compile(ASTSource(kernel, signature, constants, attributes), target=gpu, options=options)
    code = made.asm.get("ptx") or made.asm["amdgcn"]
    wide_loads = len(re.findall(r"ld\.global\S*\.v4\.|(?:global|buffer)_load_dwordx4", code))
    name = f"{kernel.fn.__name__} {description} for {target}"
    return Compiled(name, *_usage(made, folder), made.metadata.shared, wide_loads, code)


def barriers(ptx: str, trips: tuple[int, ...]) -> int:
    """Barriers that one program passes, where its loops, in the order in which they begin, run `trips` times."""
    begins, loops, found = {}, {}, []
    for i, line in enumerate(ptx.splitlines()):
        if label := re.match(r"\s*(\$L__BB\w+):", line):
            begins[label[1]] = i
        elif (jump := re.search(r"\bbra\S*\s+(\$L__BB\w+)", line)) and jump[1] in begins:
            loops[begins[jump[1]]] = i
        elif "bar.sync" in line:
            found.append(i)
    spans = sorted(loops.items())
    assert len(spans) == len(trips), f"{len(spans)} loops, {len(trips)} numbers of trips"
    return sum(prod(n for (begin, end), n in zip(spans, trips, strict=True) if begin <= i <= end) for i in found)


def _usage(made, folder: Path) -> tuple[int, dict[str, int]]:
    """Registers of a thread, and what spilled to memory."""
    if "amdgcn" in made.asm:
        # Scalar registers spill into lanes of vector registers, not to memory.
        pattern = r"\.(vgpr_spill_count|private_segment_fixed_size|vgpr_count):\s+(\d+)"
        usage = {name: int(count) for name, count in re.findall(pattern, made.asm["amdgcn"])}
        return usage.pop("vgpr_count"), usage
    folder.mkdir(exist_ok=True)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output)}
    return usage.pop("REG"), usage


def check_fits(compiled: Compiled, target: str) -> None:
    """Prints what it takes, and fails where a program has not as much shared memory."""
    _, memory = TARGETS[target]
    print(
        f"{compiled.name}: {compiled.registers} registers, {compiled.spills}, {compiled.shared} bytes of shared memory"
    )
    assert compiled.shared <= memory, f"{compiled.name}: {compiled.shared} bytes of shared memory"


def check_no_spills(compiled: Compiled) -> None:
    assert len(compiled.spills) >= 2 and max(compiled.spills.values()) <= SPILLS, f"{compiled.name}: {compiled.spills}"


def in_threads(check: Callable, cases: Iterable) -> None:
    """check(i, case) of every case, two at a time: the compiler works outside Python's lock."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, *zip(*enumerate(cases), strict=True)))
