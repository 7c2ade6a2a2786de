"""Dense linear layer for a few rows: reads every weight once, at the bandwidth of the memory."""

import torch

from .. import backend, checks, storage
from ..column_sparse_linear import column_sparse_linear
from . import cpu, reference

_library = torch.library.Library("hasten", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] or None -> x @ weight.T + bias, [..., N].

    The weight is read as it lies, without a copy: row-major, as torch.nn.Linear has it, or column-major (by
    column_sparse_linear without a cutoff), which is what hasten.kernels.storage.to_column_major makes and what
    `conv.weight.t()` of a transformers Conv1D is.

    Same dtype (float16, bfloat16 or float32, summed in float32; float64 as the reference) and device for all. Up to
    hasten.kernels.storage.MAX_BATCH rows of x run as our own kernel, more as torch.nn.functional.linear.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes, devices or layouts that do not fit.
        NotImplementedError: an input that requires grad: the kernels have no gradients,
            `hasten.kernels.backend.use("reference")` has.
    """
    checks.check_tensors(x=x, weight=weight, bias=bias)
    if not storage.is_row_major(weight) and weight.dim() == 2 and storage.is_column_major(weight):
        return column_sparse_linear(x, weight, None, bias)
    if torch.is_grad_enabled():
        if backend.is_reference():
            return _run(x, weight, bias)
        checks.refuse_gradients(x=x, weight=weight, bias=bias)
    return _op(x, weight, bias)


def _check(x, weight, bias):
    storage.check_linear(x, weight, bias)
    storage.check_row_major(weight)


def _run(x, weight, bias=None):
    _check(x, weight, bias)
    name = backend.choose(x)
    rows = storage.rows_of(x, weight)
    if name == "reference":
        return reference.linear(x, weight, bias)
    if not 0 < rows <= storage.MAX_BATCH:
        return torch.nn.functional.linear(x, weight, bias)
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    if name == "triton":
        from . import triton

        return triton.launch(x.view(rows, -1), weight, bias).view(*x.shape[:-1], -1)
    return cpu.launch(x, rows, weight, bias)


def _fake(x, weight, bias=None):
    _check(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library.impl("linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("hasten::linear", _fake, lib=_library)
_op = torch.ops.hasten.linear.default
