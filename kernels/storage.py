"""How weights are stored: the dtypes that kernels read, the two layouts;
and what the linear operators share, their largest batch and their checks.

A weight is logically [N, K], as in torch.nn.Linear, or [E, N, K] for E experts. Row-major: a row (one output's weights)
is contiguous, what nn.Linear has. Column-major: a column (one input's weights) is contiguous,
so that columns of inputs that are zero need not be read.
"""

import ctypes
import mmap
import sys

import torch

from .checks import check_floating, check_like, check_shape

# The codes that with_dtype() in simd.h knows.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Rows of x that the kernels of the linear operators are written for (with_rows() in simd.h, B in triton.py). With more,
# the union of what the rows need is nearly everything, and torch's matrix product is as fast or faster: the ratios by
# batch are in kernels/README.md.
MAX_BATCH = 8


def is_row_major(weight: torch.Tensor) -> bool:
    """Whether weight [..., N, K] has contiguous rows, and nothing between matrices."""
    return weight.is_contiguous()


def is_column_major(weight: torch.Tensor) -> bool:
    """Whether weight [..., N, K] has contiguous columns, and nothing between matrices."""
    if weight.dim() == 2 and weight.stride(0) == 1 and weight.stride(1) == weight.size(0):
        return True
    return weight.mT.is_contiguous()


def to_column_major(weight: torch.Tensor) -> torch.Tensor:
    """A copy of weight [..., N, K] whose columns are contiguous."""
    columns = torch.empty(weight.mT.shape, dtype=weight.dtype, device=weight.device)
    ask_for_huge_pages(columns)
    return columns.copy_(weight.detach().mT).mT


def rows_of(x: torch.Tensor, weight: torch.Tensor) -> int:
    """Rows of x [..., K]; 0 where nothing is to be multiplied."""
    return x.numel() // x.shape[-1] if weight.numel() else 0


def check_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raises unless x [..., K], weight [N, K] and bias [N] or None fit,
    in one floating dtype and on one device (see `checks`)."""
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [N, K], got shape {list(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        expected = f"[..., {weight.shape[1]}] for a weight of shape {list(weight.shape)}"
        raise ValueError(f"x: expected shape {expected}, got shape {list(x.shape)}")
    check_floating("x", x)
    check_like(x, "weight", weight)
    if bias is not None:
        check_shape("bias", bias, [weight.size(0)])
        check_like(x, "bias", bias)


def check_row_major(weight: torch.Tensor) -> None:
    """Raises unless weight has contiguous rows."""
    if not is_row_major(weight):
        raise ValueError(f"weight: expected row-major, got strides {weight.stride()}: call .contiguous() on it")


def check_column_major(weight: torch.Tensor) -> None:
    """Raises unless weight has contiguous columns."""
    if not is_column_major(weight):
        advice = "call hasten.kernels.storage.to_column_major on it"
        raise ValueError(f"weight: expected column-major, got strides {weight.stride()}: {advice}")


def ask_for_huge_pages(tensor: torch.Tensor) -> None:
    """Lets Linux back a new, unwritten CPU tensor by 2 MB pages:
    skipping columns is a walk through many small pages."""
    huge = 1 << 21
    begin = -(-tensor.data_ptr() // huge) * huge
    size = (tensor.data_ptr() + tensor.nbytes) // huge * huge - begin
    if tensor.is_cpu and size > 0 and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
