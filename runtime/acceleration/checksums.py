"""Checksums of weights."""

import zlib
from collections.abc import Iterable

import torch
from torch import nn

SAMPLES = 64


def sampled(model: nn.Module) -> int:
    """A checksum over the names and shapes of all parameters and SAMPLES values of each: tells models of equal shapes apart, in milliseconds."""
    checksum = 0
    for name, weight in model.named_parameters():
        values = weight.detach()
        if not values.is_contiguous():
            values = values.contiguous()
        flat = values.reshape(-1)
        checksum = _add(checksum, f"{name}{tuple(weight.shape)}", flat[:: max(1, flat.numel() // SAMPLES)])
    return checksum


def full(tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
    """A checksum over the names, shapes, dtypes and values of tensors, in row order."""
    checksum = 0
    for name, tensor in tensors:
        checksum = _add(checksum, f"{name}{tuple(tensor.shape)}{tensor.dtype}", tensor.detach())
    return checksum


def _add(checksum: int, label: str, values: torch.Tensor) -> int:
    rows = values.contiguous().cpu()
    rows = rows.view(torch.uint8) if rows.dim() else rows.reshape(1).view(torch.uint8)
    return zlib.crc32(rows.numpy(), zlib.crc32(label.encode(), checksum))
