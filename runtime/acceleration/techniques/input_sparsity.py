"""What `Wina` and `Teal` share: projections that skip the inputs whose score is small."""

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import nn

from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.edits import Edit, ReplaceForward, StoreColumnMajor
from hasten.acceleration.experts import decode_experts, expert_inputs, layout_of
from hasten.acceleration.forwards import Forward, Watch, decode_rows, matrix
from hasten.acceleration.parts import Block, Experts, Projection
from hasten.acceleration.techniques.base import Settings, Skip
from hasten.acceleration.techniques.sparse_decode import SparseDecode, refused_methods, refusing_broken_inputs
from hasten.errors import Refusal, SavedPlanError, UnsupportedModelError
from hasten.kernels.column_sparse_linear import column_sparse_linear
from hasten.kernels.storage import MAX_BATCH, is_column_major
from hasten.model_facts import progress
from hasten.sparsity.allocation import HIGHEST, Sparsity, checked, greedy, spread
from hasten.sparsity.histogram import ScoreHistogram
from hasten.sparsity.threshold import FIRST, cutoffs, masked, past_first, scores
from hasten.sparsity.union import largest_union

BLOCK_SAMPLES = 2


class SparseLinear(Forward):
    """A projection that skips inputs at or under `cutoff` in decode. Its weight must be column-major.

    Args:
        module, name: the projection, [N, K].
        factors: of its inputs in their scores, from the weight: [N, K] -> [K].
        threshold: the score up to which an input is skipped.
        sparsity: the share that is, on average.
    """

    def __init__(self, module: nn.Module, name: str, factors: Callable, threshold: float, sparsity: float):
        super().__init__(module, name)
        self.cutoff = cutoffs(threshold, factors(matrix(module).detach()))
        # The largest batch that skips (the union of active inputs); batches up to MAX_BATCH beyond it are exact.
        self.max_union = largest_union(sparsity, MAX_BATCH)
        self.watch = Watch()

    def weights(self):
        return {f"{self.name}.weight": self.module.weight}

    def is_own(self, x: torch.Tensor) -> bool:
        return 0 < decode_rows(x) <= MAX_BATCH

    def own(self, x: torch.Tensor) -> torch.Tensor:
        weight = matrix(self.module)
        cutoff = self.cutoff if len(x) <= self.max_union else None
        return column_sparse_linear(x.to(weight.dtype), weight, cutoff, self.module.bias)

    def active(self, x):
        if not 0 < decode_rows(x) <= self.max_union:
            return None
        rows = x.reshape(-1, x.shape[-1])
        return int((rows.abs() > self.cutoff).any(0).sum()), rows.shape[1]


class SparseExperts(Forward):
    """A mixture of experts whose picked experts skip inputs in the decode of one token.
    Its weights must be column-major.

    Args:
        module, name: the mixture.
        factors: of the inputs of every map in their scores: [E, N, K] -> [E, K].
        thresholds: one for each map of its layout.
    """

    def __init__(self, module: nn.Module, name: str, factors: Callable, thresholds: list[float]):
        super().__init__(module, name)
        self.layout = layout_of(module)
        self.cutoffs = {
            weight.name: cutoffs(threshold, factors(weight.of(module, self.layout.experts).detach()))
            for threshold, weight in zip(thresholds, self.layout.weights, strict=True)
        }
        self.watch = Watch()

    def weights(self):
        return {f"{self.name}.{weight.name}": weight.parameter(self.module) for weight in self.layout.weights}

    def tensors(self):
        return list(self.cutoffs.values())

    def is_own(self, hidden: torch.Tensor, top_k_index=None, top_k_weights=None) -> bool:
        return 0 < self.layout.tokens(hidden) <= MAX_BATCH

    def own(self, hidden: torch.Tensor, top_k_index=None, top_k_weights=None) -> torch.Tensor:
        # A prompt of a few tokens looks like a batch: several tokens are exact.
        skipping = self.cutoffs if self.layout.tokens(hidden) == 1 else None
        return decode_experts(self.module, self.layout, hidden, top_k_index, top_k_weights, skipping)

    def active(self, hidden, top_k_index=None, top_k_weights=None):
        if self.layout.tokens(hidden) != 1:
            return None
        found = [0, 0]
        for expert, inputs in expert_inputs(self.module, self.layout, hidden, top_k_index, self.cutoffs):
            for name, rows in inputs.items():
                found[0] += int((rows.abs() > self.cutoffs[name][expert]).sum())
                found[1] += rows.numel()
        return tuple(found)


