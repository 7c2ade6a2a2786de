"""Gated linear layer that skips the rows of the weight whose gate is nearly zero, for a few rows of x (decoding).

The up projection of CATS (Lee et al. 2024): gate = act(gate_proj(x)).
"""

import torch

from .. import backend, storage
from . import cpu, reference

MAX_BATCH = 8  # rows; the union of what more rows need is nearly everything

_library = torch.library.Library("hasten", "FRAGMENT")
_library.define(
    "row_sparse_linear(Tensor x, Tensor weight, Tensor gate, Tensor threshold, Tensor? bias=None) -> Tensor"
)


def row_sparse_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor,
    threshold: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K], weight [N, K] row-major, gate [..., N], threshold [] float32, bias [N] or None -> [..., N].

    gate * (x @ weight.T + bias) for the active outputs, and exactly 0 for the others. Output n is active unless
    |gate[b, n]| <= threshold for every row b of x (all leading dimensions together), so a NaN is active.

    dtypes, devices, gradients and errors as in hasten.kernels.linear. Up to MAX_BATCH rows run as our own kernel, more as
    the masked dense product.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or gate.requires_grad or (bias is not None and bias.requires_grad)
    ):
        _check(x, weight, gate, threshold, bias)
        return reference.row_sparse_linear(x, weight, gate, threshold, bias)
    return _op(x, weight, gate, threshold, bias)


def _check(x, weight, gate, threshold, bias):
    storage.check_linear(x, weight, bias)
    storage.check_row_major(weight)
    storage.check_like(x, "gate", gate)
    expected = (*x.shape[:-1], weight.size(0))
    if gate.shape != expected:
        raise ValueError(f"gate: expected shape {list(expected)}, got shape {list(gate.shape)}")
    if threshold.dim() != 0:
        raise ValueError(f"threshold: expected shape [], got shape {list(threshold.shape)}")
    storage.check_setting(x, "threshold", threshold)


def _run(x, weight, gate, threshold, bias=None):
    _check(x, weight, gate, threshold, bias)
    name = backend.choose(x)
    N, K = weight.shape
    rows = x.numel() // K
    if rows == 0 or rows > MAX_BATCH or name == "reference":
        return reference.row_sparse_linear(x, weight, gate, threshold, bias)
    x, gate = x.contiguous(), gate.contiguous()
    if name == "triton":
        from . import triton

        y = triton.launch(x.view(rows, K), weight, gate.view(rows, N), threshold, bias)
        return y.view(*x.shape[:-1], N)
    bias = None if bias is None else bias.contiguous()
    return cpu.launch(x, weight, gate, threshold, bias)


def _fake(x, weight, gate, threshold, bias=None):
    _check(x, weight, gate, threshold, bias)
    return gate.new_empty(gate.shape)


_library.impl("row_sparse_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("hasten::row_sparse_linear", _fake, lib=_library)
_op = torch.ops.hasten.row_sparse_linear.default
