"""Checksums of weights and of files."""

import hashlib
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import nn

SAMPLES = 64
PIECE = 1 << 24  # bytes


def sampled(model: nn.Module) -> int:
    """A checksum over the names and shapes of all parameters and SAMPLES values of each: tells models of equal shapes
    apart, in milliseconds."""
    checksum = 0
    for name, weight in model.named_parameters():
        values = weight.detach()
        if not values.is_contiguous():
            values = values.contiguous()
        values = values.reshape(-1)
        values = values[:: max(1, values.numel() // SAMPLES)].contiguous().cpu().view(torch.uint8)
        checksum = zlib.crc32(values.numpy(), zlib.crc32(f"{name}{tuple(weight.shape)}".encode(), checksum))
    return checksum


def of_files(paths: Iterable[Path]) -> dict[str, str]:
    """A digest of every file, by its name: the SHA-256 of the SHA-256 digests of its pieces of PIECE bytes, which are
    read in parallel."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        pieces = {
            path.name: pool.map(partial(_piece, path), range(0, max(1, path.stat().st_size), PIECE)) for path in paths
        }
        return {name: hashlib.sha256(b"".join(digests)).hexdigest() for name, digests in pieces.items()}


def _piece(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(PIECE)).digest()
