"""Running a model as `generate` does, step by step."""

import inspect

import torch
from torch import nn

from hasten.acceleration.caches import caches


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, parts: list[int], **first) -> torch.Tensor:
    """Logits [B, T, V]: a prefill of parts[0] tokens of `ids` [B, T], then the other parts with the cache. The prefill
    takes other arguments `first`, such as pictures."""
    outputs, cache = [], first
    for part in ids.split(parts, 1):
        output = model(input_ids=part, use_cache=True, **cache)
        names = ("past_key_values", "cache_params")
        cache = {name: getattr(output, name) for name in names if getattr(output, name, None) is not None}
        outputs.append(output.logits)
    return torch.cat(outputs, 1)


def decode_logits(model: nn.Module, ids: torch.Tensor, prefix: int, **first) -> torch.Tensor:
    """The same for a prefill of `prefix` tokens and then single ones."""
    return logits(model, ids, [prefix] + [1] * (ids.shape[1] - prefix), **first)


@torch.no_grad()
def read(model: nn.Module, ids: torch.Tensor, parts: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """The same with positions of its own for every row, where the model takes them, and padding where `mask` [B, T] has
    zeros."""
    takes = inspect.signature(model.forward).parameters
    outputs, cache, end = [], {}, 0
    positions = torch.arange(ids.shape[1])[None] if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    for part in ids.split(parts, 1):
        begin, end = end, end + part.shape[1]
        words = {}
        if mask is not None:  # models with states alone take that of the part
            words["attention_mask"] = mask[:, begin if "cache_params" in takes else 0 : end]
        if "position_ids" in takes:
            words["position_ids"] = positions[:, begin:end].expand(ids.shape[0], -1)
        output = model(input_ids=part, use_cache=True, **words, **cache)
        cache = {name: value for name, value in caches(output).items() if name in takes}
        outputs.append(output.logits)
    return torch.cat(outputs, 1)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest relative distance of two rows of logits."""
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).max())


def relative_error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())
