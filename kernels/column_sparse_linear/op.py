"""Linear layer that skips the columns of the weight whose inputs are nearly zero, for a few rows (decoding).

Activation sparsity by thresholds as in TEAL (Liu et al. 2024) and WINA (Chen et al. 2025): the caller folds a threshold t
on |x_j| * norm_j into cutoff_j = t / norm_j.
"""

import torch

from .. import backend, storage
from . import cpu, reference

MAX_BATCH = 8  # rows; the union of what more rows need is nearly everything

_library = torch.library.Library("hasten", "FRAGMENT")
_library.define("column_sparse_linear(Tensor x, Tensor weight, Tensor? cutoff=None, Tensor? bias=None) -> Tensor")


def column_sparse_linear(
    x: torch.Tensor, weight: torch.Tensor, cutoff: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., K], weight [N, K] column-major, cutoff [K] float32 or None, bias [N] or None -> [..., N].

    The product over the active columns. Column j is active unless |x[b, j]| <= cutoff[j] for every row b of x (all leading
    dimensions together), so a NaN is active; every row uses all active columns. Without a cutoff every column is active.

    dtypes, devices, gradients and errors as in hasten.kernels.linear. Up to MAX_BATCH rows run as our own kernel, more as
    the masked dense product. The weight comes from hasten.kernels.storage.to_column_major.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        _check(x, weight, cutoff, bias)
        return reference.column_sparse_linear(x, weight, cutoff, bias)
    return _op(x, weight, cutoff, bias)


def _check(x, weight, cutoff, bias):
    storage.check_linear(x, weight, bias)
    storage.check_column_major(weight)
    if cutoff is not None:
        storage.check_vector("cutoff", cutoff, x.size(-1))
        storage.check_setting(x, "cutoff", cutoff)


def _run(x, weight, cutoff=None, bias=None):
    _check(x, weight, cutoff, bias)
    name = backend.choose(x)
    N, K = weight.shape
    rows = x.numel() // K
    if rows == 0 or rows > MAX_BATCH or name == "reference":
        return reference.column_sparse_linear(x, weight, cutoff, bias)
    x = x.contiguous()
    if name == "triton":
        from . import triton

        return triton.launch(x.view(rows, K), weight, cutoff, bias).view(*x.shape[:-1], N)
    cutoff = None if cutoff is None else cutoff.contiguous()
    bias = None if bias is None else bias.contiguous()
    return cpu.launch(x, weight, cutoff, bias)


def _fake(x, weight, cutoff=None, bias=None):
    _check(x, weight, cutoff, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library.impl("column_sparse_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("hasten::column_sparse_linear", _fake, lib=_library)
_op = torch.ops.hasten.column_sparse_linear.default
