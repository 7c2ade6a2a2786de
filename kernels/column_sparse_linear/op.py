"""Linear layer that skips the columns of the weight whose inputs are nearly zero, for a few rows (decoding).

Activation sparsity by thresholds as in TEAL (Liu et al. 2024) and WINA (Chen et al. 2025): the caller folds a threshold
t on |x_j| * norm_j into cutoff_j = t / norm_j.
"""

import torch

from .. import backend, checks, storage
from . import cpu, reference

_library = torch.library.Library("hasten", "FRAGMENT")
_library.define("column_sparse_linear(Tensor x, Tensor weight, Tensor? cutoff=None, Tensor? bias=None) -> Tensor")


def column_sparse_linear(
    x: torch.Tensor, weight: torch.Tensor, cutoff: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., K], weight [N, K] column-major, cutoff [K] float32 or None, bias [N] or None -> [..., N].

    The product over the active columns. Column j is active unless |x[b, j]| <= cutoff[j] for every row b of x (all
    leading dimensions together), so a NaN is active; every row uses all active columns. Without a
    cutoff every column is active.

    The weight comes from hasten.kernels.storage.to_column_major, or is `conv.weight.t()` of a transformers Conv1D,
    which stores [K, N]: neither is copied. dtypes, devices, gradients and errors as in hasten.kernels.linear. Up to
    hasten.kernels.storage.MAX_BATCH rows run as our own kernel, more as the masked dense product.
    """
    checks.check_tensors(x=x, weight=weight, cutoff=cutoff, bias=bias)
    if torch.is_grad_enabled():
        if backend.is_reference():
            return _run(x, weight, cutoff, bias)
        checks.refuse_gradients(x=x, weight=weight, cutoff=cutoff, bias=bias)
    return _op(x, weight, cutoff, bias)


def _check(x, weight, cutoff, bias):
    storage.check_linear(x, weight, bias)
    storage.check_column_major(weight)
    if cutoff is not None:
        checks.check_shape("cutoff", cutoff, [x.shape[-1]])
        checks.check_float32(x, "cutoff", cutoff)


def _run(x, weight, cutoff=None, bias=None):
    _check(x, weight, cutoff, bias)
    name = backend.choose(x)
    rows = storage.rows_of(x, weight)
    if name == "reference" or not 0 < rows <= storage.MAX_BATCH:
        return reference.column_sparse_linear(x, weight, cutoff, bias)
    x = x.contiguous()
    cutoff = None if cutoff is None else cutoff.contiguous()
    bias = None if bias is None else bias.contiguous()
    if name == "triton":
        from . import triton

        return triton.launch(x.view(rows, -1), weight, cutoff, bias).view(*x.shape[:-1], -1)
    return cpu.launch(x, rows, weight, cutoff, bias)


def _fake(x, weight, cutoff=None, bias=None):
    _check(x, weight, cutoff, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library.impl("column_sparse_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("hasten::column_sparse_linear", _fake, lib=_library)
_op = torch.ops.hasten.column_sparse_linear.default
