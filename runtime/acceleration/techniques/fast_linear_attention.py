"""Linear-attention layers on hasten's kernels."""

import inspect
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from hasten.acceleration.edits import Edit, MarkStateful, ReplaceForward
from hasten.acceleration.forwards import Forward
from hasten.acceleration.techniques.adapted_forwards import check_state, refuse_others, refuse_packed
from hasten.acceleration.techniques.base import DECODE, PREFILL, Regime, Skip, Technique
from hasten.acceleration.techniques.linear_attention_layers import LAYERS
from hasten.errors import Refusal, UnsupportedModelError


class LinearAttentionLayer(Forward):
    """The forward of one linear-attention layer, re-made from its class's with hasten's kernels."""

    def __init__(self, module: nn.Module, name: str):
        super().__init__(module, name)
        self.function = None
        self.named = frozenset(inspect.signature(type(module).forward).parameters)

    def own(self, *arguments, **keywords):
        if self.function is None:  # made at the first call: a copy of the module is empty when this is copied
            self.function = LAYERS[type(self.module).__name__].make(self.module)
        refuse_others({name: value for name, value in keywords.items() if name not in self.named})
        self.check_convolution(*arguments, *keywords.values())
        return self.function(self.module, *arguments, **keywords)

    def check_convolution(self, *values) -> None:
        """Raises ValueError where a cache among a call's values holds a convolution's inputs of another shape."""
        convolution = getattr(self.module, "conv1d", None) or getattr(self.module, "conv", None)
        cache = next((value for value in values if isinstance(value, Cache)), None)
        if convolution is None or cache is None or self.module.layer_idx >= len(cache.layers):
            return
        state = cache.get_conv_state(self.module.layer_idx, state_idx=0)
        if state is not None:
            x = next(value for value in values if isinstance(value, torch.Tensor))
            width = max(state.shape[-1], convolution.kernel_size[0] - 1)
            check_state("convolution state", state, [x.shape[0], convolution.in_channels, width])

    def __getstate__(self):
        return vars(self) | {"function": None}


@dataclass(slots=True)
class RefusePacked(Edit):
    """Lets the model refuse packed sequences, also where it would not pass on to its layers what tells them apart."""

    name: str = ""
    handle: RemovableHandle | None = None

    def apply(self, model: nn.Module) -> None:
        self.handle = model.register_forward_pre_hook(_refuse_packed, with_kwargs=True)

    def undo(self, model: nn.Module) -> None:
        if self.handle is not None:
            self.handle.remove()


def _refuse_packed(model: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
    refuse_packed(keywords)


@dataclass(frozen=True, slots=True)
class FastLinearAttention(Technique):
    """Exact: linear-attention layers (lightning attention, gated delta rule, Kimi delta attention, Mamba and Mamba-2,
    mLSTM, RWKV, short convolutions) run hasten's kernels instead of transformers' torch fallbacks, in prefill, in the
    continuation of a cached prefix and in decode, with their state in float32.
    """

    exact: ClassVar[bool] = True

    def targets(self, anatomy):
        return tuple(_found(anatomy)[0])

    def edits(self, anatomy, settings):
        found = _found(anatomy)[0]
        edits = [*(ReplaceForward(name, LinearAttentionLayer) for name in found), RefusePacked()]
        recurrent = any(LAYERS[type(layer).__name__].recurrent for layer in found.values())
        known = getattr(anatomy.model, "_is_stateful", True)
        return [*edits, MarkStateful()] if recurrent and not known else edits

    def skips(self, anatomy, settings):
        return _found(anatomy)[1]

    def regimes(self, anatomy):
        return (DECODE, PREFILL, Regime(tokens=512))


def _found(anatomy) -> tuple[dict[str, nn.Module], list[Skip]]:
    """The layers that can be made fast, and those that run a CUDA kernel package already.

    Raises:
        UnsupportedModelError: there is neither.
    """
    found, left = {}, []
    for name, layer in anatomy.modules(LAYERS).items():
        if refusal := _refusal(name, layer):
            anatomy.refuse(refusal)
        elif package := _package(layer):
            left.append(Skip(name, f"it runs {package}'s kernels already"))
        else:
            found[name] = layer
    if not found and not left:
        known = ", ".join(dict.fromkeys(layer.models for layer in LAYERS.values()))
        reason = f"it has no linear-attention layer that hasten knows (its model_type is {anatomy.model_type!r})"
        raise UnsupportedModelError("", type(anatomy.model).__qualname__, reason, f"known are those of {known}")
    return found, left


def _refusal(name: str, layer: nn.Module) -> Refusal | None:
    """Why this layer cannot be changed."""
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if "forward" in vars(layer) and not isinstance(vars(layer)["forward"], LinearAttentionLayer):
        reason = "its forward was replaced on the instance (kernelize and hooks of accelerate do that)"
        return Refusal(name, kind, reason, "undo that first")
    for inner, parameter in layer.named_parameters():
        if parameter.device.type == "meta":
            remedy = "load the whole model into the memory of one device"
            return Refusal(name, kind, f"its {inner} is offloaded or on the meta device", remedy)
        if not parameter.is_floating_point():
            remedy = "load the model without quantisation"
            return Refusal(name, kind, f"its {inner} is quantised ({parameter.dtype})", remedy)
    missing = _missing(type(layer))
    if missing:
        reason = f"its forward does not call {missing[0]}, as that of the supported transformers does"
        return Refusal(name, kind, reason, "use a transformers version that hasten supports")
    return None


@cache
def _missing(layer: type[nn.Module]) -> list[str]:
    """The functions that the forward of this class of layers should call, and does not."""
    called = inspect.unwrap(layer.forward).__code__.co_names
    return [function for function in LAYERS[layer.__name__].replaced if function not in called]


def _package(layer: nn.Module) -> str | None:
    """The CUDA package whose kernels the layer runs. On a CPU those cannot run, whatever is installed."""
    weight = next(layer.parameters(), None)
    if weight is None or weight.device.type == "cpu":
        return None
    module = sys.modules[type(layer).__module__]
    for function in LAYERS[type(layer).__name__].replaced:
        called = getattr(module, function)
        if not called.__closure__ and called.__module__ == module.__name__:
            continue  # transformers' own, without a package in its place
        closure = inspect.getclosurevars(called).nonlocals
        if closure.get("is_new_implementation", True):
            return getattr(closure.get("implementation"), "__module__", "another package").partition(".")[0]
    return None
