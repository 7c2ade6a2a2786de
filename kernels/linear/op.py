"""Dense linear layer for a few rows: reads every weight once, at the bandwidth of the memory."""

import torch

from .. import backend, storage
from . import cpu, reference

MAX_BATCH = 8  # rows; with more, torch's own matrix product is the better one

_library = torch.library.Library("hasten", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K] row-major, bias [N] or None -> x @ weight.T + bias, [..., N].

    Same dtype (float16, bfloat16 or float32, summed in float32; float64 as the reference) and device for all. Up to MAX_BATCH
    rows of x run as our own kernel, more as torch.nn.functional.linear. Where a gradient is asked for, the reference runs.

    Raises TypeError for dtypes and ValueError for shapes, devices and layouts that do not fit.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        storage.check_linear(x, weight, bias)
        return reference.linear(x, weight, bias)
    return _op(x, weight, bias)


def _run(x, weight, bias=None):
    storage.check_linear(x, weight, bias)
    storage.check_row_major(weight)
    name = backend.choose(x)
    N, K = weight.shape
    rows = x.numel() // K
    if rows == 0 or (rows > MAX_BATCH and name != "reference"):
        return torch.nn.functional.linear(x, weight, bias)
    if name == "reference":
        return reference.linear(x, weight, bias)
    x = x.contiguous()
    if name == "triton":
        from . import triton

        return triton.launch(x.view(rows, K), weight, bias).view(*x.shape[:-1], N)
    bias = None if bias is None else bias.contiguous()
    return cpu.launch(x, weight, bias)


def _fake(x, weight, bias=None):
    storage.check_linear(x, weight, bias)
    storage.check_row_major(weight)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library.impl("linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("hasten::linear", _fake, lib=_library)
_op = torch.ops.hasten.linear.default
