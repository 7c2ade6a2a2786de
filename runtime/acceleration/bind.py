"""From techniques to edits: which module gets which sparsity and threshold (a `Setting`), and the edits that carry it out."""

import contextlib
import difflib
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from hasten.acceleration.anatomy import Anatomy, Block, Projection
from hasten.acceleration.calibration import FIRST, Statistics, gated_mlps, score_name, scored
from hasten.acceleration.edits import Edit, ReplaceModule, StoreColumnMajor
from hasten.acceleration.modules import CatsMLP, DecodeLinear, SparseLinear, largest_union
from hasten.acceleration.plan import Plan
from hasten.acceleration.techniques import Cats, Technique, Wina, is_sparse
from hasten.errors import UnsupportedModelError
from hasten.model_facts import progress
from hasten.sparsity.allocation import greedy
from hasten.sparsity.scores import column_norms, cutoffs


@dataclass(frozen=True, slots=True)
class Setting:
    """What one module does in decode: skip the fraction `sparsity` of its inputs (of its neurons, for Cats), those that score up to `threshold`."""

    name: str
    technique: str
    sparsity: float
    threshold: float


def settle(model: nn.Module, technique: Technique, anatomy: Anatomy, statistics: Statistics) -> list[Setting]:
    """Decides sparsity and threshold of every module that `technique` makes sparse. Changes nothing.

    Raises:
        UnsupportedModelError: nothing in the model that the technique could make sparse.
        ValueError: the technique's mapping names a module that is not there, or `statistics` were gathered for something else.
    """
    names = targets(technique, anatomy)
    if getattr(technique, "allocation", None) == "greedy":
        sparsities = _greedy_sparsities(technique, anatomy, statistics)
    else:
        sparsities = spread(technique.sparsity, names)
    settings = []
    for name, sparsity in sparsities.items():
        if sparsity > 0:
            threshold = _histogram(technique, name, statistics).threshold(sparsity)
            settings.append(Setting(name, score_name(technique), sparsity, threshold))
    return settings


def targets(technique: Technique, anatomy: Anatomy) -> list[str]:
    """The names of the modules that `technique` can make sparse, in order.

    Raises:
        UnsupportedModelError: there is none.
    """
    if isinstance(technique, Cats):
        names = [block.mlp_name for block in gated_mlps(anatomy)]
        if not names and (refusals := mlp_refusals(technique, anatomy)):
            raise refusals[0]
        reason = f"its MLPs have no gate (family {anatomy.model_type}), which Cats needs"
    else:
        names = [projection.name for projection in scored(technique, anatomy)]
        reason = "no projection of it can be made sparse"
    if not names and is_sparse(technique):
        raise UnsupportedModelError("", anatomy.model_type, reason, "use hasten.Wina or hasten.Teal on another model")
    return names


def mlp_refusals(technique: Technique, anatomy: Anatomy) -> list[UnsupportedModelError]:
    """Why gated MLPs are not among the targets of Cats; nothing for another technique."""
    refusals = [block.mlp_refusal for block in anatomy.blocks if block.mlp_refusal]
    return refusals if isinstance(technique, Cats) else []


def refuse_overlap(plan: Plan, anatomy: Anatomy) -> None:
    """Two techniques must not skip inputs of the same projection. Cats takes its MLPs whole, but for a gate of its own.

    Raises:
        ValueError: they would; or a mapping names a module that is not there.
    """
    owners: dict[str, str] = {}
    for technique in plan:
        names = targets(technique, anatomy)
        mine = [name for name, sparsity in spread(technique.sparsity, names).items() if sparsity > 0] if names else []
        for name in mine:
            for other, owner in owners.items():
                outer, inner = sorted((name, other), key=len)
                if inner == outer or (inner.startswith(f"{outer}.") and inner != f"{outer}.gate_proj"):
                    both = f"{owner} and {score_name(technique)}"
                    raise ValueError(f"{both} would both change {inner}: give one of them a mapping that leaves it out")
        owners |= dict.fromkeys(mine, score_name(technique))


def spread(sparsity: float | Mapping[str, float], names: list[str]) -> dict[str, float]:
    """One sparsity per name, from one number or from a mapping of names, endings of names, or fnmatch patterns; the last match counts.

    Raises:
        ValueError: a pattern that matches nothing; the nearest name is suggested.
    """
    if not isinstance(sparsity, Mapping):
        return dict.fromkeys(names, sparsity)
    result = dict.fromkeys(names, 0.0)
    for pattern, value in sparsity.items():
        matching = [
            name
            for name in names
            if name == pattern or name.endswith(f".{pattern}") or fnmatch.fnmatchcase(name, pattern)
        ]
        if not matching:
            endings = dict.fromkeys(ending for name in names for ending in (name, name.rsplit(".", 1)[-1]))
            nearest = difflib.get_close_matches(pattern, endings, n=1, cutoff=0)
            raise ValueError(
                f"sparsity names {pattern!r}, which is no module that can be made sparse here; the nearest name is {nearest[0]!r}"
            )
        result |= dict.fromkeys(matching, value)
    return result


