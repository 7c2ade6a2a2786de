"""Dense decode by hasten's kernels, where they are faster than torch's."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from hasten.acceleration import measure
from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.edits import Edit, ReplaceForward
from hasten.acceleration.experts import ExpertsLayout, decode_experts, layout_of
from hasten.acceleration.families import CONFIGS_OF_EXPERTS, PICKS
from hasten.acceleration.forwards import Forward, decode_rows, matrix, product
from hasten.acceleration.parts import Experts, Projection
from hasten.acceleration.techniques.base import Settings, Skip, Technique
from hasten.kernels.storage import MAX_BATCH
from hasten.kernels.tuning import remembered
from hasten.model_facts import device_of


class DecodeLinear(Forward):
    """A dense projection whose decode products up to `max_batch` rows go through hasten's kernel."""

    def __init__(self, module: nn.Module, name: str, max_batch: int):
        super().__init__(module, name)
        self.max_batch = max_batch

    def is_own(self, x: torch.Tensor) -> bool:
        return 0 < decode_rows(x) <= self.max_batch

    def own(self, x: torch.Tensor) -> torch.Tensor:
        weight = matrix(self.module)
        return product(x.to(weight.dtype), weight, self.module.bias)


class DecodeExperts(Forward):
    """A mixture of experts that runs the picked experts of up to `max_batch` tokens by `expert_linear`."""

    def __init__(self, module: nn.Module, name: str, max_batch: int):
        super().__init__(module, name)
        self.layout, self.max_batch = layout_of(module), max_batch

    def is_own(self, hidden: torch.Tensor, top_k_index=None, top_k_weights=None) -> bool:
        return 0 < self.layout.tokens(hidden) <= self.max_batch

    def own(self, hidden: torch.Tensor, top_k_index=None, top_k_weights=None) -> torch.Tensor:
        return decode_experts(self.module, self.layout, hidden, top_k_index, top_k_weights)


@dataclass(frozen=True, slots=True)
class DenseDecode(Technique):
    """Exact: decode products (one token, batch 1 to 8) by hasten's dense kernels, wherever they measure faster than
    torch's on this machine.

    Args:
        always: use the kernels everywhere, measured faster or not.
    """

    always: bool = False

    exact: ClassVar[bool] = True
    yields: ClassVar[bool] = True
    portable: ClassVar[bool] = False

    def __post_init__(self):
        if not isinstance(self.always, bool):
            raise TypeError(f"always must be True or False, got {self.always!r}")

    def targets(self, anatomy):
        return tuple(_parts(anatomy))

    def settle(self, anatomy, statistics):
        """The largest batch of every part's kernel, 0 where torch is as fast; and the ratio at batch 1,
        by which that was found."""
        parts, picks = _parts(anatomy), _picks(anatomy)
        if self.always:
            return Settings({"max_batch": dict.fromkeys(parts, MAX_BATCH), "ratio": {}})
        alike: dict[tuple, list] = {}
        for part in parts.values():
            alike.setdefault(_shape(part), []).append(part)
        max_batch, ratio = {}, {}
        for same in alike.values():
            contest, device = partial(_contest, same, picks), device_of(same[0].module)
            key = f"dense decode on {_processor(device)}: {_shape(same[0])}, {'one' if len(same) == 1 else 'several'}"
            if isinstance(same[0], Experts):
                key += f", {picks} picked"
            largest, at_one = remembered(key, partial(measure.faster_up_to, contest, device))
            max_batch |= dict.fromkeys((part.name for part in same), largest)
            ratio |= dict.fromkeys((part.name for part in same), at_one)
        return Settings({"max_batch": max_batch, "ratio": ratio})

    def edits(self, anatomy, settings) -> list[Edit]:
        edits = []
        for name, part in _parts(anatomy).items():
            if max_batch := settings.values["max_batch"][name]:
                kind = DecodeExperts if isinstance(part, Experts) else DecodeLinear
                edits.append(ReplaceForward(name, partial(kind, max_batch=max_batch)))
        return edits

    def skips(self, anatomy, settings) -> list[Skip]:
        return [
            Skip(
                name, f"torch's product is as fast on this shape here (hasten's: {settings.values['ratio'][name]:.2f}x)"
            )
            for name, max_batch in settings.values["max_batch"].items()
            if not max_batch
        ]


def _parts(anatomy: Anatomy) -> dict[str, Projection | Experts]:
    head = [anatomy.head] if anatomy.head else []
    return {part.name: part for part in (*anatomy.with_shared, *anatomy.experts, *head)}


def _picks(anatomy: Anatomy) -> int:
    """How many experts a token picks; 2 where the configuration does not tell."""
    config = anatomy.model.config.get_text_config(decoder=True)
    for place in (config, *(getattr(config, name, None) for name in CONFIGS_OF_EXPERTS)):
        for name in PICKS:
            value = getattr(place, name, None)
            value = max(value, default=0) if isinstance(value, list) else value  # one for each layer
            if isinstance(value, int) and value > 0:
                return value
    return 2


def _processor(device: torch.device) -> str:
    """The GPU's model; of CPUs the type alone, for what is remembered is kept by their model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _shape(part: Projection | Experts) -> tuple:
    """What the speed of a part depends on."""
    weights = [
        (*weight.shape, *weight.stride()[-2:], str(weight.dtype)) for weight in part.module.parameters(recurse=False)
    ]
    return type(part).__name__, *weights


def _contest(parts: list, picks: int, batch: int, turn: int) -> tuple[Callable, Callable]:
    """A product as torch computes it and one as hasten does, for `batch` rows, on different parts of one shape in turn,
    so that weights are as cold as in decode."""
    theirs, ours = (parts[(turn + shift) % len(parts)].module for shift in (0, len(parts) // 2))
    if isinstance(parts[0], Experts):
        layout = layout_of(ours)
        call = _example(ours, layout, picks, batch)
        return partial(theirs, *call), partial(decode_experts, ours, layout, *call)
    x = torch.randn(batch, 1, matrix(ours).shape[1], dtype=ours.weight.dtype, device=ours.weight.device)
    return partial(theirs, x), partial(product, x, matrix(ours), ours.bias)


def _example(module: nn.Module, layout: ExpertsLayout, picks: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """The arguments of a call for `tokens` tokens, each of which picks `picks` experts at random."""
    weight = layout.down.parameter(module)
    hidden = torch.randn(tokens, layout.hidden, dtype=weight.dtype, device=weight.device)
    index = torch.rand(tokens, layout.experts, device=weight.device).topk(min(picks, layout.experts)).indices
    if layout.dispatch == "every":
        picked = torch.zeros(layout.experts, tokens, 1, dtype=weight.dtype, device=weight.device)
        picked[index.t(), torch.arange(tokens, device=index.device)] = 1
        return ((hidden * picked).view(-1, layout.hidden),)
    return hidden, index, torch.full_like(index, 0.5, dtype=weight.dtype)
