"""A transposed copy is the transposed matrix, bit for bit, of any shape, dtype and layout."""

import pytest
import torch

from hasten.kernels import backend
from hasten.kernels.transpose import transpose


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 130), (65, 64), (200, 77), (5, 33, 66), (2, 3, 7, 9), (0, 4), (4, 0)], ids=str
)
def test_every_element_moves(shape, dtype):
    x = torch.randint(-100, 100, shape).to(dtype)
    y = transpose(x)
    assert y.is_contiguous() and y.dtype == dtype and torch.equal(y, x.mT)
    assert torch.equal(transpose(y), x)


def test_other_layouts_and_nan():
    x = torch.full((70, 90), torch.nan)[:, ::2]
    assert transpose(x).isnan().all() and transpose(x).shape == (45, 70)
    assert torch.equal(transpose(torch.arange(12.0).view(3, 4).t()), torch.arange(12.0).view(3, 4))
    with backend.use("reference"):
        assert torch.equal(transpose(torch.arange(6.0).view(2, 3)), torch.arange(6.0).view(2, 3).t())


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_what_is_no_matrix_is_refused(choice):
    with backend.use(choice):
        with pytest.raises(TypeError, match="x: expected a tensor, got None"):
            transpose(None)
        with pytest.raises(ValueError, match=r"x: expected shape \[\.\.\., R, C\], got shape \[3\]"):
            transpose(torch.ones(3))
