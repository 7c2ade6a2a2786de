"""The compiled CPU kernels: one shared library with a plain C ABI, every function once per instruction set."""

import ctypes
import os
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch  # noqa: F401  brings its OpenMP runtime, which the library then shares

ISAS = ("avx512bf16", "avx512", "avx2", "scalar")  # best first
LIBRARY = Path(__file__).with_name("_cpu.so")

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    # dtype, y, x, weight, bias, rows, N, K, threads
    "linear": (_INT, *[_POINTER] * 4, *[_SIZE] * 3, _INT),
    # dtype, y, x, weight, cutoff, bias, rows, N, K, threads
    "column_sparse_linear": (_INT, *[_POINTER] * 5, *[_SIZE] * 3, _INT),
    # dtype, y, x, weight, gate, threshold, bias, rows, N, K, threads
    "row_sparse_linear": (_INT, *[_POINTER] * 6, *[_SIZE] * 3, _INT),
    # dtype, y, x, weight, bias, initial, bounds, N, tokens, T, D, W, row stride, token stride, silu, threads
    "causal_conv1d": (_INT, *[_POINTER] * 6, *[_SIZE] * 7, _INT, _INT),
    # dtype, y, x, weight, bias, initial, bounds, N, B, T, D, W, row stride, channel stride, silu, threads
    "causal_conv1d_by_channel": (_INT, *[_POINTER] * 6, *[_SIZE] * 7, _INT, _INT),
    # dtype, y, x, state, weight, bias, B, D, T, S, W, silu, threads
    "causal_conv1d_update": (_INT, *[_POINTER] * 5, *[_SIZE] * 5, _INT, _INT),
    # dtype, o, q, k, v, decay, initial, final, bounds, shape, scale, threads
    "linear_attention": (_INT, *[_POINTER] * 9, _FLOAT, _INT),
    # dtype, o, q, k, v, decay, state, shape, scale, threads
    "linear_attention_step": (_INT, *[_POINTER] * 7, _FLOAT, _INT),
    # dtype, o, q, k, v, beta, decay, initial, final, bounds, shape, scale, l2_norm, threads
    "delta_rule": (_INT, *[_POINTER] * 10, _FLOAT, _INT, _INT),
    # dtype, o, q, k, v, beta, decay, state, shape, scale, l2_norm, threads
    "delta_rule_step": (_INT, *[_POINTER] * 8, _FLOAT, _INT, _INT),
    # order, text, N
    "suffix_array": (_POINTER, _POINTER, _SIZE),
}


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
def isas() -> tuple[str, ...]:
    """The instruction sets that the library was compiled for and this CPU has, best first."""
    library = _load()
    return tuple(isa for isa in ISAS if getattr(library, f"hasten_supported_{isa}", int)())


@cache
def isa() -> str:
    """The instruction set in use: the best one, or the one that the environment variable HASTEN_CPU_ISA names."""
    wanted = os.environ.get("HASTEN_CPU_ISA")
    if wanted and wanted not in isas():
        raise ValueError(f"HASTEN_CPU_ISA={wanted!r}: this machine has {', '.join(isas()) or 'no compiled kernels'}")
    return wanted or isas()[0]


@cache
def functions(isa: str) -> SimpleNamespace:
    """The C functions of one instruction set. Each returns 0, or what failed() explains."""
    found = {}
    for name, arguments in _ARGUMENTS.items():
        found[name] = getattr(_load(), f"hasten_{name}_{isa}")
        found[name].argtypes, found[name].restype = arguments, _INT
    return SimpleNamespace(**found)


@cache
def kernels() -> SimpleNamespace:
    """The C functions of the instruction set in use."""
    return functions(isa())


def failed(code: int) -> Exception:
    """The error for what a C function returned."""
    return MemoryError("no memory for a CPU kernel") if code == 2 else RuntimeError(f"CPU kernel returned {code}")


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries in this process. Two of them fight for the cores with two thread pools: milliseconds per switch."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*)", maps)))