@dataclass(slots=True)
class Scores:
    """What a calibration pass gathers: the scores of the inputs of every part,
    and the arguments of a few calls of every block."""

    histograms: dict[str, list[ScoreHistogram]] = field(default_factory=dict)
    calls: dict[str, list[tuple[tuple, dict]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InputSparsity(SparseDecode):
    """In decode, inputs of a projection whose score is small are skipped; thresholds come from calibration, prefill
    stays dense, and what is left dense (the head, projections at sparsity 0) is decoded as `DenseDecode` does.

    Args:
        sparsity: the fraction of inputs to skip, in [0, 1), on average over the calibration tokens; or a mapping from
            module names, their endings or fnmatch patterns to fractions, where what is not named stays dense.
        allocation: "uniform" gives every projection the same sparsity; "greedy" shares each block's budget where it
            costs the block's output least (mixtures of experts keep theirs).
    """

    sparsity: Sparsity = 0.5
    allocation: Literal["uniform", "greedy"] = "uniform"

    def __post_init__(self):
        if self.allocation not in ("uniform", "greedy"):
            raise ValueError(f'allocation must be "uniform" or "greedy", got {self.allocation!r}')
        object.__setattr__(self, "sparsity", checked(self.sparsity))
        if self.allocation == "greedy" and not isinstance(self.sparsity, float):
            raise ValueError(
                "greedy allocation chooses the sparsity of each module itself: give sparsity as one number"
            )
        if self.allocation == "greedy" and self.sparsity > HIGHEST:
            raise ValueError(f"greedy allocation reaches sparsities up to {HIGHEST}, got {self.sparsity!r}")

    @staticmethod
    @abstractmethod
    def factors(weight: torch.Tensor) -> torch.Tensor:
        """The factor of every input in its score: weight [..., N, K] -> [..., K]."""

    def targets(self, anatomy):
        return tuple(name for name, sparsity in self._spread(anatomy).items() if sparsity > 0)

    def _spread(self, anatomy: Anatomy) -> dict[str, float]:
        parts = _parts(anatomy)
        if not parts:
            reason, remedy = "no projection of it can be made sparse", "use hasten.DenseDecode"
            raise UnsupportedModelError("", type(anatomy.model).__qualname__, reason, remedy)
        return spread(self.sparsity, list(parts))

    def listen(self, anatomy, statistics):
        gathered = statistics.gathered[type(self).__name__] = Scores()
        for name, part in _parts(anatomy).items():
            histograms = gathered.histograms[name] = [ScoreHistogram() for _ in _weights(part)]
            factors = [self.factors(weight.detach()) for weight in _weights(part)]
            listen = _listen_to_experts if isinstance(part, Experts) else _listen_to_projection
            listener = partial(listen, histograms, factors)
            yield part.module.register_forward_pre_hook(partial(refusing_broken_inputs, name, listener))
        if self.allocation == "greedy":
            for block in anatomy.blocks:
                calls = gathered.calls[block.name] = []
                yield block.module.register_forward_pre_hook(partial(_keep_call, calls), with_kwargs=True)

    def settle(self, anatomy, statistics):
        """Sparsity and thresholds by the names of parts: one threshold for a projection,
        one for each map of a mixture of experts."""
        gathered = statistics.of(self)
        sparsities = self._spread(anatomy)
        for name in sparsities:
            if name not in gathered.histograms:
                raise ValueError(
                    f"the statistics hold nothing for {type(self).__name__} at {name}: calibrate this model for it"
                )
        if self.allocation == "greedy":
            sparsities |= self._greedy(anatomy, gathered)
        return Settings(
            {
                name: {"sparsity": sparsity, "thresholds": [h.threshold(sparsity) for h in gathered.histograms[name]]}
                for name, sparsity in sparsities.items()
                if sparsity > 0
            }
        )

    def read(self, saved, anatomy):
        expected, greedy_ = self._spread(anatomy), self.allocation == "greedy"
        parts = _parts(anatomy)
        names = {name for name, sparsity in expected.items() if sparsity > 0}
        if (
            saved.tensors
            or not saved.values
            or not saved.values.keys() <= names
            or (saved.values.keys() != names and not greedy_)
        ):
            raise SavedPlanError(f"the settings of {type(self).__name__} are not those that it writes for this model")
        for name, setting in saved.values.items():
            if not isinstance(setting, dict) or setting.keys() != {"sparsity", "thresholds"}:
                raise SavedPlanError(f"{name}: expected sparsity and thresholds, got {setting!r}")
            sparsity, thresholds = setting["sparsity"], setting["thresholds"]
            if not _is_number(sparsity) or not 0 < sparsity < 1 or (not greedy_ and sparsity != expected[name]):
                raise SavedPlanError(f"{name}: sparsity {sparsity!r} is not what the plan asks for")
            if (
                not isinstance(thresholds, list)
                or len(thresholds) != len(_weights(parts[name]))
                or not all(_is_number(t) and 0 <= t < math.inf for t in thresholds)
            ):
                raise SavedPlanError(f"{name}: thresholds {thresholds!r} are no finite numbers from 0 on")
        return saved

    def edits(self, anatomy, settings):
        edits: list[Edit] = []
        for name, part in _parts(anatomy).items():
            if name not in settings.values:
                continue
            sparsity, thresholds = settings.values[name]["sparsity"], settings.values[name]["thresholds"]
            if isinstance(part, Experts):
                edits += [
                    StoreColumnMajor(f"{name}.{weight.name}")
                    for weight, matrices in zip(layout_of(part.module).weights, _weights(part), strict=True)
                    if not is_column_major(matrices)
                ]
                edits.append(ReplaceForward(name, partial(SparseExperts, factors=self.factors, thresholds=thresholds)))
            else:
                edits += [StoreColumnMajor(f"{name}.weight")] if not is_column_major(part.weight) else []
                make = partial(SparseLinear, factors=self.factors, threshold=thresholds[0], sparsity=sparsity)
                edits.append(ReplaceForward(name, make))
        return [*edits, *refused_methods()]

    def skips(self, anatomy, settings):
        return [Skip(refusal.name, f"{refusal.reason}: it stays dense") for refusal in anatomy.repeated]

    def _greedy(self, anatomy: Anatomy, gathered: Scores) -> dict[str, float]:
        sparsities = {}
        blocks = [block for block in anatomy.blocks if block.projections]
        for block in progress(blocks, "allocating", unit="block"):
            if not gathered.calls.get(block.name):
                raise ValueError(f"the statistics hold no inputs of {block.name}: calibrate with greedy allocation")
            sizes = {projection.name: projection.weight.numel() for projection in block.projections}
            sparsities |= greedy(sizes, self._block_error(block, gathered), self.sparsity)
        return sparsities

    def _block_error(self, block: Block, gathered: Scores) -> Callable[[dict[str, float]], float]:
        """The distance of the block's output, over the kept calls,
        from its dense output when projections skip inputs at given sparsities."""
        factors = {p.name: self.factors(p.weight.detach()) for p in block.projections}
        calls = gathered.calls[block.name]
        dense = [_hidden(block, call) for call in calls]

        def error(sparsities: dict[str, float]) -> float:
            with contextlib.ExitStack() as hooks:
                for projection in block.projections:
                    if (sparsity := sparsities[projection.name]) > 0:
                        threshold = gathered.histograms[projection.name][0].threshold(sparsity)
                        mask = partial(_mask_input, cutoffs(threshold, factors[projection.name]))
                        hooks.callback(projection.module.register_forward_pre_hook(mask).remove)
                outputs = [_hidden(block, call) for call in calls]
            return sum(float((fast - exact).float().pow(2).sum()) for fast, exact in zip(outputs, dense, strict=True))

        return error


def _parts(anatomy: Anatomy) -> dict[str, Projection | Experts]:
    """What can skip inputs: the projections and the mixtures of experts."""
    experts = []
    for part in anatomy.experts:
        if any(weight.flat for weight in layout_of(part.module).weights):
            reason = "its experts lie below each other in one matrix, whose columns cannot be stored expert by expert"
            anatomy.refuse(
                Refusal(part.name, type(part.module).__qualname__, reason, "use hasten.DenseDecode, or strict=False")
            )
        else:
            experts.append(part)
    return {part.name: part for part in (*anatomy.called_once, *experts)}


def _weights(part: Projection | Experts) -> list[torch.Tensor]:
    """The maps [..., N, K] of a part."""
    if not isinstance(part, Experts):
        return [part.weight]
    layout = layout_of(part.module)
    return [weight.of(part.module, layout.experts) for weight in layout.weights]


def _listen_to_projection(histograms, factors, module, arguments):
    histograms[0].add(scores(past_first(arguments[0]), factors[0]))


def _listen_to_experts(histograms, factors, module, arguments):
    layout = layout_of(module)
    # Past the first position: tokens are the last dimension but one, behind the experts where each gets every token.
    hidden = arguments[0].reshape(-1, layout.tokens(arguments[0]), layout.hidden)[:, FIRST:]
    index = arguments[1][FIRST:] if len(arguments) > 1 else None
    for expert, inputs in expert_inputs(module, layout, hidden, index):
        for weight, histogram, factor in zip(layout.weights, histograms, factors, strict=True):
            histogram.add(scores(inputs[weight.name], factor[expert]))


def _keep_call(calls, module, arguments, keywords):
    if len(calls) < BLOCK_SAMPLES:
        calls.append((arguments, keywords))


def _mask_input(cutoff, module, arguments):
    return (masked(arguments[0], cutoff), *arguments[1:])


@torch.no_grad()
def _hidden(block: Block, call: tuple[tuple, dict]) -> torch.Tensor:
    output = block.module(*call[0], **call[1])
    return output[0] if isinstance(output, tuple) else output


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
