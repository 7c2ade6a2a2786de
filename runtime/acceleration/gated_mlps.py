"""Gated MLPs: recognised by names, and tried on a few rows."""

import math

import torch
from torch import nn

from hasten.acceleration.families import ACTIVATIONS, GATED_MLPS, GatedNames
from hasten.acceleration.parts import GatedMLP, Projection, join, kind_of
from hasten.errors import Refusal

# Where a gated MLP is compared with its definition: the size of its gates, of which the largest is past the limits that
# models clip them at, and the relative distance that rounding makes.
CHECK_SCALES = (0.1, 1.0, 50.0)
CHECK_LIMIT = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def gated_names(module: nn.Module) -> GatedNames | None:
    return next((names for names in GATED_MLPS if all(name in module._modules for name in names.projections)), None)


def is_gated(names: GatedNames, name: str, projections: dict[str, Projection]) -> bool:
    """Whether the shapes are those of a gate and what it multiplies;
    a fused one has twice as many rows as down has inputs."""
    neurons = projections[join(name, names.down)].weight.shape[1]
    rows = [projections[join(name, below)].weight.shape[0] for below in names.projections[:-1]]
    return sum(rows) == 2 * neurons


def gated_mlp(
    name: str, module: nn.Module, names: GatedNames, projections: dict[str, Projection]
) -> GatedMLP | Refusal:
    activation = next((a for a in ACTIVATIONS if isinstance(getattr(module, a, None), nn.Module)), None)
    if activation is None:
        return Refusal(
            name, kind_of(module), "its activation is no module of its own", "use hasten.Wina or hasten.Teal"
        )
    parts = {
        field: projections[join(name, below)]
        for field in ("down", "gate", "up", "gate_up")
        if (below := getattr(names, field)) is not None
    }
    return GatedMLP(name, module, activation, **parts)


def unlike_gated(mlp: GatedMLP, alike: set[tuple]) -> Refusal | None:
    """Why a gated MLP cannot be replaced as a whole: it computes something of its own. `alike` keeps what was tried."""
    module, remedy = mlp.module, "use hasten.Wina or hasten.Teal"
    if "forward" in vars(module):
        return Refusal(mlp.name, kind_of(module), "its forward is not the stock one of its class", remedy)
    constants = {k: v for k, v in vars(module).items() if v is None or isinstance(v, bool | int | float | str)}
    activation = getattr(module, mlp.activation)
    signature = (type(module), type(activation), tuple(sorted(constants.items(), key=str)))
    if signature not in alike:
        try:
            distance = _distance_from_gated(mlp)
        except Exception as error:
            words = str(error).partition("\n")[0]
            reason = f"its forward does not take hidden states alone ({type(error).__name__}: {words})"
            return Refusal(mlp.name, kind_of(module), reason, remedy)
        if not distance <= CHECK_LIMIT[mlp.down.weight.dtype]:
            reason = (
                f"its forward is not the stock one, down(act(gate(x)) * up(x)): it is {distance:.2g} away (relative)"
            )
            return Refusal(mlp.name, kind_of(module), reason, remedy)
        alike.add(signature)
    return None


@torch.no_grad()
def _distance_from_gated(mlp: GatedMLP) -> float:
    """The largest relative distance of what the module computes from down(act(gate(x)) * up(x)),
    over rows of small and large inputs."""
    linear = nn.functional.linear
    if mlp.gate_up:
        weights, bias = mlp.gate_up.weight.chunk(2), mlp.gate_up.bias
        biases = (None, None) if bias is None else bias.chunk(2)
    else:
        weights, biases = (mlp.gate.weight, mlp.up.weight), (mlp.gate.bias, mlp.up.bias)
    rows = torch.randn(len(CHECK_SCALES), weights[0].shape[1], generator=torch.Generator().manual_seed(0))
    rows = rows.to(weights[0].device, weights[0].dtype)
    # Of gates and what they multiply, the smaller reach the scale.
    sizes = torch.stack([linear(rows, weight).abs().amax(-1) for weight in weights]).amin(0)
    scales = torch.tensor(CHECK_SCALES, device=rows.device, dtype=rows.dtype) / sizes.masked_fill(sizes == 0, 1)
    rows = rows * scales[:, None]
    gate, up = (linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    expected = linear(getattr(mlp.module, mlp.activation)(gate) * up, mlp.down.weight, mlp.down.bias).float()
    output = type(mlp.module).forward(mlp.module, rows[None])[0].float()
    finite = expected.isfinite().all(-1)  # the largest row can overflow
    distances = (output - expected)[finite].norm(dim=-1) / expected[finite].norm(dim=-1).clamp(min=1e-30)
    return float(distances.max()) if len(distances) else math.inf
