"""How often a pass of the model calls each module that holds weights,
and whether it reads weights past their module."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, slots=True)
class Use:
    """`calls`: how often a module was called in one forward pass of the model, at most. `bypasses`: how many operations
    read its weight in passes that did not call it, nor another module that holds the weight while they ran."""

    calls: int
    bypasses: int


def uses(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Use]:
    """Runs the model once on `inputs`, the arguments of its forward, without gradients.

    Returns:
        by its path, what became of every module that holds a parameter of two dimensions or more.
    """
    with watched(model) as found, torch.no_grad():
        model(**inputs)
    return found


@contextlib.contextmanager
def watched(model: nn.Module, target: nn.Module | None = None) -> Iterator[dict[str, Use]]:
    """Counts uses in every forward pass inside the `with` block;
    the dictionary that it gives is filled when the block ends.

    Args:
        target: the module below `model` whose calls are the passes,
            such as the language model of a multimodal one; by default `model`.
    """
    found: dict[str, Use] = {}
    watch = _Watch(model, target or model)
    try:
        with contextlib.ExitStack() as stack:
            for handle in watch.hooks():
                stack.callback(handle.remove)
            stack.enter_context(watch)
            yield found
    finally:
        watch.end_pass()
        found.update({name: Use(watch.most[name], watch.bypasses[name]) for name in watch.holders})


class _Watch(TorchDispatchMode):
    """Looks at the arguments of every operation for the weights of modules that are not being called."""

    def __init__(self, model: nn.Module, target: nn.Module):
        super().__init__()
        self.target = target
        self.holders: dict[str, nn.Module] = {}
        # By the address of a storage: where in it the weights lie, and who holds them.
        self.weights: dict[int, list[tuple[range, str]]] = defaultdict(list)
        for name, module in model.named_modules(remove_duplicate=False):
            for parameter in module._parameters.values():
                if parameter is not None and parameter.dim() >= 2 and parameter.numel() and _address(parameter):
                    self.holders[name] = module
                    self.weights[_address(parameter)].append((_span(parameter), name))
        self.calls: Counter[str] = Counter()  # in this pass
        self.reads: Counter[str] = Counter()
        self.most: Counter[str] = Counter()  # over all passes
        self.bypasses: Counter[str] = Counter()
        self.running: Counter[nn.Module] = Counter()

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield self.target.register_forward_pre_hook(lambda *_: self.end_pass())
        names: dict[nn.Module, list[str]] = defaultdict(list)
        for name, module in self.holders.items():
            names[module].append(name)
        for module, own in names.items():

            def enter(module, arguments, own=own):
                self.calls.update(own)
                self.running[module] += 1

            def leave(module, arguments, output):
                self.running[module] -= 1

            yield module.register_forward_pre_hook(enter, prepend=True)
            yield module.register_forward_hook(leave, always_call=True)

    def end_pass(self) -> None:
        self.most |= self.calls
        self.bypasses.update({name: count for name, count in self.reads.items() if not self.calls[name]})
        self.calls.clear()
        self.reads.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and (near := self.weights.get(_address(tensor))):
                span = _span(tensor)
                read = [name for weight, name in near if weight.start < span.stop and span.start < weight.stop]
                if not any(self.running[self.holders[name]] for name in read):
                    self.reads.update(read)
        return func(*args, **(kwargs or {}))


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor's storage lies in memory; 0 if nowhere."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided and tensor.device.type != "meta" else 0


def _span(tensor: torch.Tensor) -> range:
    """The elements that a tensor takes of its storage."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return range(tensor.storage_offset(), tensor.storage_offset() + last + 1)
