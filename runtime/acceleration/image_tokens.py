"""Which tokens of a prompt stand for images and videos, and how a model passes them through its decoder."""

import inspect
from dataclasses import dataclass

import torch
from torch import nn

from hasten.acceleration.parts import is_stock, kind_of
from hasten.errors import Refusal, UnsupportedModelError

# Beginnings and ends of the fields of configurations that hold the id of the token in place of which an image stands.
IMAGES, ENDS = ("image_token", "video_token", "image_patch"), ("_id", "_index", "_token")
# Fields of configurations that list the places from which features of the image are added to the first decoder layers.
DEEP_STACKS = ("deepstack_visual_indexes", "deepstack_layer_map")


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """The image-token span of a model's prompts, and the decoder layers that it passes.

    Attributes:
        ids: the tokens that stand for a piece of an image or video; `video_ids` are those of videos alone.
        layers: the decoder layers by their paths, in order.
        attentions: for each layer, the path of its self-attention, which calls the attention function that the
            configuration names; None where it has none.
        deep_stack: how many of the first layers get features of the image added to what they return.
    """

    ids: tuple[int, ...]
    video_ids: tuple[int, ...]
    layers: dict[str, nn.Module]
    attentions: tuple[str | None, ...]
    deep_stack: int


def image_token_ids(config, beginnings: tuple[str, ...] = IMAGES) -> tuple[int, ...]:
    """The ids of the tokens in place of which images and videos stand, as a configuration names them in fields whose
    names begin like these."""
    named = {
        name: value
        for name, value in vars(config).items()
        if name.startswith(beginnings) and name.endswith(ENDS) and type(value) is int and value >= 0
    }
    return tuple(dict.fromkeys(named.values()))


def deep_stack(config) -> int:
    """How many of the first decoder layers get features of the image."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    lists = [value for part in parts for name in DEEP_STACKS if (value := getattr(part, name, None))]
    return max((_depth(value) for value in lists), default=0)


def _depth(places: list) -> int:
    """Of a list of places in the vision tower, its length; of pairs (place, layer), the layers up to the last one."""
    if isinstance(places[0], list | tuple):
        return max(layer for _, layer in places) + 1
    return len(places)


def attentions_below(module: nn.Module) -> list[str]:
    """The paths below a module of self-attentions that call the function that their configuration names."""
    return [
        name
        for name, below in module.named_modules()
        if hasattr(below, "config")
        and "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(below).forward).__code__.co_names
        and "cross" not in name
    ]


def image_tokens(model: nn.Module, layers: dict[str, nn.Module]) -> ImageTokens:
    """The image tokens of a model with these decoder layers.

    Raises:
        UnsupportedModelError: its configuration names no token for images, or a layer attends to the image itself.
    """
    ids = image_token_ids(model.config)
    if not ids:
        kind = getattr(model.config, "model_type", None)
        reason = f"its configuration names no token in place of which an image stands (its model_type is {kind!r})"
        raise UnsupportedModelError("", type(model).__qualname__, reason, "pass a model that reads images as tokens")
    if getattr(model.config, "is_encoder_decoder", False):
        reason = "its encoder reads the image, and its decoder attends to all that the encoder returns"
        raise UnsupportedModelError("", type(model).__qualname__, reason, "pass a model that reads images as tokens")
    for name, layer in layers.items():
        if crossing := next((path for path, _ in layer.named_modules() if "cross" in path or "encoder" in path), None):
            reason = f"{crossing} attends to the image or to an encoder, not to tokens in the place of an image"
            raise UnsupportedModelError(name, kind_of(layer), reason, "pass a model that reads images as tokens")
    attentions = tuple(
        f"{name}.{below[0]}" if (below := attentions_below(layer)) else None for name, layer in layers.items()
    )
    return ImageTokens(
        ids, image_token_ids(model.config, ("video_token",)), layers, attentions, deep_stack(model.config)
    )


def refusal(images: ImageTokens, index: int, implementation: str | None) -> Refusal | None:
    """Why tokens cannot be left out in a decoder layer, under the attention function of this name; None where they can.

    Args:
        index: the number of the layer.
    """
    name, path = list(images.layers)[index], images.attentions[index]
    layer, implementation = images.layers[name], implementation or ""
    below = dict(layer.named_modules())
    reason, remedy = None, "drop behind it, or leave the model as it is"
    if not is_stock(layer):
        reason = "it is no layer of a model in transformers, and may look at more than the tokens it is given"
    elif hooked := next((path for path, module in below.items() if hasattr(module, "_hf_hook")), None):
        reason = f"hooks of accelerate move the inputs of {hooked or 'the layer'} between devices"
        remedy = "load the whole model into the memory of one device"
    elif "forward" in vars(layer):
        reason, remedy = "its forward was replaced on the instance", "put the forward of its class back first"
    elif _device(layer) != _device(next(iter(images.layers.values()))):
        reason = f"it is on {_device(layer)}, the first layer on {_device(next(iter(images.layers.values())))}"
        remedy = "move the model to one device"
    elif mixer := next((path for path, module in below.items() if isinstance(module, nn.Conv1d)), None):
        reason = f"{mixer} mixes each token with those right before it, and would mix in others were these left out"
    elif indexer := next((path for path in below if "indexer" in path), None):
        reason = f"{indexer} picks among the entries of the cache by their places, which change where some are left out"
    elif sharing := next((path for path in below if getattr(below[path], "is_kv_shared_layer", False)), None):
        reason = f"{sharing} attends to the keys of an earlier layer, which may have seen other tokens"
    elif path is None:
        reason = "it has no self-attention that calls the function that its configuration names"
    elif implementation == "flex_attention":
        reason = "flex_attention takes block masks, which cannot be cut to some of the tokens"
        remedy = "load the model with attn_implementation='sdpa'"
    elif "flash" in implementation and getattr(below[path.removeprefix(f"{name}.")], "sliding_window", None):
        reason = (
            f"the sliding window of {implementation} counts entries of the cache, not the tokens that were left out"
        )
        remedy = "load the model with attn_implementation='sdpa'"
    return None if reason is None else Refusal(name, kind_of(layer), reason, remedy)


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device