def _histogram(technique: Technique, name: str, statistics: Statistics):
    key = (score_name(technique), name)
    if key not in statistics.histograms:
        raise ValueError(f"the statistics hold nothing for {key[0]} at {name}: calibrate this model for this technique")
    return statistics.histograms[key]


def _column_weights(technique: str, weight: torch.Tensor) -> torch.Tensor:
    if technique == Wina.__name__:
        return column_norms(weight)
    return torch.ones(weight.shape[1], device=weight.device)


def _greedy_sparsities(technique: Technique, anatomy: Anatomy, statistics: Statistics) -> dict[str, float]:
    missing = [block.name for block in anatomy.blocks if not statistics.block_inputs.get(block.name)]
    if missing:
        raise ValueError(f"the statistics hold no inputs of {missing[0]}: calibrate with greedy allocation")
    sparsities = {}
    blocks = [block for block in anatomy.blocks if block.projections]
    for block in progress(blocks, "allocating", unit="block"):
        sizes = {projection.name: projection.module.weight.numel() for projection in block.projections}
        error = _block_error(technique, block, statistics)
        sparsities |= greedy(sizes, error, technique.sparsity)
    return sparsities


def _block_error(technique: Technique, block: Block, statistics: Statistics) -> Callable[[dict[str, float]], float]:
    """The distance of the block's output, over the captured calls, from its dense output when projections skip inputs at given sparsities."""
    weights = {p.name: _column_weights(score_name(technique), p.module.weight) for p in block.projections}
    calls = statistics.block_inputs[block.name]
    dense = [_hidden(block, call) for call in calls]

    def error(sparsities: dict[str, float]) -> float:
        with contextlib.ExitStack() as hooks:
            for projection in block.projections:
                if sparsities[projection.name] > 0:
                    threshold = _histogram(technique, projection.name, statistics).threshold(
                        sparsities[projection.name]
                    )
                    mask = masked_input(cutoffs(threshold, weights[projection.name]))
                    hooks.callback(projection.module.register_forward_pre_hook(mask).remove)
            outputs = [_hidden(block, call) for call in calls]
        return sum(float((fast - exact).float().pow(2).sum()) for fast, exact in zip(outputs, dense, strict=True))

    return error


@torch.no_grad()
def _hidden(block: Block, call: tuple[tuple, dict]) -> torch.Tensor:
    output = block.module(*call[0], **call[1])
    return output[0] if isinstance(output, tuple) else output


def masked_input(cutoff: torch.Tensor) -> Callable:
    """A forward pre-hook that zeroes inputs at or under `cutoff` at every position but the first: what decode skips, in one parallel pass."""

    def mask(module, arguments):
        x = arguments[0]
        rows = x.reshape(-1, x.shape[-1])
        keep = rows.abs() > cutoff
        keep[:FIRST] = True
        return ((rows * keep).view_as(x), *arguments[1:])

    return mask


def sparse_edits(anatomy: Anatomy, settings: list[Setting]) -> list[Edit]:
    """The edits that carry out `settings`."""
    projections = {projection.name: projection for projection in anatomy.projections()}
    mlps = {block.mlp_name: block for block in gated_mlps(anatomy)}
    edits: list[Edit] = []
    for setting in settings:
        if setting.technique == Cats.__name__:
            edits += [
                StoreColumnMajor(mlps[setting.name].projection("down").name),
                _replace_mlp(setting, mlps[setting.name]),
            ]
        else:
            edits += [StoreColumnMajor(setting.name), _replace_projection(setting, projections[setting.name])]
    return edits


def _replace_projection(setting: Setting, projection: Projection) -> Edit:
    return ReplaceModule(projection.name, partial(_sparse_linear, setting))


def _sparse_linear(setting: Setting, old: nn.Linear) -> SparseLinear:
    weights = _column_weights(setting.technique, old.weight.detach())
    return SparseLinear(old, setting.name, cutoffs(setting.threshold, weights), largest_union(setting.sparsity))


def _replace_mlp(setting: Setting, block: Block) -> Edit:
    activation = block.activation_name.rpartition(".")[2]
    return ReplaceModule(setting.name, partial(_cats_mlp, setting, activation))


def _cats_mlp(setting: Setting, activation: str, old: nn.Module) -> CatsMLP:
    return CatsMLP(old, setting.name, activation, setting.threshold, largest_union(setting.sparsity))


def left_dense(anatomy: Anatomy, settings: list[Setting]) -> list[Projection]:
    """The projections, the head among them, that `settings` leave to a dense product in decode."""
    taken = {setting.name for setting in settings}
    for block in gated_mlps(anatomy):
        if block.mlp_name in taken:
            roles = ("up", "down", "gate_up")
            taken |= {block.projection(role).name for role in roles if block.projection(role)}
    everything = [*anatomy.projections(), *([anatomy.head] if anatomy.head else [])]
    return [projection for projection in everything if projection.name not in taken]


def dense_edit(projection: Projection, max_batch: int) -> Edit:
    return ReplaceModule(projection.name, partial(DecodeLinear, max_batch=max_batch))
