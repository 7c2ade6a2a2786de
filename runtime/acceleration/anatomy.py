"""What hasten finds in a model: decoder layers and their projections. The one place that knows model families, which are data here."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from hasten.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Family:
    """Where a family of decoders keeps the projections of a layer, as paths below the layer.

    Roles: `q k v` or the fused `qkv`, `o`; `gate up down` or the fused `gate_up down` of a gated MLP (gate rows first); `up down` of a plain one.
    """

    projections: dict[str, str]
    mlp: str | None = None
    activation: str | None = None


_SEPARATE_ATTENTION = {role: f"self_attn.{role}_proj" for role in "qkvo"}
_LLAMA = Family(
    _SEPARATE_ATTENTION | {role: f"mlp.{role}_proj" for role in ("gate", "up", "down")},
    mlp="mlp",
    activation="mlp.act_fn",
)
_PHI3 = Family(
    {
        "qkv": "self_attn.qkv_proj",
        "o": "self_attn.o_proj",
        "gate_up": "mlp.gate_up_proj",
        "down": "mlp.down_proj",
    },
    mlp="mlp",
    activation="mlp.activation_fn",
)
_GPT_NEOX = Family(
    {
        "qkv": "attention.query_key_value",
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    }
)
_OPT = Family(_SEPARATE_ATTENTION | {"o": "self_attn.out_proj", "up": "fc1", "down": "fc2"})

# By the `model_type` of the text decoder's own config, which is also what a multimodal wrapper holds.
_LLAMA_LIKE = (
    "llama", "mistral", "ministral", "ministral3", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text",
    "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "olmo3", "granite", "smollm3",
)  # fmt: skip
FAMILIES: dict[str, Family] = dict.fromkeys(_LLAMA_LIKE, _LLAMA) | {
    "phi3": _PHI3,
    "gpt_neox": _GPT_NEOX,
    "opt": _OPT,
}


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear map of the model, [N, K]. `name` is its path in the model."""

    name: str
    role: str
    module: nn.Linear


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder layer. `mlp_name` and `activation_name` are paths in the model, None where the family has no gated MLP; `mlp_refusal` says why
    the MLP as a whole cannot be replaced, None if it can."""

    name: str
    module: nn.Module
    projections: tuple[Projection, ...]
    mlp_name: str | None
    activation_name: str | None
    mlp_refusal: UnsupportedModelError | None = None

    def projection(self, role: str) -> Projection | None:
        return next((projection for projection in self.projections if projection.role == role), None)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The decoder found in a model: `model_type` of its family, its layers in order, the head that makes logits, if there is one, and what was
    left out because hasten cannot change it."""

    model_type: str
    blocks: tuple[Block, ...]
    head: Projection | None
    skipped: tuple[UnsupportedModelError, ...] = ()

    def projections(self) -> Iterator[Projection]:
        """Every projection of every layer, without the head."""
        for block in self.blocks:
            yield from block.projections


def dissect(model: nn.Module, strict: bool = True) -> Anatomy:
    """Finds the text decoder of a `transformers` model, also inside a multimodal wrapper.

    Args:
        strict: False leaves out modules that cannot be changed, and lists them in `skipped`.

    Raises:
        UnsupportedModelError: no decoder of a known family, several of them, or (with `strict`, or if nothing else is left) a module that hasten
            cannot read or replace: a mixture of experts, quantised, offloaded or meta weights, a module whose class or forward was replaced.
    """
    decoders = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and _model_type(module) in FAMILIES
    ]
    if len(decoders) != 1:
        raise _not_one_decoder(model, [name for name, _ in decoders])
    decoder_name, decoder = decoders[0]
    family = FAMILIES[_model_type(decoder)]
    prefix = f"{decoder_name}." if decoder_name else ""
    skipped: list[UnsupportedModelError] = []
    blocks = tuple(_block(f"{prefix}layers.{i}", layer, family, skipped) for i, layer in enumerate(decoder.layers))
    head = _head(model, skipped)
    if head is None and not skipped:
        raise UnsupportedModelError(
            "", type(model).__qualname__, "it has no language-model head", "pass the ...ForCausalLM model"
        )
    if skipped and (strict or not any(block.projections for block in blocks)):
        raise skipped[0]
    anatomy = Anatomy(_model_type(decoder), blocks, head, tuple(skipped))
    _one_device(anatomy)
    _nothing_shared(anatomy)
    return anatomy


def _model_type(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "model_type", None)


def _block(name: str, layer: nn.Module, family: Family, skipped: list[UnsupportedModelError]) -> Block:
    def path(below: str | None) -> str | None:
        return f"{name}.{below}" if below else None

    projections = []
    for role, below in family.projections.items():
        try:
            module = layer.get_submodule(below)
        except AttributeError:
            skipped.append(_missing(name, layer, below))
            continue
        if refusal := _refusal(path(below), module):
            skipped.append(refusal)
        else:
            projections.append(Projection(path(below), role, module))
    refusal = _mlp_refusal(path(family.mlp), layer.get_submodule(family.mlp), projections) if family.mlp else None
    return Block(name, layer, tuple(projections), path(family.mlp), path(family.activation), refusal)


