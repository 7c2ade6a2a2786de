"""Linear layers of a mixture of experts for a few tokens (decoding): an expert is read once for all that picked it.

With a cutoff the columns whose inputs are nearly zero are not read, as in hasten.kernels.column_sparse_linear.
"""

import torch

from .. import backend, checks, storage
from . import cpu, reference

_library = torch.library.Library("hasten", "FRAGMENT")
_library.define(
    "expert_linear(Tensor x, Tensor weight, Tensor ids, *, Tensor? bias=None, Tensor? cutoff=None) -> Tensor"
)


def expert_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    cutoff: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, K] (a row per token) or [T, P, K] (a row per pick), weight [E, N, K], ids int64 [T, P] -> [T, P, N].

    y[t, p] = x[t, p] @ weight[ids[t, p]].T + bias[ids[t, p]], for T tokens that pick P different experts of E each;
    bias [E, N] or None. An id outside [0, E), as it marks an expert that another device holds, gives a row of zeros.

    cutoff [E, K] float32 or None: column j of expert e is active unless |x_j| <= cutoff[e, j] in every row that picked
    e (a NaN is active). Those rows use all active columns of e, and the others are not read, for which every expert has
    to be column-major (hasten.kernels.storage.to_column_major). Without a cutoff every column is active, and the
    experts may be row-major or column-major.

    dtypes, devices, gradients and errors as in hasten.kernels.linear. Up to hasten.kernels.storage.MAX_BATCH tokens run
    as our own kernel, more as the reference.
    """
    checks.check_tensors(x=x, weight=weight, ids=ids, bias=bias, cutoff=cutoff)
    if torch.is_grad_enabled():
        if backend.is_reference():
            return _run(x, weight, ids, bias=bias, cutoff=cutoff)
        checks.refuse_gradients(x=x, weight=weight, bias=bias, cutoff=cutoff)
    return _op(x, weight, ids, bias=bias, cutoff=cutoff)


def _check(x, weight, ids, bias, cutoff):
    if weight.dim() != 3:
        raise ValueError(f"weight: expected shape [E, N, K], got shape {list(weight.shape)}")
    if ids.dim() != 2:
        raise ValueError(f"ids: expected shape [T, P], got shape {list(ids.shape)}")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids: expected torch.int64, got {ids.dtype}")
    (E, N, K), (T, P) = weight.shape, ids.shape
    checks.check_shape("x", x, [T, K], [T, P, K])
    checks.check_floating("x", x)
    checks.check_like(x, "weight", weight)
    checks.check_device(x, "ids", ids)
    if bias is not None:
        checks.check_shape("bias", bias, [E, N])
        checks.check_like(x, "bias", bias)
    if cutoff is not None:
        checks.check_shape("cutoff", cutoff, [E, K])
        checks.check_float32(x, "cutoff", cutoff)
        storage.check_column_major(weight)
    elif not (storage.is_row_major(weight) or storage.is_column_major(weight)):
        raise ValueError(f"weight: expected row-major or column-major experts, got strides {weight.stride()}")


def _run(x, weight, ids, *, bias=None, cutoff=None):
    _check(x, weight, ids, bias, cutoff)
    name = backend.choose(x)
    if name == "reference" or len(ids) > storage.MAX_BATCH or 0 in (*ids.shape, *weight.shape):
        return reference.expert_linear(x, weight, ids, bias=bias, cutoff=cutoff)
    x, ids = x.contiguous(), ids.contiguous()
    bias = None if bias is None else bias.contiguous()
    column_major = cutoff is not None or not storage.is_row_major(weight)
    cutoff = None if cutoff is None else cutoff.contiguous()
    if name == "triton":
        from . import triton

        return triton.launch(x, weight, ids, bias, cutoff, column_major)
    return cpu.launch(x, weight, ids, bias, cutoff, column_major)


def _fake(x, weight, ids, *, bias=None, cutoff=None):
    _check(x, weight, ids, bias, cutoff)
    return x.new_empty(*ids.shape, weight.shape[1])


_library.impl("expert_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("hasten::expert_linear", _fake, lib=_library)
_op = torch.ops.hasten.expert_linear.default
