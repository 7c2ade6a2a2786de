"""Inputs of linear_attention and delta_rule, and both behind one name: what their tests on CPUs and on GPUs share."""

import torch

from hasten.kernels import backend
from hasten.kernels.recurrence.delta_rule import delta_rule, delta_rule_step
from hasten.kernels.recurrence.linear_attention import linear_attention, linear_attention_step

OPERATORS = ("linear_attention", "delta_rule")
H, HV = 2, 4
SIZES = [(1, 24, 17), (63, 17, 40), (64, 16, 16), (65, 40, 33), (500, 24, 17)]  # T, K, V
DECAYS = ["none", "head", "token", "component"]
STATES = {  # layouts of a state [B, Hv, K, V]
    "V contiguous": lambda S: S,
    "K contiguous": lambda S: S.transpose(-1, -2).contiguous().transpose(-1, -2),
    "neither": lambda S: torch.stack([S, S], -1)[..., 0],
}


def log_decay(kind, B, T, K, lowest=5.0, dtype=torch.float32):
    shape = {"none": None, "head": (HV,), "token": (B, T, HV), "component": (B, T, HV, K)}[kind]
    return None if shape is None else -lowest * torch.rand(shape, dtype=dtype)


def inputs(operator, T, K=24, V=17, dtype=torch.float32, B=2):
    q, k = torch.randn(2, B, T, H, K).to(dtype)
    tensors = [q, k, torch.randn(B, T, HV, V).to(dtype)]
    return [*tensors, torch.rand(B, T, HV) * 1.5] if operator == "delta_rule" else tensors


def run(operator, tensors, decay=None, state=None, **settings):
    if operator == "delta_rule":
        settings = {"l2_norm": True} | settings
    function = {"linear_attention": linear_attention, "delta_rule": delta_rule}[operator]
    return function(*tensors, decay=decay, scale=0.3, initial_state=state, return_state=True, **settings)


def step(operator, tensors, state, decay=None):
    if operator == "delta_rule":
        return delta_rule_step(*tensors, state, decay=decay, scale=0.3, l2_norm=True)
    return linear_attention_step(*tensors, state, decay=decay, scale=0.3)


def definition(operator, tensors, decay=None, state=None, **settings):
    """run in float64 as the reference."""
    with backend.use("reference"):
        return run(operator, double(tensors), *double([decay, state]), **settings)


def double(tensors):
    return [x if x is None else x.double() for x in tensors]
