"""Reversible changes to a model, and their undoing."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Protocol

import torch
from torch import nn

from hasten.errors import StateError
from hasten.kernels.storage import is_column_major, to_column_major


class Edit(Protocol):
    """One reversible change. `undo` also undoes an `apply` that was interrupted, and may be repeated; `check` raises `StateError` if it would restore the wrong thing."""

    def apply(self, model: nn.Module) -> None: ...
    def check(self, model: nn.Module) -> None: ...
    def undo(self, model: nn.Module) -> None: ...


@dataclass(slots=True)
class ReplaceModule:
    """Puts `make(old)` in the place of the module called `name`."""

    name: str
    make: Callable[[nn.Module], nn.Module]
    old: nn.Module | None = None
    new: nn.Module | None = None

    def apply(self, model: nn.Module) -> None:
        self.old = model.get_submodule(self.name)
        self.new = self.make(self.old)
        _put(model, self.name, self.new)

    def check(self, model: nn.Module) -> None:
        try:
            present = model.get_submodule(self.name)
        except AttributeError:
            raise StateError(
                f"{self.name} was removed after hasten.accelerate: put it back, then hasten.revert(model)"
            ) from None
        if present is not self.new and present is not self.old:
            raise StateError(
                f"{self.name} was replaced by a {type(present).__qualname__} after hasten.accelerate: "
                f"put back the {type(self.new).__qualname__} that stood there, then hasten.revert(model)"
            )

    def undo(self, model: nn.Module) -> None:
        if self.old is not None:
            if self.new is not None:
                self.old.training = self.new.training
            _put(model, self.name, self.old)


@dataclass(slots=True)
class StoreColumnMajor:
    """Stores the weight of the linear called `name` column by column, in place: the parameter stays the same object, and is kept once."""

    name: str

    def apply(self, model: nn.Module) -> None:
        weight = model.get_submodule(self.name).weight
        weight.data = to_column_major(weight.data)

    def check(self, model: nn.Module) -> None:
        pass

    def undo(self, model: nn.Module) -> None:
        weight = model.get_submodule(self.name).weight
        if is_column_major(weight):
            weight.data = weight.data.contiguous()


@dataclass(slots=True)
class ReplaceForward:
    """Gives the module called `name` a forward of its own, made by `make(module)`; the class, its parameters and its hooks stay as they are."""

    name: str
    make: Callable[[nn.Module], Callable]
    new: MethodType | None = None

    def apply(self, model: nn.Module) -> None:
        module = model.get_submodule(self.name)
        self.new = MethodType(self.make(module), module)
        module.forward = self.new

    def check(self, model: nn.Module) -> None:
        try:
            present = vars(model.get_submodule(self.name)).get("forward")
        except AttributeError:
            raise StateError(
                f"{self.name} was removed after hasten.accelerate: put it back, then hasten.revert(model)"
            ) from None
        if present is not None and getattr(present, "__func__", None) is not self.new.__func__:
            raise StateError(
                f"the forward of {self.name} was replaced after hasten.accelerate: undo that, then hasten.revert(model)"
            )

    def undo(self, model: nn.Module) -> None:
        vars(model.get_submodule(self.name)).pop("forward", None)


@dataclass(slots=True)
class MarkStateful:
    """Lets transformers know that the model cannot go back in its text, so that it refuses assisted decoding and gives that reason."""

    name: str = ""

    def apply(self, model: nn.Module) -> None:
        model._is_stateful = True

    def check(self, model: nn.Module) -> None:
        pass

    def undo(self, model: nn.Module) -> None:
        vars(model).pop("_is_stateful", None)


def apply_all(model: nn.Module, edits: Iterable[Edit], done: list[Edit]) -> None:
    """Applies `edits` in order. Each is in `done` before it begins, so that `undo_all` also undoes one that was interrupted."""
    # Tensors made in inference mode could never require grad again, nor count their versions.
    with torch.inference_mode(False), torch.no_grad():
        for edit in edits:
            done.append(edit)
            edit.apply(model)


def undo_all(model: nn.Module, done: list[Edit]) -> None:
    """Undoes `done` in reverse and empties it. Interrupted, it can be called again: an edit leaves `done` when it is undone."""
    with torch.inference_mode(False), torch.no_grad():
        while done:
            done[-1].undo(model)
            done.pop()


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