def _mlp_refusal(name: str, mlp: nn.Module, projections: list[Projection]) -> UnsupportedModelError | None:
    """Why a gated MLP cannot be replaced as a whole: it computes something of its own, or something listens inside."""
    kind = f"{type(mlp).__module__}.{type(mlp).__qualname__}"
    inner = {p.role: p.module for p in projections if p.name.startswith(f"{name}.")}
    if not (inner.keys() >= {"gate", "up", "down"} or inner.keys() >= {"gate_up", "down"}):
        return UnsupportedModelError(
            name, kind, "not all of its projections can be changed", "see the reasons for those"
        )
    if not type(mlp).__module__.startswith("transformers.models.") or "forward" in vars(mlp):
        return UnsupportedModelError(
            name, kind, "its forward is not the stock one of the family", "use hasten.Wina or hasten.Teal"
        )
    for role, module in inner.items():
        if role != "gate" and (module._forward_hooks or module._forward_pre_hooks):
            return UnsupportedModelError(
                name, kind, f"its {role} projection has forward hooks, which would not run", "remove them first"
            )
    return None


def _head(model: nn.Module, skipped: list[UnsupportedModelError]) -> Projection | None:
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        return None
    name = next(name for name, candidate in model.named_modules() if candidate is module)
    if refusal := _refusal(name, module):
        skipped.append(refusal)
        return None
    return Projection(name, "head", module)


def _refusal(name: str, module: nn.Module) -> UnsupportedModelError | None:
    """Why `module` is not a plain `nn.Linear` over a plain floating-point tensor in memory; None if it is."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if type(module) is not nn.Linear:
        if any(hasattr(module, mark) for mark in ("quant_state", "qweight", "weight_scale", "qtype", "weight_qtype")):
            return UnsupportedModelError(
                name, kind, "its weight is already quantised", "load the model without quantisation"
            )
        remedy = "merge or unload adapters and other wrappers before hasten.accelerate"
        return UnsupportedModelError(name, kind, "it is not a plain torch.nn.Linear", remedy)
    weight = module.weight
    if "weight" not in module._parameters:
        reason = "its weight is computed (a parametrisation, or torch.nn.utils.prune)"
        return UnsupportedModelError(name, kind, reason, "make it permanent first, e.g. torch.nn.utils.prune.remove")
    if weight.device.type == "meta" or getattr(getattr(module, "_hf_hook", None), "offload", False):
        remedy = "load the whole model into the memory of one device"
        return UnsupportedModelError(name, kind, "its weight is offloaded or on the meta device", remedy)
    if type(weight.data) is not torch.Tensor or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reason = f"its weight is a {type(weight.data).__name__} of {weight.dtype}: quantised, or of a kind that hasten does not know"
        return UnsupportedModelError(name, kind, reason, "load the model in float32, float16 or bfloat16")
    if not weight.is_contiguous():
        reason = f"its weight is stored with strides {tuple(weight.stride())}"
        return UnsupportedModelError(name, kind, reason, "make it contiguous first")
    if "forward" in vars(module):
        reason = "its forward was replaced on the instance (hooks of accelerate do that)"
        return UnsupportedModelError(name, kind, reason, "remove the hook first")
    return None


def _one_device(anatomy: Anatomy) -> None:
    everything = [*anatomy.projections(), *([anatomy.head] if anatomy.head else [])]
    first = everything[0]
    for projection in everything:
        if projection.module.weight.device != first.module.weight.device:
            raise UnsupportedModelError(
                projection.name,
                type(projection.module).__qualname__,
                f"it is on {projection.module.weight.device}, {first.name} is on {first.module.weight.device}",
                "move the model to one device",
            )


def _nothing_shared(anatomy: Anatomy) -> None:
    owners: dict[int, str] = {}
    for projection in anatomy.projections():
        owner = owners.setdefault(id(projection.module.weight), projection.name)
        if owner != projection.name:
            kind, reason = type(projection.module).__qualname__, f"it shares its weight with {owner}"
            raise UnsupportedModelError(projection.name, kind, reason, "give each layer its own weights")


def _missing(name: str, layer: nn.Module, below: str) -> UnsupportedModelError:
    experts = _experts(layer)
    if experts:
        inner, module = experts
        return UnsupportedModelError(
            f"{name}.{inner}",
            type(module).__qualname__,
            "it is a mixture of experts, whose weights are picked per token",
            "hasten supports dense MLPs only",
        )
    return UnsupportedModelError(
        name, type(layer).__qualname__, f"it has no {below}", "only the stock layers of the family are known"
    )


def _experts(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The first module below `module` that looks like a mixture of experts, the most telling class names first."""
    for mark in ("moeblock", "experts", "moe"):
        for name, child in module.named_modules():
            if name and mark in type(child).__name__.lower():
                return name, child
    return None


def _not_one_decoder(model: nn.Module, found: list[str]) -> UnsupportedModelError:
    kind = type(model).__qualname__
    if found:
        return UnsupportedModelError("", kind, f"it has several decoders: {', '.join(found)}", "pass one of them")
    experts = _experts(model)
    if experts:
        name, module = experts
        return UnsupportedModelError(
            name,
            type(module).__qualname__,
            "it is a mixture of experts, whose weights are picked per token",
            "hasten supports dense MLPs only",
        )
    known = ", ".join(sorted(FAMILIES))
    return UnsupportedModelError(
        "", kind, f"no decoder of a known family (its model_type is {_model_type(model)!r})", f"known are {known}"
    )
