"""The passes of a batched denoiser call: taking some of them out of its inputs, and filling its outputs up again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hasten.guidance.diffusion.guide import Pass


def split(output: Any, passes: Sequence[Pass]) -> dict[Pass, Any]:
    """The share of each pass in a tensor [passes * B, ...] or a list of passes * B entries."""
    size = len(output) // len(passes)
    return {name: output[i * size : (i + 1) * size] for i, name in enumerate(passes)}


def take(inputs: Any, rows: int, order: Sequence[Pass], kept: Sequence[Pass], lists: bool) -> Any:
    """The inputs of a denoiser call, where everything that holds `rows` rows, or a multiple, is left with those of the
    kept passes.

    Args:
        inputs: tensors in nested tuples, lists and dicts. Rows lie along the first dimension of tensors, or with
            `lists` along lists too.
        rows: how many the call has, the passes of `order` one after the other.
    """
    if len(kept) == len(order):
        return inputs

    def chosen(value: Any) -> Any:
        if len(value) % rows:
            return value
        parts = split(value, order)
        return _join([parts[name] for name in kept])

    return _map(chosen, inputs, lists)


def fill(outputs: Any, order: Sequence[Pass], kept: Sequence[Pass]) -> Any:
    """The output of the kept passes, a tensor or a list of rows; others are filled with the conditional rows."""
    if len(kept) == len(order):
        return outputs
    parts = split(outputs, kept)
    return _join([parts.get(name, parts["conditional"]) for name in order])


def fill_all(outputs: Any, order: Sequence[Pass], kept: Sequence[Pass]) -> Any:
    """`fill` of every tensor in nested tuples, lists and dicts."""
    return _map(lambda tensor: fill(tensor, order, kept), outputs, lists=False)


def _join(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else [row for part in parts for row in part]


def _map(function: Callable[[Any], Any], value: Any, lists: bool) -> Any:
    """`function` of every tensor that has a first dimension; with `lists` of every list instead of its entries."""
    if isinstance(value, torch.Tensor):
        return function(value) if value.ndim else value
    if isinstance(value, list) and lists:
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map(function, item, lists) for item in value)
    if isinstance(value, dict):
        return {name: _map(function, item, lists) for name, item in value.items()}
    return value
