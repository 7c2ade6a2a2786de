"""The options that choose techniques: one table, for every command that accelerates a model."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import typer

import hasten


@dataclass(frozen=True, slots=True)
class Row:
    """An option and its technique, a class of the public face.

    takes: which of its fields the command line sets. An option of a technique that takes no sparsity is a flag.
    """

    option: str
    technique: str
    help: str
    takes: tuple[Literal["sparsity", "allocation"], ...] = ()


# In the order in which a plan holds them.
TABLE = (
    Row("--fast-linear-attention", "FastLinearAttention", "Exact: linear-attention layers on hasten's kernels."),
    Row("--wina", "Wina", "Skip this share of the inputs by WINA.", ("sparsity", "allocation")),
    Row("--teal", "Teal", "Skip this share of the inputs by TEAL.", ("sparsity", "allocation")),
    Row("--cats", "Cats", "Skip this share of the MLP neurons by CATS.", ("sparsity",)),
    Row("--dense", "DenseDecode", "Exact: dense products on hasten's kernels, where they are faster."),
)
ALLOCATION = "How the sparsity is spread over the projections: greedy where it costs least."


def takes_plan(command: Callable) -> Callable:
    """Gives a command the options of TABLE and --allocation in the place of its parameter `plan`, and calls it with the
    techniques that they ask for."""
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        parameters += _options() if parameter.name == "plan" else [parameter]

    @functools.wraps(command)
    def with_options(**given):
        allocation = given.pop("allocation")
        chosen = {row: given.pop(_name(row)) for row in TABLE}
        return command(plan=plan_of(chosen, allocation), **given)

    with_options.__signature__ = inspect.Signature(parameters)
    return with_options


def plan_of(chosen: dict[Row, float | bool | None], allocation: str = "uniform") -> list:
    """The techniques whose options are given: neither None nor False.

    Raises:
        ValueError: a sparsity outside [0, 1), an allocation that nothing takes; the message names the option.
    """
    plan, taken = [], False
    for row, value in chosen.items():
        if value is None or value is False:
            continue
        fields = {name: given for name, given in (("sparsity", value), ("allocation", allocation)) if name in row.takes}
        taken |= "allocation" in fields
        try:
            plan.append(getattr(hasten, row.technique)(**fields))
        except ValueError as error:
            raise ValueError(f"{row.option}: {error}") from error
    if allocation != "uniform" and not taken:
        raise ValueError(f"--allocation is for {options('allocation')}: give one of them")
    return plan


def options(takes: str | None = None) -> str:
    """The names of all options, or of those whose technique takes a field, as one says them: "--a, --b or --c"."""
    names = [row.option for row in TABLE if takes is None or takes in row.takes]
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _options() -> list[inspect.Parameter]:
    found = []
    for row in TABLE:
        if "sparsity" in row.takes:
            option = Annotated[float | None, typer.Option(row.option, metavar="SPARSITY", help=row.help)]
            found.append(_parameter(_name(row), option, None))
        else:
            found.append(_parameter(_name(row), Annotated[bool, typer.Option(row.option, help=row.help)], False))
    allocation = Annotated[Literal["uniform", "greedy"], typer.Option("--allocation", help=ALLOCATION)]
    return [*found, _parameter("allocation", allocation, "uniform")]


def _parameter(name: str, annotation, default) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)


def _name(row: Row) -> str:
    return row.option.removeprefix("--").replace("-", "_")
