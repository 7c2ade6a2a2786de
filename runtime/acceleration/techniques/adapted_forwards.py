"""What the adapters of linear-attention layers share: a forward made anew with other functions in it, and the arguments
that no adapter computes.

An adapter has the name, the arguments and the side effects of the function that it replaces.
"""

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

# Layers pass along what their model was called with, and functions are told how to go about it. What is neither an
# argument of the adapter nor in IGNORED must be None, for it is not computed.
IGNORED = (
    *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "num_items_in_batch"),
    *("position_ids", "position_embeddings", "chunk_size", "use_mambapy", "use_associative_scan"),
)
PACKED = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def remade(**replacements: Callable) -> Callable[[nn.Module], Callable]:
    """Makes the forward of a layer anew, calling `replacements` instead of the functions of those names."""

    def make(layer: nn.Module) -> Callable:
        stock = inspect.unwrap(type(layer).forward)
        # Without a name for the module, torch.compile too reads these globals and not those of the module.
        scope = {name: value for name, value in stock.__globals__.items() if name != "__name__"} | replacements
        made = FunctionType(stock.__code__, scope, stock.__name__, stock.__defaults__, stock.__closure__)
        made.__kwdefaults__ = stock.__kwdefaults__
        return made

    return make


def refuse_others(others: Mapping[str, Any]) -> None:
    """Raises ValueError for an argument that nothing computes, but for None and what no output depends on."""
    refuse_packed(others)
    for name, value in others.items():
        if value is not None and name not in IGNORED:
            raise ValueError(f"hasten's kernel for this layer does not compute {name}, got {value!r}: revert the model")


def refuse_packed(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for an argument that says where packed sequences begin."""
    for name in PACKED:
        if arguments.get(name) is not None:
            reason = f"packed sequences ({name}) are not kept apart by linear-attention layers"
            raise ValueError(f"{reason}: pass them as rows of a batch")


def check_state(name: str, state: torch.Tensor, expected: list[int]) -> None:
    """Raises ValueError unless a cached state has the shape that this layer writes."""
    if list(state.shape) != expected:
        raise ValueError(
            f"the {name} in the cache: expected shape {expected}, got shape {list(state.shape)}, as of another model "
            "or batch: pass a cache that this model filled"
        )
