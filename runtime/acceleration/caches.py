"""What a model keeps between the steps of one text: under which names, whether it is filled, and copies of it."""

import copy
from collections.abc import Collection, Mapping

import torch
from transformers import Cache

# Arguments that take a cache; an output carries it under the same name.
CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")


def caches(output) -> dict[str, object]:
    """The caches among an output's values, or among arguments."""
    found = {name: output.get(name) if isinstance(output, Mapping) else getattr(output, name, None) for name in CACHES}
    return {name: value for name, value in found.items() if value is not None}


def is_filled(cache: object) -> bool:
    """Whether a model has written into a cache; caches that are no lists of layers are the model's own."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    return layers is None or any(getattr(layer, "is_initialized", True) for layer in layers)


def with_own_entries(value: object, layers: Collection[int]) -> object:
    """A copy of a cache whose entries for `layers`, all if there are none, are copies, so that a call can be repeated;
    that of a list of tensors, in which RWKV keeps its state; anything else as it is."""
    if isinstance(value, list) and all(isinstance(entry, torch.Tensor) for entry in value):
        return [entry.clone() for entry in value]
    if not isinstance(value, Cache):
        return value
    other = copy.copy(value)
    for name, held in vars(value).items():
        if isinstance(held, list):
            held = [copy.deepcopy(entry) if not layers or i in layers else entry for i, entry in enumerate(held)]
        elif isinstance(held, dict):
            held = dict(held)
        setattr(other, name, with_own_entries(held, layers))  # a cache of an encoder-decoder holds two
    return other


def entries(value: object, layers: Collection[int]) -> list:
    """What a cache keeps for `layers`, all if there are none; nothing of anything else."""
    if not isinstance(value, Cache):
        return []
    found = []
    for held in vars(value).values():
        kept = [entry for i, entry in enumerate(held if isinstance(held, list) else []) if not layers or i in layers]
        found += [entry if isinstance(entry, torch.Tensor) else getattr(entry, "__dict__", None) for entry in kept]
        found += entries(held, layers)
    return found
