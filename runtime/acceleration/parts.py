"""The parts of a model that techniques change."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear map of the model, [N, K]. `name` is its path in the model;
    `role` is what `families` calls it there, None where it is not known."""

    name: str
    role: str | None
    module: nn.Linear | Conv1D

    @property
    def weight(self) -> torch.Tensor:
        """[N, K]: a view of what the module holds."""
        weight = self.module.weight
        return weight.t() if isinstance(self.module, Conv1D) else weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.module.bias


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """A module that computes down(act(gate(x)) * up(x)), with gate and up apart, or fused in `gate_up` with the rows of
    gate first. `activation` is the name of the module's attribute."""

    name: str
    module: nn.Module
    activation: str
    down: Projection
    gate: Projection | None = None
    up: Projection | None = None
    gate_up: Projection | None = None

    @property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(projection for projection in (self.gate, self.up, self.gate_up, self.down) if projection)


@dataclass(frozen=True, slots=True)
class Experts:
    """A fused mixture of experts: a module whose weights [E, ...] are picked per token."""

    name: str
    module: nn.Module


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder layer. `gated_mlps` are all that it has (shared experts too), `gated_mlp` is the first of them."""

    name: str
    module: nn.Module
    projections: tuple[Projection, ...]
    gated_mlps: tuple[GatedMLP, ...]
    experts: tuple[Experts, ...]

    @property
    def gated_mlp(self) -> GatedMLP | None:
        return next(iter(self.gated_mlps), None)


def join(*names: str) -> str:
    return ".".join(name for name in names if name)


def kind_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_stock(module: nn.Module) -> bool:
    """Whether its class is one of the models in transformers."""
    return type(module).__module__.startswith("transformers.models.")
