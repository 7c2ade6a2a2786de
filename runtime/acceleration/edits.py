"""Reversible changes to a model, and their undoing."""

import contextlib
import ctypes
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from hasten.acceleration.forwards import NO_GRADIENTS, Forward
from hasten.errors import StateError, UnsupportedModelError
from hasten.kernels.transpose import transpose


@dataclass(slots=True)
class Verification:
    """What `Edit.verify` saw: calls, the dtype of their outputs, the largest relative distance of what they wrote from
    its definition, and whether the definition itself overflowed."""

    name: str
    dtype: torch.dtype | None = None
    calls: int = 0
    distance: float = 0.0
    finite: bool = True

    def add(self, written: Any, expected: Any) -> None:
        """A call: what it wrote, the output first, in any containers of tensors, and what it should have written."""
        pairs = list(zip(_floats(written), _floats(expected), strict=True))
        self.calls += 1
        self.dtype = pairs[0][0].dtype
        for output, definition in pairs:
            self.finite &= bool(definition.isfinite().all())
            distance = float((output - definition).float().norm() / definition.float().norm().clamp(min=1e-30))
            if not math.isnan(self.distance) and not distance <= self.distance:  # a NaN counts, and stays
                self.distance = distance


def _floats(written: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(written) if isinstance(value, torch.Tensor) and value.is_floating_point()]


class Edit:
    """One reversible change of the part of a model called `name`."""

    name: str

    @property
    def part(self) -> str | None:
        """The name of the part that computes otherwise from now on, None where the edit only prepares."""
        return None

    def apply(self, model: nn.Module) -> None:
        raise NotImplementedError

    def check(self, model: nn.Module) -> None:
        """Raises `StateError` where `undo` would restore the wrong thing."""

    def check_weights(self) -> None:
        """Raises `StateError` where the weights are not those that it was made for."""

    def accept_weights(self) -> None:
        """Takes the weights to be those that it was made for, though another edit may have stored them anew."""

    def undo(self, model: nn.Module) -> None:
        """Undoes `apply`, also one that was interrupted; may be repeated."""
        raise NotImplementedError

    @contextlib.contextmanager
    def verify(self, model: nn.Module) -> Iterator[Verification | None]:
        """While open, every call of what was installed is computed by its definition too.
        None where nothing computes."""
        yield None

    @contextlib.contextmanager
    def count(self, add: Callable[[tuple[int, int]], None]) -> Iterator[None]:
        """While open, `add` gets (active inputs, inputs) of every call that could skip some."""
        yield


@dataclass(slots=True)
class ReplaceForward(Edit):
    """Gives the module called `name` the forward `make(module, name)`."""

    name: str
    make: Callable[[nn.Module, str], Forward]
    module: nn.Module | None = None
    forward: Forward | None = None

    @property
    def part(self) -> str:
        return self.name

    def apply(self, model: nn.Module) -> None:
        self.module = model.get_submodule(self.name)
        self.forward = self.make(self.module, self.name)
        self.module.forward = self.forward

    def check(self, model: nn.Module) -> None:
        try:
            present = model.get_submodule(self.name)
        except AttributeError:
            raise StateError(
                f"{self.name} was removed after hasten.accelerate: put it back, then hasten.revert(model)"
            ) from None
        if present is not self.module:
            raise StateError(
                f"{self.name} was replaced by a {type(present).__qualname__} after hasten.accelerate: put back the "
                f"{type(self.module).__qualname__} that stood there, then hasten.revert(model)"
            )
        if vars(present).get("forward") is not self.forward:
            raise StateError(
                f"the forward of {self.name} was replaced after hasten.accelerate: undo that, then hasten.revert(model)"
            )

    def check_weights(self) -> None:
        if self.forward.watch is not None:
            self.forward.watch.check(self.forward.weights(), thorough=True)

    def accept_weights(self) -> None:
        if self.forward.watch is not None:
            self.forward.watch.restart()

    def undo(self, model: nn.Module) -> None:
        if self.module is not None:
            vars(self.module).pop("forward", None)

    @contextlib.contextmanager
    def verify(self, model: nn.Module) -> Iterator[Verification]:
        seen = Verification(self.name)

        def both(*arguments, **keywords):
            words = self.forward.words(keywords)
            if self.forward.is_own(*arguments, **words):
                with _stock_inside(self.module):
                    seen.add(*self.forward.beside_definition(*arguments, **words))
            return self.forward(*arguments, **keywords)

        self.module.forward = both
        try:
            yield seen
        finally:
            self.module.forward = self.forward

    @contextlib.contextmanager
    def count(self, add: Callable[[tuple[int, int]], None]) -> Iterator[None]:
        def listen(module, arguments, keywords):
            if found := self.forward.active(*arguments, **self.forward.words(keywords)):
                add(found)

        handle = self.module.register_forward_pre_hook(listen, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@contextlib.contextmanager
def _stock_inside(module: nn.Module) -> Iterator[None]:
    """While open, the modules inside `module` run the forwards of their classes: what they skip hangs on the last bit
    of their inputs, so that two calls of `module` would not be comparable."""
    inside = [inner for inner in module.modules() if inner is not module and "forward" in vars(inner)]
    forwards = [vars(inner).pop("forward") for inner in inside]
    try:
        yield
    finally:
        for inner, forward in zip(inside, forwards, strict=True):
            inner.forward = forward


@dataclass(slots=True)
class StoreColumnMajor(Edit):
    """Stores a parameter [..., N, K] column by column, in place: it stays the same object, and is kept once."""

    name: str
    strides: tuple[int, ...] | None = None  # as it was stored

    def apply(self, model: nn.Module) -> None:
        weight = model.get_parameter(self.name)
        strides = weight.stride()
        weight.data = transpose(weight.data).mT
        self.strides = strides

    def undo(self, model: nn.Module) -> None:
        weight = model.get_parameter(self.name)
        if self.strides is not None and weight.stride() != self.strides:
            rows = transpose(weight.data.mT)
            if rows.stride() != self.strides:  # of a dimension of one element
                rows = torch.empty_strided(rows.shape, self.strides, dtype=rows.dtype, device=rows.device).copy_(rows)
            weight.data = rows


@dataclass(slots=True)
class Freeze(Edit):
    """Lets no parameter require grad, for hasten's kernels have no gradients, and refuses to run the model where one
    does again; `undo` lets those require grad that did.

    The head reads the last row of a prompt, a slice of the hidden states. For such strides torch copies the whole
    weight, if that does not require grad; hence the head gets a tensor with strides of its own.
    """

    name: str = ""
    trained: list[str] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)

    def apply(self, model: nn.Module) -> None:
        self.handles.append(model.register_forward_pre_hook(refuse_thawed))
        head = model.get_output_embeddings()
        if isinstance(head, nn.Linear):
            self.handles.append(head.register_forward_pre_hook(in_one_piece, with_kwargs=True))
        self.trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        for name in self.trained:
            model.get_parameter(name).requires_grad_(False)

    def undo(self, model: nn.Module) -> None:
        for name in self.trained:
            model.get_parameter(name).requires_grad_(True)
        for handle in self.handles:
            handle.remove()


