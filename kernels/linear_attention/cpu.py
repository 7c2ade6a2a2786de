"""How the compiled CPU kernel is called."""

import torch

from .. import cpu, storage
from ..recurrence import components_contiguous, in_float32, pointer, shape, steppable


def launch(q, k, v, decay, scale, initial_state, bounds):
    """Arguments and results as in `reference`, without a normaliser."""
    q, k, v, decay = components_contiguous(q), components_contiguous(k), components_contiguous(v), in_float32(decay)
    N = q.shape[0] if bounds is None else len(bounds) - 1
    initial = None if initial_state is None else initial_state.contiguous()
    packed = None if bounds is None else torch.tensor(bounds)
    o = v.new_empty(v.shape)
    storage.ask_for_huge_pages(o)
    final = q.new_empty(N, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    code = cpu.kernels().linear_attention(
        storage.DTYPE_CODES[q.dtype],
        o.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        pointer(decay),
        pointer(initial),
        final.data_ptr(),
        pointer(packed),
        shape(N, q, k, v, None, decay),
        scale,
        torch.get_num_threads(),
    )
    if code:
        raise cpu.failed(code)
    return o, final


def step(q, k, v, state, decay, scale):
    """The outputs; `state` is updated in place."""
    q, k, v, decay = components_contiguous(q), components_contiguous(k), components_contiguous(v), in_float32(decay)
    S = steppable(state)
    o = v.new_empty(v.shape)
    code = cpu.kernels().linear_attention_step(
        storage.DTYPE_CODES[q.dtype],
        o.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        pointer(decay),
        S.data_ptr(),
        shape(q.shape[0], q, k, v, None, decay, S),
        scale,
        torch.get_num_threads(),
    )
    if code:
        raise cpu.failed(code)
    if S is not state:
        state.copy_(S)
    return o
