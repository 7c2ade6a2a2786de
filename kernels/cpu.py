"""The compiled CPU kernels: one shared library with a plain C ABI, every function once per instruction set.

Here stands what no operator owns: where the library is, which instruction sets it and this CPU have, and how a function
of it is called. What a function takes is declared in its operator's folder, twice and alike: as a struct in `cpu.cpp`
and as a `ctypes.Structure` in `cpu.py`, the same names in the same order. A new operator does three things. (1) Its
`cpu.cpp` declares `struct MyArguments` with named fields (pointers, `int64_t` sizes, `int32_t` flags in pairs; nothing
that needs padding) and defines `HASTEN_EXPORT(my_operator, MyArguments)(const MyArguments& in) { ... }`, which returns
0, 1 for a dtype that it does not know, 2 for no memory, or 3 for a value out of its range. (2) Its `cpu.py` declares
`class MyArguments(Arguments)` with `__slots__ = ()` and `_fields_` of POINTER, SIZE, FLAG and REAL, and `_my_operator =
Function("my_operator", MyArguments)`. (3) Its launcher, in the same file, takes checked tensors, makes the output and
calls `_my_operator(MyArguments(dtype=..., threads=torch.get_num_threads(), y=y.data_ptr(), bias=address(bias), ...))`;
a field that is not named is 0 or null. setup.py compiles every `kernels/**/cpu.cpp`, and tests/kernels/test_cpu.py
compares names, order and size of all these structs.
"""

import ctypes
import os
import platform
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch  # its OpenMP runtime is loaded first, and the library shares it

ISAS = ("amx", "avx512bf16", "avx512", "avx2", "neon_bf16", "neon", "scalar")  # those of setup.py
LIBRARY = Path(__file__).with_name("_cpu.so")

POINTER, SIZE, FLAG, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float  # the types of fields


class Arguments(ctypes.Structure):
    """What a C function takes. Slots, so that a field's misspelt name is an AttributeError."""

    __slots__ = ()


class Function:
    """The C function `hasten_<name>_<instruction set>`, of the instruction set in use."""

    def __init__(self, name: str, arguments: type[Arguments]):
        self.name, self.arguments = name, arguments
        self._of = {}  # by instruction set

    def __call__(self, arguments: Arguments, name: str | None = None) -> None:
        """Calls it in the instruction set `name`, by default the one in use.

        Raises MemoryError, ValueError or RuntimeError for what the function returns.
        """
        name = name or isa()
        found = self._of.get(name)
        if found is None:
            found = self._of[name] = self._find(name)
        code = found(arguments)
        if code == 2:
            raise MemoryError(f"no memory for {self.name}")
        if code:
            raise (ValueError if code == 3 else RuntimeError)(f"{self.name}: code {code}")

    def struct_size(self) -> int:
        """Bytes that the struct of its arguments has in C."""
        return getattr(_load(), f"hasten_{self.name}_size_{isa()}")()

    def _find(self, isa: str):
        function = getattr(_load(), f"hasten_{self.name}_{isa}")
        function.argtypes, function.restype = [ctypes.POINTER(self.arguments)], ctypes.c_int
        return function


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's elements begin; None, which is null, for none."""
    return None if tensor is None else tensor.data_ptr()


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        note = LIBRARY.with_suffix(".txt")
        return note.read_text().strip() if note.exists() else "not built: install hasten where there is a C++ compiler"
    try:
        return ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"


@cache
def reason() -> str | None:
    """Why there are no compiled kernels; None where there are."""
    library = _load()
    return library if isinstance(library, str) else None


@cache
def compiled() -> tuple[str, ...]:
    """The instruction sets that the library was compiled for: those of this kind of processor."""
    library = _load()
    return tuple(isa for isa in ISAS if hasattr(library, f"hasten_supported_{isa}"))


@cache
def isas() -> tuple[str, ...]:
    """The instruction sets that the library was compiled for and this CPU has."""
    library = _load()
    return tuple(isa for isa in compiled() if getattr(library, f"hasten_supported_{isa}")())


@cache
def rates() -> dict[str, float]:
    """Operations per second of matrix products in each of them, measured at first use on this machine: CPUs differ in
    which is the fastest. What multiplies vectors only is the same in those that have their width."""
    from . import tuning
    from .tile_product.cpu import rate

    return tuning.remembered(
        " ".join(["products", *isas()]), lambda: {isa: rate(isa) for isa in isas()}, every_isa=True
    )


@cache
def isa() -> str:
    """The instruction set in use: the fastest one, or the one that the environment variable HASTEN_CPU_ISA names."""
    found, wanted = isas(), os.environ.get("HASTEN_CPU_ISA")  # asking for the sets also asks Linux for the tiles of AMX
    if wanted and wanted not in found:
        raise ValueError(f"HASTEN_CPU_ISA={wanted!r}: this machine has {', '.join(found) or 'no compiled kernels'}")
    return wanted or max(found, key=lambda name: rates().get(name, 0))


@cache
def processor() -> str:
    """The CPU's model, as the system names it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"{platform.machine()} {platform.processor()}".strip()


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries in this process. Two of them fight for the cores with two thread pools:
    milliseconds per switch."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*)", maps)))
