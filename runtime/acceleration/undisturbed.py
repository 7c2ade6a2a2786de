"""Runs of a model that neither depend on what it remembers of earlier inputs nor change that."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

# Attributes in which models remember something of their last inputs, with what stands there before the first.
REMEMBERED = {"rope_deltas": None}


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A block in which the model is run as if it had read nothing before, and after which it remembers what it did.

    Put back are buffers and submodules that a run replaces, and attributes that are tensors, numbers or words, such as
    `rope_deltas` of multimodal rotary positions or BigBird's kind of attention. Not for blocks that change the model.
    """
    kept = [(module, _memory(module), dict(module._buffers), dict(module._modules)) for module in model.modules()]
    try:
        for module, attributes, _, _ in kept:
            for name in REMEMBERED.keys() & attributes.keys():
                setattr(module, name, REMEMBERED[name])
        yield
    finally:
        for module, attributes, buffers, modules in kept:
            for name in _memory(module).keys() - attributes.keys():
                delattr(module, name)
            vars(module).update(attributes)
            for now, before in ((module._buffers, buffers), (module._modules, modules)):
                now.clear()
                now.update(before)


def _memory(module: nn.Module) -> dict[str, object]:
    """The attributes of a module that may hold something of its last inputs;
    flags and private ones are its own state."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and (value is None or type(value) in (int, float, str, torch.Tensor))
    }
