"""The contract of a technique: what `acceleration` asks of it, whatever kind it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils.hooks import RemovableHandle

from hasten.acceleration.edits import Edit
from hasten.errors import SavedPlanError

if TYPE_CHECKING:
    from hasten.acceleration.anatomy import Anatomy
    from hasten.acceleration.statistics import Statistics


@dataclass(frozen=True, slots=True)
class Settings:
    """What a technique decided for one model, as it is saved.

    Args:
        values: plain JSON.
        tensors: tensors by name.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Regime:
    """A condition under which a model is timed: a prefill of `tokens` tokens, or one decode step (`tokens` 1) after
    `context` tokens. Of the prompt, `image` tokens stand for an image."""

    batch: int = 1
    tokens: int = 1
    context: int = 0
    image: int = 0

    def __str__(self) -> str:
        rows = f", batch {self.batch}" if self.batch > 1 else ""
        image = f", {self.image} of an image" if self.image else ""
        if self.tokens == 1:
            return f"decode{rows}, after {self.context} tokens{image}"
        return f"prefill of {self.tokens} tokens{image}{rows}" + (f", after {self.context}" if self.context else "")


DECODE, PREFILL = Regime(context=128), Regime(tokens=128)


@dataclass(frozen=True, slots=True)
class Skip:
    """A part that was left as it was, and why."""

    name: str
    reason: str


class Technique(ABC):
    """The base of all techniques, which are frozen dataclasses whose fields are their whole configuration.

    Attributes:
        exact: predictions change by rounding only.
        calibrated: it listens to a calibration pass, and cannot do without.
        yields: it takes only what no other technique of the plan targets.
        of_images: it changes predictions for prompts with an image alone, so drift is measured on such.
        portable: its settings hold on any machine, and are saved; else it settles anew when a folder is loaded.
        implies: techniques that are carried out after the plan unless the plan has one of their class.
    """

    __slots__ = ()
    exact: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    yields: ClassVar[bool] = False
    of_images: ClassVar[bool] = False
    portable: ClassVar[bool] = True
    known: ClassVar[dict[str, type[Technique]]] = {}

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        other = Technique.known.get(cls.__name__, cls)
        places = [f"{kind.__module__}.{kind.__qualname__}" for kind in (cls, other)]
        # A notebook's cell that runs again has the same place; `dataclass(slots=True)` makes the class anew, and names
        # its place afterwards.
        if places[0] != places[1] and "__dataclass_fields__" not in vars(cls):
            raise TypeError(
                f"{places[0]} has the name of another technique, {places[1]}: plans tell techniques by their names, so "
                "give it another"
            )
        Technique.known[cls.__name__] = cls

    @property
    def implies(self) -> tuple[Technique, ...]:
        return ()

    @abstractmethod
    def targets(self, anatomy: Anatomy) -> tuple[str, ...]:
        """The names of the parts that it changes; no other technique may change them too.

        Raises:
            UnsupportedModelError: there is nothing that it could change.
        """

    def listen(self, anatomy: Anatomy, statistics: Statistics) -> Iterable[RemovableHandle]:
        """Puts hooks on the model that gather what it needs into `statistics.of(self)` during the calibration pass."""
        return ()

    def settle(self, anatomy: Anatomy, statistics: Statistics) -> Settings:
        """Decides for this model. Changes nothing."""
        return Settings()

    def read(self, saved: Settings, anatomy: Anatomy) -> Settings:
        """Settings as they were saved, validated.

        Raises:
            SavedPlanError: they are not what this technique would have written for this model.
        """
        if saved.values or saved.tensors:
            raise SavedPlanError(
                f"{type(self).__name__} has no settings, got {sorted([*saved.values, *saved.tensors])}"
            )
        return saved

    @abstractmethod
    def edits(self, anatomy: Anatomy, settings: Settings) -> list[Edit]:
        """The changes that carry it out, in order."""

    def skips(self, anatomy: Anatomy, settings: Settings) -> list[Skip]:
        """What it could have changed and leaves, and why."""
        return []

    def summary(self, settings: Settings) -> str:
        """What it decided, in a few words for the report."""
        return ""

    def regimes(self, anatomy: Anatomy) -> tuple[Regime, ...]:
        """The conditions under which it must be timed."""
        return (DECODE, PREFILL)
