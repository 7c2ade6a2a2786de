"""What the tests of the operators share."""

import shutil
import warnings

import pytest
import torch

from hasten.kernels import cpu

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(params=cpu.ISAS)
def isa(request, monkeypatch):
    """Runs a test once for every instruction set that this CPU has."""
    if cpu.reason():
        pytest.skip(cpu.reason())
    if request.param not in cpu.isas():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setattr(cpu, "isa", lambda: request.param)
    return request.param


@pytest.fixture(params=TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture
def assert_close():
    """Checks a result against the reference in float64, by the norm of the difference."""

    def check(result, expected, tolerance=None):
        assert result.shape == expected.shape
        error = (result.double() - expected).norm() / expected.norm()
        assert error <= (tolerance or TOLERANCES[result.dtype]), f"relative error {error:.1e} in {result.dtype}"

    return check


@pytest.fixture
def poisoned(monkeypatch):
    """Fills what the operators allocate with NaN, so that an output that is not written shows."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan))


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
