"""What a model is, in every respect that `hasten.revert` brings back."""

import torch
from torch import nn


def snapshot(model: nn.Module) -> tuple[dict, dict]:
    """Its modules with all their attributes, by identity, and its tensors with identity, strides, flags and values."""
    modules = {name: (module, type(module), _attributes(module)) for name, module in model.named_modules()}
    tensors = {
        name: (tensor, tensor.stride(), tensor.requires_grad, tensor.detach().clone())
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    return modules, tensors


def assert_unchanged(model: nn.Module, before: tuple[dict, dict]) -> None:
    """Asserts that `model` is what it was when `snapshot` gave `before`."""
    modules, tensors = snapshot(model)
    assert modules.keys() == before[0].keys()
    for name, (module, kind, attributes) in modules.items():
        earlier, earlier_kind, earlier_attributes = before[0][name]
        assert module is earlier and kind is earlier_kind, name
        assert attributes.keys() == earlier_attributes.keys(), name
        assert all(_same(attributes[key], earlier_attributes[key]) for key in attributes), name
    assert tensors.keys() == before[1].keys()
    for name, (tensor, strides, trained, values) in tensors.items():
        earlier, *flags, earlier_values = before[1][name]
        assert tensor is earlier and [strides, trained] == flags, name
        assert torch.equal(values, earlier_values), name


def _attributes(module: nn.Module) -> dict:
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}


def _same(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(one[key] is other[key] for key in one)
    return one is other
