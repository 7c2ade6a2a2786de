"""Linear layers of a mixture of experts for a few tokens (decoding): each expert's weights are read once for all rows that
picked it. With a cutoff the columns whose inputs are nearly zero are not read, as in hasten.kernels.column_sparse_linear.
"""

import torch

from .. import backend, storage
from . import cpu, reference

MAX_BATCH = 8  # tokens

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

    y[t, p] = x[t, p] @ weight[ids[t, p]].T + bias[ids[t, p]], for T tokens that pick P of E experts each; bias [E, N] or
    None. An id outside [0, E), as it marks an expert that another device holds, gives a row of zeros.

    cutoff [E, K] float32 or None: column j of expert e is active unless |x_j| <= cutoff[e, j] in every row that picked e (a
    NaN is active). Those rows use all active columns of e, and the others are not read, for which every expert has to be
    column-major (hasten.kernels.storage.to_column_major). Without a cutoff every column is active, and the experts may be
    row-major or column-major.

    dtypes, devices, gradients and errors as in hasten.kernels.linear. Up to MAX_BATCH tokens run as our own kernel, more as
    the reference.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        _check(x, weight, ids, bias, cutoff)
        return reference.expert_linear(x, weight, ids, bias=bias, cutoff=cutoff)
    return _op(x, weight, ids, bias=bias, cutoff=cutoff)


def _check(x, weight, ids, bias, cutoff):
    if weight.dim() != 3:
        raise ValueError(f"weight: expected shape [E, N, K], got shape {list(weight.shape)}")
    if ids.dim() != 2:
        raise ValueError(f"ids: expected shape [T, P], got shape {list(ids.shape)}")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids: expected torch.int64, got {ids.dtype}")
    (E, N, K), (T, P) = weight.shape, ids.shape
    if tuple(x.shape) not in ((T, K), (T, P, K)):
        expected = f"{[T, K]} or {[T, P, K]} for a weight of shape {[E, N, K]} and ids of shape {[T, P]}"
        raise ValueError(f"x: expected shape {expected}, got shape {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    storage.check_like(x, "weight", weight)
    if ids.device != x.device:
        raise ValueError(f"ids: expected on {x.device}, the device of x, got {ids.device}")
    if bias is not None:
        _check_shape("bias", bias, E, N)
        storage.check_like(x, "bias", bias)
    if cutoff is not None:
        _check_shape("cutoff", cutoff, E, K)
        storage.check_setting(x, "cutoff", cutoff)
        storage.check_column_major(weight)
    elif not (storage.is_row_major(weight) or storage.is_column_major(weight)):
        raise ValueError(f"weight: expected row-major or column-major experts, got strides {weight.stride()}")


def _check_shape(name, tensor, *shape):
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got shape {list(tensor.shape)}")


def _run(x, weight, ids, *, bias=None, cutoff=None):
    _check(x, weight, ids, bias, cutoff)
    name = backend.choose(x)
    if name == "reference" or len(ids) > MAX_BATCH or 0 in (*ids.shape, *weight.shape):
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
