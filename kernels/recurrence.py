"""What the launchers of the compiled CPU kernels of linear attention and of the delta rule share."""

import ctypes

import torch

from . import cpu, storage

_Shape = ctypes.c_int64 * 26


def launch(kernel, q, k, v, beta, decay, initial_state, bounds, *settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole sequences by a compiled kernel, whose last arguments but the threads are `settings`; beta is None for linear attention.

    q, k [B, T, H, K], v [B, T, Hv, V] -> o [B, T, Hv, V] and the final states [N, Hv, K, V].
    """
    tensors, decay = _readable(q, k, v, beta), _in_float32(decay)
    N = q.shape[0] if bounds is None else len(bounds) - 1
    initial = None if initial_state is None else initial_state.contiguous()
    packed = None if bounds is None else torch.tensor(bounds)
    o = v.new_empty(v.shape)
    storage.ask_for_huge_pages(o)
    final = q.new_empty(N, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    addresses = [_pointer(x) for x in (o, *tensors, decay, initial, final, packed)]
    sizes = _shape(N, *tensors[:3], beta if beta is None else tensors[3], decay)
    _call(kernel, q, addresses, sizes, settings)
    return o, final


def step(kernel, q, k, v, beta, state, decay, *settings) -> torch.Tensor:
    """A few tokens, as `launch`; `state` [B, Hv, K, V] is updated in place."""
    tensors, decay = _readable(q, k, v, beta), _in_float32(decay)
    S = _steppable(state)
    o = v.new_empty(v.shape)
    sizes = _shape(q.shape[0], *tensors[:3], beta if beta is None else tensors[3], decay, S)
    _call(kernel, q, [_pointer(x) for x in (o, *tensors, decay, S)], sizes, settings)
    if S is not state:
        state.copy_(S)
    return o


def _call(kernel, q, addresses, sizes, settings):
    code = kernel(storage.DTYPE_CODES[q.dtype], *addresses, sizes, *settings, torch.get_num_threads())
    if code:
        raise cpu.failed(code)


def _readable(q, k, v, beta) -> list[torch.Tensor]:
    """q, k and v with contiguous components, and beta, if there is one, in float32."""
    found = [_components_contiguous(x) for x in (q, k, v)]
    return found if beta is None else [*found, beta.float()]


def _components_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] itself if the last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _in_float32(x: torch.Tensor | None) -> torch.Tensor | None:
    """x in float32 with a contiguous last dimension, where it has components."""
    if x is None:
        return None
    x = x.float()
    return _components_contiguous(x) if x.dim() == 4 else x


def _shape(N, q, k, v, beta, decay, state=None):
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


def _pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _steppable(state: torch.Tensor) -> torch.Tensor:
    """state [B, Hv, K, V] itself if K or V is contiguous, else a copy in which V is."""
    return state if state.stride(3) == 1 or state.stride(2) == 1 else state.contiguous()
