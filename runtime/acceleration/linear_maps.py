"""The linear maps below a module, and why one is refused."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hasten.acceleration.families import LINEARS, NEVER_CALLED, QUANTISED_MARKS
from hasten.acceleration.parts import is_stock, join, kind_of
from hasten.errors import Refusal

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear_maps(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear maps below `module`, and what has taken the place of one, with their paths."""
    if _is_compiled(module):
        yield name, module
        return
    for below, child in module.named_children():
        path = join(name, below)
        if is_linear(child):
            if below not in NEVER_CALLED.get(type(module).__name__, ()):
                yield path, child
        elif not poses_as_linear(child):
            yield from linear_maps(path, child)
        elif not is_stock(child) and not type(child).__module__.startswith("torch.nn.modules."):
            yield path, child


def is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D) or (is_stock(module) and type(module).__name__ in LINEARS)


def poses_as_linear(module: nn.Module) -> bool:
    """Whether it is a subclass of a linear map, quantised, or wrapped around one."""
    return (
        isinstance(module, nn.Linear | Conv1D)
        or any(hasattr(module, mark) for mark in ("base_layer", *QUANTISED_MARKS))
        or (hasattr(module, "in_features") and hasattr(module, "out_features"))
    )


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules


def unfit(name: str, module: nn.Module) -> Refusal | None:
    """Why `module` is not a plain linear map over a plain floating-point tensor in memory; None if it is."""
    kind = kind_of(module)
    if _is_compiled(module):
        return Refusal(name, kind, "it was compiled by torch.compile", "compile after hasten.accelerate")
    if any(hasattr(module, mark) for mark in QUANTISED_MARKS):
        return Refusal(name, kind, "its weight is already quantised", "load the model without quantisation")
    if hasattr(module, "parametrizations") or (is_linear(module) and "weight" not in module._parameters):
        reason = "its weight is computed (a parametrisation, or torch.nn.utils.prune)"
        return Refusal(name, kind, reason, "make it permanent first, e.g. torch.nn.utils.prune.remove")
    if not is_linear(module):
        remedy = "merge or unload adapters and other wrappers before hasten.accelerate"
        return Refusal(name, kind, "it is not a plain torch.nn.Linear", remedy)
    weight = module.weight
    if weight.device.type == "meta" or getattr(getattr(module, "_hf_hook", None), "offload", False):
        remedy = "load the whole model into the memory of one device"
        return Refusal(name, kind, "its weight is offloaded or on the meta device", remedy)
    if type(weight.data) is not torch.Tensor or weight.dtype not in DTYPES:
        found = f"{type(weight.data).__name__} of {weight.dtype}"
        reason = f"its weight is a {found}: quantised, or of a kind that hasten does not know"
        return Refusal(name, kind, reason, "load the model in float32, float16 or bfloat16")
    if not weight.is_contiguous():
        reason = f"its weight is stored with strides {tuple(weight.stride())}"
        return Refusal(name, kind, reason, "make it contiguous first")
    if hasattr(module, "_hf_hook"):
        reason = "hooks of accelerate move its inputs between devices"
        return Refusal(name, kind, reason, "load the whole model into the memory of one device")
    if "forward" in vars(module):
        return Refusal(
            name, kind, "its forward was replaced on the instance", "put the forward of its class back first"
        )
    return None


def elsewhere(name: str, module: nn.Module, device: torch.device, first: str) -> Refusal | None:
    """Why a linear map on another device than the first one is refused."""
    if module.weight.device == device:
        return None
    reason = f"it is on {module.weight.device}, {first} is on {device}"
    return Refusal(name, kind_of(module), reason, "move the model to one device")
