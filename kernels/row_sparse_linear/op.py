"""Gated linear layer that skips the rows of the weight whose gate is nearly zero, for a few rows of x (decoding).

The up projection of CATS (Lee et al. 2024): gate = act(gate_proj(x)).
"""

import torch

from .. import backend, checks, storage
from . import cpu, reference

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

    dtypes, devices, gradients and errors as in hasten.kernels.linear. Up to hasten.kernels.storage.MAX_BATCH rows run
    as our own kernel, more as the masked dense product.
    """
    checks.check_tensors(x=x, weight=weight, gate=gate, threshold=threshold, bias=bias)
    if torch.is_grad_enabled():
        if backend.is_reference():
            return _run(x, weight, gate, threshold, bias)
        checks.refuse_gradients(x=x, weight=weight, gate=gate, threshold=threshold, bias=bias)
    return _op(x, weight, gate, threshold, bias)


def _check(x, weight, gate, threshold, bias):
    storage.check_linear(x, weight, bias)
    storage.check_row_major(weight)
    checks.check_like(x, "gate", gate)
    checks.check_shape("gate", gate, [*x.shape[:-1], weight.shape[0]])
    checks.check_shape("threshold", threshold, [])
    checks.check_float32(x, "threshold", threshold)


def _run(x, weight, gate, threshold, bias=None):
    _check(x, weight, gate, threshold, bias)
    name = backend.choose(x)
    rows = storage.rows_of(x, weight)
    if name == "reference" or not 0 < rows <= storage.MAX_BATCH:
        return reference.row_sparse_linear(x, weight, gate, threshold, bias)
    x, gate = x.contiguous(), gate.contiguous()
    bias = None if bias is None else bias.contiguous()
    if name == "triton":
        from . import triton

        return triton.launch(x.view(rows, -1), weight, gate.view(rows, -1), threshold, bias).view(gate.shape)
    return cpu.launch(x, rows, weight, gate, threshold, bias)


def _fake(x, weight, gate, threshold, bias=None):
    _check(x, weight, gate, threshold, bias)
    return gate.new_empty(gate.shape)


_library.impl("row_sparse_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("hasten::row_sparse_linear", _fake, lib=_library)
_op = torch.ops.hasten.row_sparse_linear.default
