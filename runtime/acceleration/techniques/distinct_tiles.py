"""Distinct tiles: a vision tower computes each tile of a prompt or batch once, however often it comes."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_map

from hasten.acceleration.edits import ReplaceForward
from hasten.acceleration.families import OF_PACKED_PICTURES
from hasten.acceleration.forwards import Forward
from hasten.acceleration.parts import kind_of
from hasten.acceleration.techniques.base import Regime, Technique
from hasten.acceleration.vision_tower import run_unheard, run_with, tower_name
from hasten.errors import UnsupportedModelError
from hasten.sparsity.vision_tokens.duplicates import identical_rows

IMAGE, PROMPT, QUESTIONS = 576, 640, 4  # tokens of an image and of a prompt with it; prompts about one image


@dataclass(frozen=True, slots=True)
class DistinctTiles(Technique):
    """The vision tower runs once for each distinct tile: those that are bit for bit the same are computed once, and
    what the tower returns is repeated for the others. Documents and screenshots have blank tiles, and batches ask
    several questions about one picture. Predictions change by rounding only: by what a product of fewer rows rounds.
    """

    exact: ClassVar[bool] = True

    def targets(self, anatomy):
        model, name = anatomy.model, tower_name(anatomy.model)
        if name is None:
            reason = "it has no vision tower whose tiles could be compared"
            raise UnsupportedModelError("", type(model).__qualname__, reason, "leave DistinctTiles out of the plan")
        tower = model.get_submodule(name)
        if OF_PACKED_PICTURES & inspect.signature(type(tower).forward).parameters.keys():
            reason = "its vision tower reads the patches of all pictures as one sequence"
            raise UnsupportedModelError(name, kind_of(tower), reason, "leave DistinctTiles out of the plan")
        if not anatomy.was_run(name):
            reason = "its vision tower was examined without a picture"
            remedy = "give calibration= as a dictionary that its processor returns for a prompt with a picture"
            raise UnsupportedModelError("", type(model).__qualname__, reason, remedy)
        return (name,)

    def edits(self, anatomy, settings):
        return [ReplaceForward(name, DistinctRows) for name in self.targets(anatomy)]

    def regimes(self, anatomy):
        return tuple(Regime(batch, tokens=PROMPT, image=IMAGE) for batch in (1, QUESTIONS))


class DistinctRows(Forward):
    """The forward of a vision tower on its distinct rows: tiles [N, ...], with every other argument that has a value
    for each row. What it returns, tensors [N, ...] in any containers, has all rows again."""

    def is_own(self, *arguments, **keywords) -> bool:
        tensors = _tensors(arguments, keywords)
        if not tensors or tensors[0].dim() < 3:  # patches of all pictures in flat rows
            return False
        trained = (*tensors, *self.module.parameters()) if torch.is_grad_enabled() else ()
        return not any(tensor.requires_grad for tensor in trained)

    def own(self, *arguments, **keywords):
        of_rows = [tensor for tensor in _tensors(arguments, keywords) if _rows(tensor) == _count(arguments, keywords)]
        unique, inverse = _distinct(of_rows)
        if len(unique) == len(inverse):
            return self.dense(*arguments, **keywords)
        arguments, keywords = _of_rows(lambda tensor: tensor[unique], arguments, keywords)
        with run_with(inverse):
            output = self.dense(*arguments, **keywords)
        return tree_map(lambda value: self._repeated(value, len(unique), inverse), output)

    def _repeated(self, value: Any, count: int, inverse: torch.Tensor) -> Any:
        """A value of what the tower returned for `count` rows, for all rows."""
        if value is None:
            return None
        if not isinstance(value, torch.Tensor) or _rows(value) != count:
            found = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__qualname__
            reason = f"for {count} tiles it returns {found}, which has no row for each"
            raise UnsupportedModelError(self.name, kind_of(self.module), reason, "leave DistinctTiles out of the plan")
        return value.index_select(0, inverse)

    def beside_definition(self, *arguments, **keywords):
        """A call with every row twice, so that there are some to leave out, and the tower's own forward of the same."""
        arguments, keywords = _of_rows(lambda tensor: torch.cat([tensor, tensor]), arguments, keywords)
        with run_unheard():
            return self.own(*arguments, **keywords), self.dense(*arguments, **keywords)


def _distinct(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`identical_rows` of several tensors [N, ...] side by side."""
    if len(tensors[0]) < 2:
        none = torch.arange(len(tensors[0]), device=tensors[0].device)
        return none, none
    found = [identical_rows(tensor) for tensor in tensors]
    return found[0] if len(found) == 1 else identical_rows(torch.stack([inverse for _, inverse in found], 1))


def _tensors(arguments: tuple, keywords: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in (*arguments, *keywords.values()) if isinstance(value, torch.Tensor)]


def _rows(tensor: torch.Tensor) -> int | None:
    return len(tensor) if tensor.dim() else None


def _count(arguments: tuple, keywords: dict[str, Any]) -> int:
    """How many tiles a call has: the rows of its first tensor."""
    return len(_tensors(arguments, keywords)[0])


def _of_rows(
    change: Callable[[torch.Tensor], torch.Tensor], arguments: tuple, keywords: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call, changed where they have a value for each row."""
    count = _count(arguments, keywords)

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, torch.Tensor) and _rows(value) == count else value

    return tuple(map(changed, arguments)), {name: changed(value) for name, value in keywords.items()}
