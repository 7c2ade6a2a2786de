"""Inputs of the selective scan and its definition in float64: what its tests on CPUs and on GPUs share."""

import torch

from hasten.kernels import backend
from hasten.kernels.recurrence.selective_scan import selective_scan, selective_scan_step

OPTIONS = {  # which optional inputs there are
    "all": {"D", "z", "dt_bias", "dt_softplus"},
    "none": set(),
    "softplus": {"dt_softplus"},
    "bias, gate": {"dt_bias", "z"},
}
LAYOUTS = {
    "channels last": lambda x: x,
    "tokens last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}
TOKENS = ("x", "dt", "B", "C", "z")  # what has a row per token


def inputs(T, D=33, N=16, dtype=torch.float32, B=2, options="all"):
    """The arguments by name; dt is at least 0 where nothing makes it so."""
    chosen = OPTIONS[options]
    x, dt, z = torch.randn(3, B, T, D)
    found = {"x": x.to(dtype), "dt": (dt if "dt_softplus" in chosen else dt.abs()).to(dtype)}
    found["A"] = -torch.rand(D, N) * torch.arange(1, N + 1)
    found["B"], found["C"] = torch.randn(2, B, T, N).to(dtype)
    more = {"D": torch.randn(D), "z": z.to(dtype), "dt_bias": torch.rand(D), "dt_softplus": True}
    return found | {name: value for name, value in more.items() if name in chosen}


def changed(arguments, change, names=TOKENS):
    """The arguments, with `change` of the tensors that have a row per token."""
    return {name: change(x) if name in names and x is not None else x for name, x in arguments.items()}


def part(arguments, own):
    """Some tokens."""
    return changed(arguments, lambda x: x[:, own])


def run(arguments, state=None, **settings):
    return selective_scan(**arguments, initial_state=state, return_state=True, **settings)


def step(arguments, state):
    return selective_scan_step(state=state, **arguments)


def definition(arguments, state=None, **settings):
    """run in float64 as the reference."""
    wide = {name: x.double() if torch.is_tensor(x) else x for name, x in arguments.items()}
    with backend.use("reference"):
        return run(wide, None if state is None else state.double(), **settings)
