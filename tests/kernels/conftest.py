"""The fixtures of the kernels' tests."""

import shutil
import warnings

import harness
import pytest
import torch

from hasten.kernels import cpu


@pytest.fixture(params=[name for name in cpu.ISAS if cpu.reason() or name in cpu.compiled()])
def isa(request, monkeypatch):
    """Runs a test once for every instruction set that this CPU has."""
    if cpu.reason():
        pytest.skip(cpu.reason())
    if request.param not in cpu.isas():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setattr(cpu, "isa", lambda: request.param)
    return request.param


@pytest.fixture(params=harness.TOLERANCES, ids=harness.short)
def dtype(request):
    return request.param


@pytest.fixture
def poisoned():
    """Fills what the operators allocate with NaN during a test."""
    with harness.poisoned():
        yield


@pytest.fixture
def threads():
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def can_compile(compiler):
    """Skips where a compiler of torch.compile has no C++ compiler to call."""
    if compiler == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # inductor imports what uses it
        yield
