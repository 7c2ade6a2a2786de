"""The state that a model must be in before it is changed."""

from torch import nn

from hasten.errors import StateError, UnsupportedModelError


def refuse_unready(model: nn.Module) -> None:
    """Refuses what is no plain model in eval mode, and what is accelerated already.

    Raises:
        TypeError, UnsupportedModelError, StateError: as `hasten.accelerate`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {model!r}")
    if hasattr(model, "_orig_mod") or isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        kind = type(model).__qualname__
        raise UnsupportedModelError(
            "", kind, "it wraps a model", "accelerate the model itself, and compile or wrap it afterwards"
        )
    for name, module in model.named_modules():
        if "_hasten" in vars(module):
            raise StateError(f"{name or 'the model'} is accelerated already: call hasten.revert on it first")
    if model.training:
        raise StateError("the model is in training mode: call model.eval() first")
