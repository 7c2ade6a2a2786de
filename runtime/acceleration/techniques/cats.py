"""Contextually aware thresholding of gated MLPs."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from hasten.acceleration.edits import ReplaceForward, StoreColumnMajor
from hasten.acceleration.forwards import Forward, Watch, decode_rows, matrix, product
from hasten.acceleration.parts import GatedMLP
from hasten.acceleration.techniques.base import Settings
from hasten.acceleration.techniques.sparse_decode import SparseDecode, refused_methods, refusing_broken_inputs
from hasten.errors import SavedPlanError, UnsupportedModelError
from hasten.kernels import backend
from hasten.kernels.column_sparse_linear import column_sparse_linear
from hasten.kernels.row_sparse_linear import row_sparse_linear
from hasten.kernels.storage import MAX_BATCH, is_column_major
from hasten.sparsity.allocation import Sparsity, checked, spread
from hasten.sparsity.cats import cats
from hasten.sparsity.histogram import ScoreHistogram
from hasten.sparsity.threshold import past_first, scores
from hasten.sparsity.union import largest_union


class CatsMLP(Forward):
    """A gated MLP that computes up and down only for neurons with |act(gate)| over a threshold in decode. The weight of
    down must be column-major.

    Args:
        module, name: the MLP.
        parts: the names of its projections and of its activation.
        threshold: the score up to which a neuron is skipped.
        sparsity: the share that is, on average.
    """

    def __init__(self, module: nn.Module, name: str, parts: GatedMLP, threshold: float, sparsity: float):
        super().__init__(module, name)
        self.fused = parts.gate_up is not None
        self.activation = parts.activation
        roles = ("gate_up", "down") if self.fused else ("gate", "up", "down")
        self.linears = {role: getattr(parts, role).name.removeprefix(f"{name}.") for role in roles}
        down = matrix(self.linear("down")).detach()
        self.threshold = torch.tensor(threshold, device=down.device)
        # Of the neurons' values, which are exactly 0 where they were skipped, down needs all others.
        self.nonzero_cutoff = torch.zeros(down.shape[1], device=down.device)
        self.max_union = largest_union(sparsity, MAX_BATCH)
        self.watch = Watch()

    def linear(self, role: str) -> nn.Module:
        return self.module.get_submodule(self.linears[role])

    def weights(self):
        return {f"{self.name}.{inner}.weight": self.linear(role).weight for role, inner in self.linears.items()}

    def is_own(self, x: torch.Tensor) -> bool:
        return 0 < decode_rows(x) <= MAX_BATCH

    def own(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(matrix(self.linear("down")).dtype)
        exact = len(x) > self.max_union
        return self.by_modules(x, exact) if self._has_hooks() else self.by_kernels(x, self.gate(x), exact)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """act(gate(x)) [..., neurons], in the dtype of x."""
        act = getattr(self.module, self.activation)
        if not self.fused:
            return act(self.linear("gate")(x)).to(x.dtype)
        (weight, _), (bias, _) = self._halves()
        return act(product(x, weight, bias))

    def by_kernels(self, x: torch.Tensor, gate: torch.Tensor, exact: bool) -> torch.Tensor:
        """down(gate * up(x)) over the neurons whose |gate| is over the threshold; `exact`: over all neurons."""
        threshold = torch.full_like(self.threshold, -1) if exact else self.threshold
        if self.fused:
            (_, weight), (_, bias) = self._halves()
        else:
            weight, bias = self.linear("up").weight, self.linear("up").bias
        neurons = row_sparse_linear(x, weight, gate, threshold, bias)
        down = self.linear("down")
        return column_sparse_linear(neurons, matrix(down), self.nonzero_cutoff, down.bias)

    def by_modules(self, x: torch.Tensor, exact: bool) -> torch.Tensor:
        """The same by the projections themselves, whose hooks then run."""
        if self.fused:
            gate, up = self.linear("gate_up")(x).chunk(2, -1)
            gate = getattr(self.module, self.activation)(gate)
        else:
            gate, up = self.gate(x), self.linear("up")(x)
        return self.linear("down")(gate * up if exact else gate * up * self._active(gate))

    def beside_definition(self, x):
        # The gate decides what is skipped: both must decide on the same values, for rounding tips those at the
        # threshold.
        x = x.to(matrix(self.linear("down")).dtype)
        gate, exact = self.gate(x), len(x) > self.max_union
        output = self.by_kernels(x, gate, exact)
        with backend.use("reference"):
            return output, self.by_kernels(x, gate, exact)

    def active(self, x):
        if not 0 < decode_rows(x) <= self.max_union:
            return None
        active = self._active(self.gate(x.to(matrix(self.linear("down")).dtype)))
        return int(active.sum()), active.numel()

    def _active(self, gate: torch.Tensor) -> torch.Tensor:
        """Which neurons are over the threshold in some row: gate [..., neurons] -> [neurons]."""
        return (gate.reshape(-1, gate.shape[-1]).abs() > self.threshold).any(0)

    def _halves(self):
        linear = self.linear("gate_up")
        return linear.weight.chunk(2), (None, None) if linear.bias is None else linear.bias.chunk(2)

    def _has_hooks(self) -> bool:
        """Whether something listens to the projections whose weights are read past them."""
        return any(
            self.linear(role)._forward_hooks or self.linear(role)._forward_pre_hooks
            for role in self.linears
            if role != "gate"
        )


@dataclass(frozen=True, slots=True)
class Cats(SparseDecode):
    """Contextually aware thresholding (Lee et al. 2024, arXiv 2404.08763) of gated MLPs: in decode, a neuron whose
    |act(gate)| is small is skipped in the up and down projections. Gate and attention stay dense (as in `DenseDecode`).

    Args:
        sparsity: the fraction of an MLP's neurons to skip, in [0, 1); or a mapping from names of MLPs, their endings or
            fnmatch patterns.
    """

    sparsity: Sparsity = 0.5

    def __post_init__(self):
        object.__setattr__(self, "sparsity", checked(self.sparsity))

    def targets(self, anatomy):
        names = []
        for name, sparsity in self._spread(anatomy).items():
            if sparsity > 0:
                mlp = self._mlps(anatomy)[name]
                inner = (mlp.gate_up, mlp.up, mlp.down)
                names += [name, *(projection.name for projection in inner if projection)]
        return tuple(names)

    def listen(self, anatomy, statistics):
        histograms = statistics.gathered[type(self).__name__] = {}
        for name, mlp in self._mlps(anatomy).items():
            histogram = histograms[name] = ScoreHistogram()
            activation = mlp.module.get_submodule(mlp.activation)
            listener = partial(_listen, histogram, cats(mlp.down.weight.detach()))
            yield activation.register_forward_hook(partial(refusing_broken_inputs, name, listener))

    def settle(self, anatomy, statistics):
        """Sparsity and threshold by the names of MLPs."""
        histograms, settings = statistics.of(self), {}
        for name, sparsity in self._spread(anatomy).items():
            if name not in histograms:
                raise ValueError(f"the statistics hold nothing for Cats at {name}: calibrate this model for it")
            if sparsity > 0:
                settings[name] = {"sparsity": sparsity, "threshold": histograms[name].threshold(sparsity)}
        return Settings(settings)

    def read(self, saved, anatomy):
        expected = {name: sparsity for name, sparsity in self._spread(anatomy).items() if sparsity > 0}
        if saved.tensors or saved.values.keys() != expected.keys():
            raise SavedPlanError("the settings of Cats are not those that it writes for this model")
        for name, setting in saved.values.items():
            if not isinstance(setting, dict) or setting.keys() != {"sparsity", "threshold"}:
                raise SavedPlanError(f"{name}: expected sparsity and threshold, got {setting!r}")
            if setting["sparsity"] != expected[name]:
                raise SavedPlanError(f"{name}: sparsity {setting['sparsity']!r} is not what the plan asks for")
            if not isinstance(setting["threshold"], float) or not 0 <= setting["threshold"] < math.inf:
                raise SavedPlanError(f"{name}: threshold {setting['threshold']!r} is no finite number from 0 on")
        return saved

    def edits(self, anatomy, settings):
        edits = []
        for name, mlp in self._mlps(anatomy).items():
            if name in settings.values:
                edits += [StoreColumnMajor(f"{mlp.down.name}.weight")] if not is_column_major(mlp.down.weight) else []
                edits.append(ReplaceForward(name, partial(CatsMLP, parts=mlp, **settings.values[name])))
        return [*edits, *refused_methods()]

    def _mlps(self, anatomy) -> dict[str, GatedMLP]:
        mlps = {mlp.name: mlp for mlp in anatomy.gated_mlps}
        if not mlps:
            if anatomy.experts:
                reason = f"its MLPs are fused experts ({anatomy.experts[0].name}), and Cats needs gated MLPs"
                remedy = "use hasten.Wina or hasten.Teal, which take fused experts"
            else:
                reason = f"its MLPs have no gate that hasten knows (family {anatomy.model_type}), which Cats needs"
                remedy = "use hasten.Wina or hasten.Teal"
            raise UnsupportedModelError("", type(anatomy.model).__qualname__, reason, remedy)
        return mlps

    def _spread(self, anatomy) -> dict[str, float]:
        return spread(self.sparsity, list(self._mlps(anatomy)))


def _listen(histogram, factors, module, arguments, output):
    histogram.add(scores(past_first(output), factors))
