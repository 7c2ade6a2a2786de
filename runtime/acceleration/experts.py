"""The fused experts of a mixture: how a `transformers` module stores them, and a decode step that reads those picked.

The experts of a layer are one module with a few [E, ...] parameters, called with the hidden states, the picked experts
and their weights; flags on the module say how (`transformers.integrations.moe.use_experts_implementation`). Experts
that are modules of `nn.Linear`s (Switch Transformers, NLLB-MoE) are not of this kind: their `nn.Linear`s are
projections like any other.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from operator import attrgetter
from typing import Literal

import torch
from torch import nn

from hasten.kernels.expert_linear import expert_linear

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class ExpertWeight:
    """One linear map of every expert, [E, N, K].

    `name` and `bias` are paths of parameters in the experts module. `transposed`: the parameter holds [E, K, N].
    `flat`: it holds the experts below each other, in two dimensions.
    """

    name: str
    bias: str | None = None
    transposed: bool = False
    flat: bool = False

    def parameter(self, module: nn.Module) -> nn.Parameter:
        """The parameter as it is stored."""
        return attrgetter(self.name)(module)

    def of(self, module: nn.Module, experts: int) -> torch.Tensor:
        """A view of the parameter as [E, N, K]."""
        weight = self.parameter(module)
        if self.flat:
            weight = weight.view(experts, -1, weight.shape[-1])
        elif len(weight) > experts:  # identities have no weights
            weight = weight[:experts]
        return weight.mT if self.transposed else weight

    def bias_of(self, module: nn.Module) -> torch.Tensor | None:
        """The bias [E, N], or None."""
        return None if self.bias is None else attrgetter(self.bias)(module)


@dataclass(frozen=True, slots=True)
class ExpertsLayout:
    """How an experts module stores and applies its experts.

    `inputs` are the maps that read the hidden states. `gate` says what comes of their outputs: what the module's own
    `_apply_gate` gives ("own"), or `activation`, a path in the module, on the first half times the second half
    ("halves"), on the first map's output times the second map's ("apart"), or on the only output ("none"). `norm` is
    the path of a norm after each expert. `dispatch`: the module is called with the picked experts of each token and
    their weights ("picked"), or with hidden states alone, [E * T, H], where each expert has a row for every token, zero
    where it was not picked ("every", as Llama 4 does). `identity`: an expert of number E or more returns its input.
    """

    experts: int
    hidden: int
    intermediate: int
    inputs: tuple[ExpertWeight, ...]
    down: ExpertWeight
    gate: Literal["own", "halves", "apart", "none"]
    activation: str
    norm: str | None = None
    dispatch: Literal["picked", "every"] = "picked"
    identity: bool = False

    @property
    def weights(self) -> tuple[ExpertWeight, ...]:
        """Every map, `down` last."""
        return (*self.inputs, self.down)

    def tokens(self, hidden: torch.Tensor) -> int:
        """How many tokens the hidden states that the module is called with belong to."""
        rows = hidden.numel() // self.hidden
        return rows // self.experts if self.dispatch == "every" else rows


def layout_of(module: nn.Module) -> ExpertsLayout | None:
    """The layout of an experts module that `decode_experts` can run; None for any other module, see `why_not`."""
    found = _read(module)
    return found if isinstance(found, ExpertsLayout) else None


def why_not(module: nn.Module) -> str | None:
    """Why `decode_experts` cannot run a module of fused experts; None where it can, and for any other module."""
    found = _read(module)
    return found if isinstance(found, str) else None


def decode_experts(
    module: nn.Module,
    layout: ExpertsLayout,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor | None = None,
    top_k_weights: torch.Tensor | None = None,
    cutoffs: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """What `module.forward` computes, for a few tokens; each picked expert is read once.

    Args:
        hidden: [T, H], or [..., H] of T rows; [E * T, H] where each expert has a row for every token.
        top_k_index: int64 [T, P], P experts for each token; None where each expert has a row for every token.
        top_k_weights: [T, P]; None like top_k_index.
        cutoffs: by the name of an ExpertWeight, [E, K] float32: expert e skips input j where it is at most [e, j] in
            magnitude (see hasten.kernels.expert_linear). That weight's experts must be column-major.

    Returns:
        A tensor of hidden's shape and dtype.
    """
    if layout.dispatch == "every":
        return _decode_every(module, layout, hidden, cutoffs)
    x = hidden.reshape(-1, layout.hidden)
    y = _picked(module, layout, x, top_k_index, cutoffs)  # [T, P, H]
    y = (y * top_k_weights.unsqueeze(-1)).sum(1)
    if layout.identity:
        kept = (top_k_weights * (top_k_index >= layout.experts)).sum(1, keepdim=True)
        y = y + x * kept
    return y.to(hidden.dtype).view(hidden.shape)


def expert_inputs(
    module: nn.Module,
    layout: ExpertsLayout,
    hidden: torch.Tensor,
    top_k_index: torch.Tensor | None = None,
    cutoffs: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Every picked expert with what each of its maps reads, by the map's name: [rows, K], a row for each pick, with
    zeros for the inputs that `cutoffs` skip.

    Arguments as for `decode_experts`, of any number of tokens. For calibration, and to count what decode skips.
    """
    x = hidden.reshape(-1, layout.hidden)
    if layout.dispatch == "every":
        x, top_k_index = _sent(x, layout)
    else:
        x = x[:, None].expand(-1, top_k_index.shape[1], -1)
    for e in top_k_index[(top_k_index >= 0) & (top_k_index < layout.experts)].unique().tolist():
        rows, read, outputs = x[top_k_index == e], {}, []
        for weight in layout.inputs:
            bias, matrix = weight.bias_of(module), weight.of(module, layout.experts)[e]
            read[weight.name] = _kept(rows, weight, e, cutoffs)
            bias = None if bias is None else bias[e]
            outputs.append(nn.functional.linear(read[weight.name].to(matrix.dtype), matrix, bias))
        read[layout.down.name] = _kept(_gated(module, layout, outputs), layout.down, e, cutoffs)
        yield e, read


