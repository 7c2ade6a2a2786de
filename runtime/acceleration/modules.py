"""The modules that take the place of a model's own while it is accelerated.

Each shares the attributes of the module it replaces (parameters, submodules, hooks), so that names, `state_dict` and identities stay as they were,
and hands everything but decode to the replaced module's own arithmetic.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from hasten.errors import StateError
from hasten.kernels.column_sparse_linear import column_sparse_linear
from hasten.kernels.linear import linear
from hasten.kernels.row_sparse_linear import row_sparse_linear
from hasten.kernels.storage import MAX_BATCH

# Where more of the inputs than this are expected to be active in some row of the batch, decode is exact. Measured on two cores at 4096 x 4096 in
# bf16, batch 2 to 8: a union of 85 % is 1.9 to 2.0 times as fast as torch's product, the exact product of columns 1.5 to 1.6 times.
UNION_PAYS_UP_TO = 0.85


def decode_batch(x: torch.Tensor) -> int:
    """The batch size of a decode step, 0 for anything else: x is [B, 1, K], or [1, K] where a model flattens its tokens."""
    if x.dim() == 3:
        return x.shape[0] if x.shape[1] == 1 else 0
    return 1 if x.dim() == 2 and x.shape[0] == 1 else 0


def largest_union(sparsity: float) -> int:
    """The largest batch whose union of active inputs is worth computing, if rows were active independently (related rows overlap more)."""
    paying = [batch for batch in range(2, MAX_BATCH + 1) if 1 - sparsity**batch <= UNION_PAYS_UP_TO]
    return max(paying, default=1)


def share_attributes(new: nn.Module, old: nn.Module) -> None:
    """Makes `new` hold the same parameters, submodules and hooks as `old`; own buffers, so that new ones do not appear in `old`."""
    vars(new).update(vars(old))
    new._buffers = dict(old._buffers)
    new._non_persistent_buffers_set = set(old._non_persistent_buffers_set)


class Watch:
    """Notices that a weight was written to, replaced, or moved since thresholds and layout were derived from it.

    Every call compares the version and address of the weights, a prefill on a CPU also samples of their values, for writes through `.data` have no
    version. The stamps are taken at the first check; a copy or a pickle of a module takes its own.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.stamps: list[tuple[int, int]] = []  # address and version of each weight
        self.samples: list[torch.Tensor] = []

    def check(self, weights: tuple[torch.Tensor, ...], thorough: bool) -> None:
        """Raises `StateError` where a weight of `names` is not what it was."""
        if torch.compiler.is_compiling():
            return
        stamps = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
        if not self.stamps:
            self.stamps = stamps
            self.samples = [_sample(weight) for weight in weights]
            return
        changed = [stamp != now for stamp, now in zip(self.stamps, stamps, strict=True)]
        if thorough and not any(changed):
            changed = [
                weight.is_cpu and not torch.equal(_sample(weight), sample)
                for weight, sample in zip(weights, self.samples, strict=True)
            ]
        if any(changed):
            raise StateError(
                f"{self.names[changed.index(True)]}.weight was changed after hasten.accelerate: call hasten.revert(model), "
                "which keeps the new weight, and accelerate again"
            )

    def restart(self) -> None:
        """Takes the weights as they are at the next check."""
        self.stamps = []

    def __reduce__(self):
        return Watch, (self.names,)


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Some 64 values of a weight of either layout."""
    values = weight.detach()
    values = (values if values.is_contiguous() else values.t()).reshape(-1)
    return values[:: max(1, values.numel() // 64)].clone()


class DecodeLinear(nn.Linear):
    """A dense projection whose decode products up to `max_batch` rows go through hasten's kernel. Exact but for the order of sums."""

    def __init__(self, replaced: nn.Linear, max_batch: int):
        share_attributes(self, replaced)
        self.max_batch = max_batch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if 0 < decode_batch(x) <= self.max_batch:
            return linear(x.to(self.weight.dtype), self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class SparseLinear(nn.Linear):
    """A projection that skips inputs at or under `cutoff` in decode. Its weight must be column-major.

    Args:
        replaced: the dense projection [N, K].
        name: its name in the model.
        cutoff: float32 [K].
        max_union: the largest batch that skips (the union of active inputs); batches up to MAX_BATCH beyond it are exact.
    """

    def __init__(self, replaced: nn.Linear, name: str, cutoff: torch.Tensor, max_union: int):
        share_attributes(self, replaced)
        self.register_buffer("cutoff", cutoff, persistent=False)
        self.max_union = max_union
        self.watch = Watch((name,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, weight = decode_batch(x), self.weight
        self.refuse_changed_weights(thorough=not batch)
        if 0 < batch <= MAX_BATCH:
            cutoff = self.cutoff if batch <= self.max_union else None
            return column_sparse_linear(x.to(weight.dtype), weight, cutoff, self.bias)
        return F.linear(x, weight, self.bias)

    def refuse_changed_weights(self, thorough: bool) -> None:
        """Raises `StateError` if the weight is not what it was when the model was accelerated."""
        self.watch.check((self.weight,), thorough)


class CatsMLP(nn.Module):
    """A gated MLP that computes up and down only for neurons with |act(gate)| over `threshold` in decode. down's weight must be column-major.

    Args:
        replaced: the gated MLP, with `gate_proj` and `up_proj`, or the fused `gate_up_proj`, and `down_proj`.
        name: its name in the model.
        activation: the name of its activation.
        threshold: the largest |act(gate)| that is skipped.
        max_union: as in `SparseLinear`.
    """

    def __init__(self, replaced: nn.Module, name: str, activation: str, threshold: float, max_union: int):
        share_attributes(self, replaced)
        weight = self.down_proj.weight
        self.dense_forward: Callable = type(replaced).forward
        self.activation = activation
        self.max_union = max_union
        self.register_buffer("threshold", torch.tensor(threshold, device=weight.device), persistent=False)
        # Of the neurons' values, which are exactly 0 where they were skipped, down needs all others.
        self.register_buffer("nonzero_cutoff", torch.zeros(weight.shape[1], device=weight.device), persistent=False)
        self.linears = tuple(
            name for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj") if hasattr(self, name)
        )
        self.watch = Watch(tuple(f"{name}.{inner}" for inner in self.linears))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = decode_batch(x)
        self.refuse_changed_weights(thorough=not batch)
        if not 0 < batch <= MAX_BATCH:
            return self.dense_forward(self, x)
        x = x.to(self.down_proj.weight.dtype)
        return self.skip(x, self.gate(x), exact=batch > self.max_union)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """act(gate_proj(x)) [..., neurons]."""
        act = getattr(self, self.activation)
        if not hasattr(self, "gate_up_proj"):
            return act(self.gate_proj(x))
        (weight, _), (bias, _) = self._fused_halves()
        return act(linear(x, weight, bias))

    def skip(self, x: torch.Tensor, gate: torch.Tensor, exact: bool = False) -> torch.Tensor:
        """down_proj(gate * up_proj(x)) over the neurons whose |gate| is over the threshold; `exact`: over all neurons."""
        threshold = torch.full_like(self.threshold, -1) if exact else self.threshold
        if hasattr(self, "gate_up_proj"):
            (_, weight), (_, bias) = self._fused_halves()
        else:
            weight, bias = self.up_proj.weight, self.up_proj.bias
        neurons = row_sparse_linear(x, weight, gate, threshold, bias)
        return column_sparse_linear(neurons, self.down_proj.weight, self.nonzero_cutoff, self.down_proj.bias)

    def refuse_changed_weights(self, thorough: bool) -> None:
        """Raises `StateError` if a weight is not what it was when the model was accelerated."""
        self.watch.check(tuple(getattr(self, name).weight for name in self.linears), thorough)

    def _fused_halves(self):
        bias = self.gate_up_proj.bias
        return self.gate_up_proj.weight.chunk(2), (None, None) if bias is None else bias.chunk(2)
