"""Which implementation of an operator runs: chosen by the device, or by `use` for a while."""

import os
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

import torch

from . import cpu, storage

_chosen: ContextVar[str] = ContextVar("hasten_backend", default="auto")


def available() -> dict[str, str | None]:
    """Each implementation, with why it cannot run here, or None where it can."""
    return {"reference": None, "cpu": cpu.reason(), "triton": _without_triton()}


@contextmanager
def use(name: str):
    """Within the block every operator runs as "reference", "cpu" (compiled C++), "triton", or "auto" (by the device).

    Holds for this thread or task. Raises RuntimeError where that implementation cannot run.
    """
    reasons = {"auto": None, **available()}
    if name not in reasons:
        raise ValueError(f"backend {name!r}: expected one of {', '.join(reasons)}")
    if reasons[name]:
        raise RuntimeError(f"backend {name!r} cannot run here: {reasons[name]}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def is_reference() -> bool:
    """Whether `use("reference")` holds. torch.compile cannot look, and records the operator either way.

    In grad mode autograd needs the definition's own operations; otherwise the operator runs, and finds the definition.
    """
    return not torch.compiler.is_compiling() and _chosen.get() == "reference"


def choose(x: torch.Tensor, fallback: str = "reference") -> str:
    """The implementation that an operator on x runs as: "reference", "cpu", "triton", or `fallback` where none was
    asked for and no kernel can run."""
    if x.dtype not in storage.DTYPE_CODES:
        return "reference" if _chosen.get() == "reference" else fallback
    return choose_by_device(x, fallback)


def choose_by_device(x: torch.Tensor, fallback: str = "reference") -> str:
    """The same for an operator that takes every dtype."""
    name = _chosen.get()
    if name != "auto":
        return name
    if x.is_cpu:
        return "cpu" if cpu.reason() is None else fallback
    return "triton" if x.is_cuda and _without_triton() is None else fallback


@cache
def _without_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no GPU (with TRITON_INTERPRET=1 the kernels run on the CPU, slowly, to be tested)"
    return None
