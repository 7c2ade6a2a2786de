"""Facts about a language model that several wings need, and the progress bar that they all show."""

import contextlib
import os
import sys

import torch
from torch import nn
from tqdm.auto import tqdm


def vocabulary(model: nn.Module) -> int:
    """The number of token ids that the model embeds: 0 to one less."""
    embeddings = None
    with contextlib.suppress(NotImplementedError):
        embeddings = model.get_input_embeddings()
    return getattr(embeddings, "num_embeddings", 0) or model.config.get_text_config(decoder=True).vocab_size


def longest_input(model: nn.Module) -> int:
    """The number of positions that the model was made for; `sys.maxsize` where its configuration names none."""
    config = model.config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_target_positions")
    positions = next((getattr(config, name) for name in names if getattr(config, name, None)), 0)
    return positions if positions > 0 else sys.maxsize  # XLNet, without such a limit, has -1


def cache_of(output) -> dict[str, object]:
    """The cache in a model's output, by the name of the argument that takes it: Mamba-2 calls it `cache_params`."""
    name = "past_key_values" if hasattr(output, "past_key_values") else "cache_params"
    return {name: getattr(output, name)}


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter that is in memory; the CPU where all are offloaded."""
    devices = (parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    return next(devices, torch.device("cpu"))


def synchronize(device: torch.device) -> None:
    """Waits until `device` has finished what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def progress(items, description: str, unit: str = "it", total: int | None = None):
    """`items` with a progress bar: on a terminal only, and off with HASTEN_DISABLE_PROGRESS=1."""
    disabled = True if os.environ.get("HASTEN_DISABLE_PROGRESS", "0") not in ("", "0") else None
    return tqdm(items, desc=description, unit=unit, total=total, disable=disabled, leave=False)