def _kept(rows: torch.Tensor, weight: ExpertWeight, e: int, cutoffs: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    """The inputs [rows, K] of expert e without those that its cutoff skips: at or under it in every row."""
    if cutoffs is None or weight.name not in cutoffs:
        return rows
    return rows * ~(rows.abs() <= cutoffs[weight.name][e]).all(0)


def _picked(module, layout, x, ids, cutoffs):
    """x [T, H] or [T, P, H], ids [T, P] -> [T, P, H], not yet weighted."""
    outputs = [_linear(module, layout, weight, x, ids, cutoffs) for weight in layout.inputs]
    y = _linear(module, layout, layout.down, _gated(module, layout, outputs), ids, cutoffs)
    return y if layout.norm is None else getattr(module, layout.norm)(y)


def _linear(module, layout, weight, x, ids, cutoffs):
    matrix = weight.of(module, layout.experts)
    cutoff = None if cutoffs is None else cutoffs.get(weight.name)
    return expert_linear(x.to(matrix.dtype), matrix, ids, bias=weight.bias_of(module), cutoff=cutoff)


def _gated(module, layout, outputs):
    """What `down` reads: the gate and activation of the outputs of `inputs`, [..., I]."""
    if layout.gate == "own":
        return module._apply_gate(*outputs)
    activation = attrgetter(layout.activation)(module)
    if layout.gate == "none":
        return activation(*outputs)
    gate, up = outputs if layout.gate == "apart" else outputs[0].chunk(2, dim=-1)
    return activation(gate) * up


def _sent(x, layout):
    """x [E * T, H], zero rows where an expert was not picked -> picked rows [T, P, H], experts [T, P], -1 for none."""
    sent = x.view(layout.experts, -1, layout.hidden).transpose(0, 1)  # [T, E, H]
    picked = sent.any(-1)  # a NaN counts
    ids = picked.int().topk(max(1, int(picked.sum(1).max())), dim=1).indices
    rows = sent.gather(1, ids.unsqueeze(-1).expand(-1, -1, layout.hidden))
    return rows, ids.where(picked.gather(1, ids), -1)


def _decode_every(module, layout, hidden, cutoffs):
    rows, ids = _sent(hidden.reshape(-1, layout.hidden), layout)
    y = _picked(module, layout, rows, ids, cutoffs).to(hidden.dtype)
    out = y.new_zeros(len(ids), layout.experts + 1, layout.hidden)  # the last for ids of -1
    out.scatter_(1, (ids % (layout.experts + 1)).unsqueeze(-1).expand_as(y), y)
    return out[:, :-1].transpose(0, 1).reshape(hidden.shape)


# Outside transformers' interface of experts, so without an `_apply_gate`: act_fn(gate) * up.
_HALVES = ("Llama4TextExperts", "LongcatFlashExperts")


def _read(module: nn.Module) -> ExpertsLayout | str | None:
    """The layout, or why there is none, or None for a module that holds no fused experts."""
    kind = type(module).__name__
    if kind == "DbrxExperts":
        found = _dbrx(module)
    else:
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
        if not shapes or not ("expert" in kind.lower() or _leads_and_back(shapes)):
            return None
        up = "gate_up_proj" if "gate_up_proj" in shapes else "up_proj"
        if shapes.keys() != {up, "down_proj"}:
            return f"its weights are {', '.join(shapes)}; expected gate_up_proj or up_proj, and down_proj"
        found = _fused(module, up, shapes[up], shapes["down_proj"])
    return found if isinstance(found, str) else _unreadable(module, found) or found


def _leads_and_back(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether matrices [E, ., .] look like the maps of experts, between a hidden size and an intermediate size, once or
    twice: as many of each, and not all of one shape, unlike the gates of heads, filters and tables of positions."""
    counts = {count for count, *_ in shapes.values()}
    return (
        len(counts) == 1
        and counts != {1}
        and len(set(shapes.values())) > 1
        and all(_between_same_sizes(a, b) for a, b in combinations(shapes.values(), 2))
    )


def _between_same_sizes(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether [E, N, K] and [E, N, K] have a size in common, and of the others one is the other or twice that."""
    return any(
        a[1 + i] == b[1 + j] and a[2 - i] in (b[2 - j], 2 * b[2 - j], b[2 - j] / 2) for i in (0, 1) for j in (0, 1)
    )


def _fused(module: nn.Module, up: str, up_shape: tuple[int, ...], down_shape: tuple[int, ...]) -> ExpertsLayout | str:
    kind = type(module).__name__
    if up == "up_proj":
        gate = "none"
    elif hasattr(module, "_apply_gate"):
        gate = "own"
    elif kind in _HALVES:
        gate = "halves"
    else:
        return "it has no _apply_gate, by which transformers' experts say how their gate is applied"
    if gate != "own" and not hasattr(module, "act_fn"):
        return "it has no act_fn"
    fitting = [transposed for transposed in (False, True) if _fits(up_shape, down_shape, transposed, gate)]
    transposed = getattr(module, "is_transposed", fitting[0] if len(fitting) == 1 else None)
    if transposed not in fitting:
        shapes = f"{up} {list(up_shape)} and down_proj {list(down_shape)}"
        return f"its weights have the shapes {shapes} and is_transposed is {transposed}, which do not fit"
    has_bias = getattr(module, "has_bias", False)
    found = {name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 2}
    if found != ({f"{up}_bias", "down_proj_bias"} if has_bias else set()):
        return f"has_bias is {has_bias}, and its parameters of two dimensions are {', '.join(sorted(found)) or 'none'}"
    E, N, K = _logical(down_shape, transposed)
    return ExpertsLayout(
        experts=E,
        hidden=N,
        intermediate=K,
        inputs=(ExpertWeight(up, f"{up}_bias" if has_bias else None, transposed),),
        down=ExpertWeight("down_proj", "down_proj_bias" if has_bias else None, transposed),
        gate=gate,
        activation="act_fn",
        norm="post_expert_norm" if getattr(module, "has_post_expert_norm", False) else None,
        dispatch="every" if kind == "Llama4TextExperts" else "picked",
        identity=kind == "LongcatFlashExperts",
    )


def _dbrx(module: nn.Module) -> ExpertsLayout:
    """DBRX: gate and up apart, all experts below each other, the down projection transposed."""
    return ExpertsLayout(
        experts=module.num_experts,
        hidden=module.hidden_size,
        intermediate=module.ffn_hidden_size,
        inputs=(ExpertWeight("mlp.w1", flat=True), ExpertWeight("mlp.v1", flat=True)),
        down=ExpertWeight("mlp.w2", transposed=True, flat=True),
        gate="apart",
        activation="mlp.activation_fn",
    )


def _logical(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    return (shape[0], shape[2], shape[1]) if transposed else shape


def _fits(up: tuple[int, ...], down: tuple[int, ...], transposed: bool, gate: str) -> bool:
    """Whether the maps lead from the hidden size to the intermediate size and back; `up` may have more experts."""
    (_, up_N, up_K), (_, down_N, down_K) = _logical(up, transposed), _logical(down, transposed)
    return up_K == down_N and up_N == (down_K if gate == "none" else 2 * down_K) and up[0] >= down[0]


def _unreadable(module: nn.Module, layout: ExpertsLayout) -> str | None:
    """Why the weights of a known layout cannot be read as plain tensors in memory, or replaced; None if they can."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance (hooks of accelerate do that)"
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        return "its weights are offloaded"
    for weight in layout.weights:
        try:
            tensor = weight.parameter(module)
        except AttributeError:
            return f"it has no {weight.name}"
        if tensor.device.type == "meta":
            return f"{weight.name} is offloaded or on the meta device"
        if type(tensor.data) is not torch.Tensor or tensor.dtype not in DTYPES:
            kind = f"a {type(tensor.data).__name__} of {tensor.dtype}"
            return f"{weight.name} is {kind}: quantised, distributed, or of a kind that hasten does not know"
        if not (tensor.is_contiguous() or tensor.mT.is_contiguous()):
            return f"{weight.name} is stored with strides {tuple(tensor.stride())}"
    return None
