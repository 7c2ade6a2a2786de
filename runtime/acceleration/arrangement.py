"""Which technique of a plan changes which parts of a model."""

from dataclasses import dataclass

from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.plan import Plan
from hasten.acceleration.techniques import Technique
from hasten.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Assignment:
    """A technique with what it may change. `implied`: by another technique, not named in the plan."""

    technique: Technique
    anatomy: Anatomy
    implied: bool = False


def arrange(plan: Plan, anatomy: Anatomy, strict: bool = True) -> list[Assignment]:
    """The techniques of `plan` and those that they imply, each with its part of the anatomy,
    in the order in which they are carried out.

    Raises:
        UnsupportedModelError: nothing that a technique could change; with `strict`, a part that it cannot.
        ValueError: two techniques would change the same part.
    """
    implied = {type(other): other for technique in plan for other in technique.implies}
    techniques = [*plan, *(other for kind, other in implied.items() if kind not in map(type, plan))]
    owners: dict[str, Technique] = {}
    found: dict[type, Assignment] = {}
    for technique in sorted(techniques, key=lambda technique: technique.yields):
        view = anatomy.without(owners) if technique.yields else anatomy
        known = anatomy.refusals
        try:
            targets = technique.targets(view)
        except UnsupportedModelError as nothing:
            reasons = (refusal for refusal in anatomy.refusals if refusal not in known)
            raise next((refusal.error() for refusal in reasons), nothing) from None
        for name in targets:
            if name in owners:
                both = f"{type(owners[name]).__name__} and {type(technique).__name__}"
                raise ValueError(f"{both} would both change {name}: give one of them a mapping that leaves it out")
        owners |= dict.fromkeys(targets, technique)
        found[type(technique)] = Assignment(technique, view, technique not in plan)
        if strict and anatomy.refusals:
            raise anatomy.refusals[0].error()
    return [found[type(technique)] for technique in techniques]
