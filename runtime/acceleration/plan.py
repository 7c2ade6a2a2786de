"""A plan: the techniques of one acceleration, as JSON that is saved with a model."""

import dataclasses
import inspect
import json
from collections.abc import Iterable

from hasten.acceleration.techniques import Technique
from hasten.errors import SavedPlanError

VERSION = 1


class Plan(tuple):
    """A tuple of techniques, carried out in order.

    Args:
        techniques: one technique, or several.

    Raises:
        ValueError: no technique, or the same kind twice.
        TypeError: something that is no technique.
    """

    __slots__ = ()

    def __new__(cls, techniques: Technique | Iterable[Technique]) -> "Plan":
        techniques = (techniques,) if isinstance(techniques, Technique) else techniques
        if not isinstance(techniques, Iterable) or isinstance(techniques, str):
            raise TypeError(f"a plan holds techniques such as hasten.Wina(sparsity=0.5), got {techniques!r}")
        plan = super().__new__(cls, techniques)
        if not plan:
            raise ValueError("a plan needs at least one technique")
        for technique in plan:
            if not isinstance(technique, Technique):
                hint = (
                    f"; did you mean hasten.{technique.__name__}()?"
                    if inspect.isclass(technique) and issubclass(technique, Technique)
                    else ""
                )
                raise TypeError(f"a plan holds techniques such as hasten.Wina(sparsity=0.5), got {technique!r}{hint}")
        kinds = [type(technique).__name__ for technique in plan]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ValueError(f"{kind} stands twice in the plan; give one {kind} a mapping of sparsities instead")
        return plan

    def to_dict(self) -> dict:
        techniques = [{"technique": type(technique).__name__} | dataclasses.asdict(technique) for technique in self]
        return {"version": VERSION, "techniques": techniques}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: dict) -> "Plan":
        """The inverse of `to_dict`.

        Raises:
            SavedPlanError: another version, an unknown technique or field, a value that the technique refuses.
        """
        if not isinstance(data, dict) or "version" not in data:
            raise SavedPlanError("this is no hasten plan: it has no version")
        version, techniques = data["version"], data.get("techniques")
        if type(version) is not int or version != VERSION:
            remedy = "update hasten" if type(version) is int and version > VERSION else "write the plan anew"
            raise SavedPlanError(f"the plan is of version {version!r}, this hasten reads version {VERSION}: {remedy}")
        if unknown := data.keys() - {"version", "techniques"}:
            raise SavedPlanError(f"the plan has no field {', '.join(sorted(unknown))}")
        if not isinstance(techniques, list) or not all(isinstance(entry, dict) for entry in techniques):
            raise SavedPlanError("the plan is damaged: its techniques are no list of objects")
        try:
            return cls([_technique(dict(entry)) for entry in techniques])
        except Exception as error:  # a technique may stumble over a value of a wrong type in any way
            raise SavedPlanError(f"the plan is damaged: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The inverse of `to_json`. Raises `SavedPlanError` as `from_dict`, and for text that is not JSON."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # also numbers of too many digits, and too deep a nesting
            raise SavedPlanError(f"the plan is not JSON: {error}") from error
        return cls.from_dict(data)

    def __repr__(self) -> str:
        return f"Plan({super().__repr__()})"


def _technique(fields: dict) -> Technique:
    kind = fields.pop("technique", None)
    known = {name: technique for name, technique in Technique.known.items() if not inspect.isabstract(technique)}
    if kind not in known:
        raise ValueError(f"unknown technique {kind!r}, known are {', '.join(sorted(known))}")
    names = {field.name for field in dataclasses.fields(known[kind])}
    if unknown := set(fields) - names:
        raise ValueError(f"{kind} has no field {', '.join(sorted(unknown))}")
    return known[kind](**fields)
