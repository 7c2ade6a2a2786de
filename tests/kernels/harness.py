"""What the tests of kernels share: how close is close, outputs full of NaN before a call, and where Triton's kernels
run."""

import os
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU, not the interpreter")
# The pytestmark of a module that runs Triton's kernels, on a GPU or in a process of test_triton_interpreted.py.
TRITON_RUNS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU"),
]


def short(value) -> str:
    """The name of a parameter in a test's id: float32, 1x257x37."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """Compares with the definition in float64, by the norm of the difference; the tolerance is that of the result's
    dtype."""
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert error <= (tolerance or TOLERANCES[found.dtype]), (
        f"relative error {error:.1e} in {found.dtype}"
    )  # a NaN fails


@contextmanager
def poisoned():
    """Fills what is allocated with NaN (integers with their largest, flags with True), so that an output that is not written shows."""

    def filled(allocate):
        def allocate_and_fill(*args, **kwargs):
            made = allocate(*args, **kwargs)
            if made.dtype == torch.bool:
                return made.fill_(True)
            return made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).max)

        return allocate_and_fill

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(patch.object(owner, name, filled(getattr(owner, name))))
        yield
