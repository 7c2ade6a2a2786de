"""What the launchers of the compiled CPU kernels of linear attention and of the delta rule share: strides, and the layouts that the kernels read."""

import ctypes

import torch

_Shape = ctypes.c_int64 * 26


def components_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] itself if the last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def in_float32(x: torch.Tensor | None) -> torch.Tensor | None:
    """x in float32 with a contiguous last dimension, where it has components."""
    if x is None:
        return None
    x = x.float()
    return components_contiguous(x) if x.dim() == 4 else x


def shape(N, q, k, v, beta, decay, state=None):
    """The struct Shape of recurrence.h."""
    _, T, H, K = q.shape
    Hv, V = v.shape[2:]
    strides = [0, 0, 0, 0]
    if decay is not None:
        # One decay for all rows and tokens has strides of zero; so has one for all components. A single component needs no stride of its own.
        strides = [0, 0, decay.stride(0), 0] if decay.dim() == 1 else [*decay.stride()[:3], int(decay.dim() == 4)]
    beta_strides = (0, 0, 0) if beta is None else beta.stride()
    state_strides = (0, 0, 0, 0) if state is None else state.stride()
    sizes = (N, T, H, Hv, K, V)
    return _Shape(*sizes, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides, *beta_strides, *state_strides)


def pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def steppable(state: torch.Tensor) -> torch.Tensor:
    """state [B, Hv, K, V] itself if K or V is contiguous, else a copy in which V is."""
    return state if state.stride(3) == 1 or state.stride(2) == 1 else state.contiguous()
