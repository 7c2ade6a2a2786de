"""Inputs of RWKV-4's recurrence and its definition in float64: what its tests on CPUs and on GPUs share."""

import torch

from hasten.kernels import backend
from hasten.kernels.recurrence.wkv import wkv

LAYOUTS = {
    "channels last": lambda x: x,
    "tokens last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


def inputs(T, D=33, dtype=torch.float32, B=2):
    """time_decay, time_first, key, value."""
    return [*torch.randn(2, D), *(2 * torch.randn(2, B, T, D)).to(dtype)]


def some_state(D=33, B=2):
    numerator, denominator, maximum = torch.randn(3, B, D)
    return numerator, denominator.exp(), maximum


def run(tensors, state=None):
    """y and the three tensors of the state."""
    y, state = wkv(*tensors, state=state, return_state=True)
    return y, *state


def definition(tensors, state=None):
    """run in float64 as the reference."""
    with backend.use("reference"):
        return run([x.double() for x in tensors], None if state is None else [x.double() for x in state])
