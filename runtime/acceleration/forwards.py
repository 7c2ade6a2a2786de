"""What stands in for the forward of a module while a model is accelerated.

The module stays the object that it was, with its class, parameters, hooks and names; a `Forward` lies on the instance
as its `forward`, and is copied and pickled with it.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hasten.acceleration.caches import entries, with_own_entries
from hasten.errors import StateError
from hasten.kernels import backend
from hasten.kernels.column_sparse_linear import column_sparse_linear
from hasten.kernels.linear import linear

NO_GRADIENTS = (
    "requires grad since hasten.accelerate, and hasten's kernels have no gradients: call "
    "model.requires_grad_(False), run under torch.no_grad(), or train after hasten.revert(model)"
)


class Forward:
    """The forward of one module: `own` for the calls that hasten's kernels run, that of the module's class for others.

    Args:
        module: whose forward it is.
        name: the module's name in the model.

    Attributes:
        renamed: how `own` calls arguments that the class's forward calls otherwise.
        watch: notices changes of `weights()`; None where nothing was derived from any.
    """

    watch: "Watch | None" = None

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name
        theirs, ours = _words(type(module).forward)[1:], _words(self.own)
        self.renamed = {word: own for word, own in zip(theirs, ours, strict=False) if word not in ours}

    def __call__(self, *arguments, **keywords):
        words = self.words(keywords) if keywords else keywords
        own = self.is_own(*arguments, **words)
        if self.watch is not None:
            self.watch.check(self.weights(), thorough=not own)
        if not own:
            return self.dense(*arguments, **keywords)
        try:
            return self.own(*arguments, **words)
        except NotImplementedError as error:
            if not torch.is_grad_enabled():
                raise
            raise StateError(f"weights of {self.name}, or its inputs: something {NO_GRADIENTS}") from error

    def words(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """Keywords that the class's forward takes, by the names that `own`, `is_own` and `active` give them."""
        return {self.renamed.get(word, word): value for word, value in keywords.items()}

    def is_own(self, *arguments, **keywords) -> bool:
        """Whether a call runs `own`."""
        return True

    def own(self, *arguments, **keywords):
        """What a call computes by hasten's kernels."""
        raise NotImplementedError

    def dense(self, *arguments, **keywords):
        """The forward that the module's class has."""
        return type(self.module).forward(self.module, *arguments, **keywords)

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that something was derived from, by their names in the model."""
        return {}

    def tensors(self) -> list[torch.Tensor]:
        """What it holds beside the module's own weights."""
        return [value for value in vars(self).values() if isinstance(value, torch.Tensor)]

    def beside_definition(self, *arguments, **keywords) -> tuple[Any, Any]:
        """What a call of `own` writes, and what it writes by the kernels' definitions in plain torch: outputs first, in
        any containers of tensors, then what it leaves in caches. The arguments are not changed."""
        layers = self.layers(keywords)

        def call():
            own = [with_own_entries(value, layers) for value in arguments]
            words = {name: with_own_entries(value, layers) for name, value in keywords.items()}
            output = self.own(*own, **words)
            return output, [entries(value, layers) for value in (*own, *words.values())]

        written = call()
        with backend.use("reference"):
            return written, call()

    def layers(self, keywords: dict[str, Any]) -> set[int]:
        """The layers whose entries of a cache a call may change, as the module, those inside it or the call name them.
        Empty where none does: then it may change any."""
        named = [getattr(module, "layer_idx", None) for module in self.module.modules()]
        return {layer for layer in (*named, keywords.get("layer_idx")) if isinstance(layer, int) and layer >= 0}

    def active(self, *arguments, **keywords) -> tuple[int, int] | None:
        """How many inputs a call multiplies, and how many there are; None where a call skips nothing by design."""
        return None


def _words(function: Callable) -> list[str]:
    """The parameters of a function that can be given by position and by name, in order."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


def decode_rows(x: torch.Tensor) -> int:
    """The batch size of a decode step, 0 for anything else: x is [B, 1, K], or [1, K] where a model
    flattens its tokens."""
    if x.dim() == 3:
        return x.shape[0] if x.shape[1] == 1 else 0
    return 1 if x.dim() == 2 and x.shape[0] == 1 else 0


class Watch:
    """Notices that a weight was written to, replaced, or moved since thresholds and layout were derived from it.

    Every call compares the version and address of the weights, a prefill on a CPU also samples of their values, for
    writes through `.data` have no version. The stamps are taken at the first check; a copy or a pickle takes its own.
    """

    def __init__(self):
        self.stamps: list[tuple[int, int]] = []  # address and version of each weight
        self.samples: list[torch.Tensor] = []

    def check(self, weights: dict[str, torch.Tensor], thorough: bool) -> None:
        """Raises `StateError` where one of `weights`, by their names, is not what it was."""
        if torch.compiler.is_compiling():
            return
        stamps = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights.values()]
        if not self.stamps:
            self.stamps = stamps
            self.samples = [_sample(weight) for weight in weights.values()]
            return
        changed = [stamp != now for stamp, now in zip(self.stamps, stamps, strict=True)]
        if thorough and not any(changed):
            changed = [
                weight.is_cpu and not torch.equal(_sample(weight), sample)
                for weight, sample in zip(weights.values(), self.samples, strict=True)
            ]
        if any(changed):
            raise StateError(
                f"{list(weights)[changed.index(True)]} was changed after hasten.accelerate: call hasten.revert(model), "
                "which keeps the new weight, and accelerate again"
            )

    def restart(self) -> None:
        """Takes the weights as they are at the next check."""
        self.stamps = []

    def __reduce__(self):
        return Watch, ()


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Some 64 values of a weight of either layout."""
    values = weight.detach()
    if not values.is_contiguous():
        values = values.transpose(-1, -2)
    values = values.reshape(-1)
    return values[:: max(1, values.numel() // 64)].clone()


def matrix(module: nn.Module) -> torch.Tensor:
    """The weight [N, K] of a linear map. `Conv1D` stores it transposed, so that its columns are contiguous."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The dense product by hasten's kernel for the layout of `weight`: x [..., K], weight [N, K] -> [..., N]."""
    if weight.is_contiguous():
        return linear(x, weight, bias)
    return column_sparse_linear(x, weight, None, bias)