def in_one_piece(module: nn.Linear, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook that gives the input the strides of a new tensor; a single row is contiguous with others."""
    if arguments:
        return (_reshaped(arguments[0]), *arguments[1:]), keywords
    return arguments, {name: _reshaped(value) if name == "input" else value for name, value in keywords.items()}


def _reshaped(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).view(x.shape)


def refuse_thawed(model: nn.Module, arguments: tuple) -> None:
    """A forward pre-hook that raises `StateError` where gradients are wanted that the kernels do not have."""
    if not torch.is_grad_enabled():
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            raise StateError(f"{name} {NO_GRADIENTS}")


@dataclass(slots=True)
class MarkStateful(Edit):
    """Lets transformers know that the model cannot go back in its text,
    so that it refuses assisted decoding and says why."""

    name: str = ""

    def apply(self, model: nn.Module) -> None:
        model._is_stateful = True

    def undo(self, model: nn.Module) -> None:
        vars(model).pop("_is_stateful", None)


class Refused:
    """Stands in for a method that would not do what its caller expects; calling it raises `UnsupportedModelError`."""

    def __init__(self, kind: str, reason: str, remedy: str):
        self.kind, self.reason, self.remedy = kind, reason, remedy

    def __call__(self, *arguments, **keywords):
        raise UnsupportedModelError("", self.kind, self.reason, self.remedy)


@dataclass(slots=True)
class RefuseMethod(Edit):
    """Lets the model's method `method` raise, with the reason, while the model is accelerated."""

    method: str
    reason: str
    remedy: str = "call hasten.revert(model) first"
    name: str = ""

    def apply(self, model: nn.Module) -> None:
        if hasattr(type(model), self.method):
            vars(model).setdefault(self.method, Refused(type(model).__qualname__, self.reason, self.remedy))

    def undo(self, model: nn.Module) -> None:
        if isinstance(vars(model).get(self.method), Refused):
            del vars(model)[self.method]


def apply_all(model: nn.Module, edits: Iterable[Edit], done: list[Edit]) -> None:
    """Applies `edits` in order. Each is in `done` before it begins,
    so that `undo_all` also undoes one that was interrupted."""
    # Tensors made in inference mode could never require grad again, nor count their versions.
    with torch.inference_mode(False), torch.no_grad():
        for edit in edits:
            done.append(edit)
            edit.apply(model)
    for edit in done:
        edit.accept_weights()
    give_memory_back()


def undo_all(model: nn.Module, done: list[Edit]) -> None:
    """Undoes `done` in reverse and empties it. Interrupted, it can be called again:
    an edit leaves `done` when it is undone."""
    with torch.inference_mode(False), torch.no_grad():
        while done:
            done[-1].undo(model)
            done.pop()
    give_memory_back()


def give_memory_back() -> None:
    """Returns to the system what the C allocator keeps of weights that were stored anew."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim:
            trim(0)
