"""What is looked at before a model is changed: its state, and how a short pass uses its modules."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.inference import Inference, Inputs
from hasten.acceleration.undisturbed import undisturbed
from hasten.acceleration.uses import watched
from hasten.errors import StateError, UnsupportedModelError
from hasten.model_facts import longest_input, vocabulary

EXAMINED_TOKENS = 2


def check_flags(flags: Mapping[str, object]) -> None:
    """Raises a `TypeError` that names the first of these arguments that is neither True nor False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def refuse_unready(model: nn.Module) -> None:
    """Refuses what is no plain model of transformers that reads tokens, in eval mode, and what is accelerated already.

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
        for inner, parameter in module.named_parameters(recurse=False):
            # Where accelerate has put a hook, it comes when it is needed.
            if parameter.device.type == "meta" and not hasattr(module, "_hf_hook"):
                remedy = "load the whole model into the memory of one device"
                kind = f"{type(module).__module__}.{type(module).__qualname__}"
                raise UnsupportedModelError(name, kind, f"its {inner} is on the meta device", remedy)
    if not isinstance(model, PreTrainedModel) or not _reads_tokens(model):
        reason = "it embeds no token ids" if isinstance(model, PreTrainedModel) else "it is no model of transformers"
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise UnsupportedModelError("", kind, reason, "pass a transformers model that writes text, a ...ForCausalLM")
    if model.training:
        raise StateError("the model is in training mode: call model.eval() first")


def _reads_tokens(model: PreTrainedModel) -> bool:
    try:
        return bool(vocabulary(model))
    except AttributeError:  # neither an embedding nor a configuration that says how many tokens there are
        return False


def examine(inference: Inference, inputs: Inputs | None = None) -> Anatomy:
    """The anatomy of the model that `inference` runs, with the uses of its modules in a prefill of the first
    tokens of `inputs` and a decode step.

    Raises:
        UnsupportedModelError: the model cannot be run.
    """
    model = inference.model
    if inputs is None:
        inputs = torch.zeros(1, EXAMINED_TOKENS, dtype=torch.int64)
    tokens = min(EXAMINED_TOKENS, longest_input(model) - 1)
    inputs = inference.cut(inputs, max(tokens, inference.shortest_prefix(inputs)))
    with watched(model, inference.target) as found, undisturbed(model):
        _, reading = inference.prefill(inputs)
        inference.step(reading, reading.ids[:, -1:])
    return Anatomy(model, found)
