"""What ranks the image tokens of a prompt."""

import copy
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hasten.acceleration.edits import Edit
from hasten.acceleration.shortened_cache import Entries
from hasten.errors import StateError

if TYPE_CHECKING:
    from hasten.acceleration.techniques.vision_token_layers import Pass, VisionTokenPruning

LISTENED = "hasten_listened"  # the name by which transformers knows `listened_attention`


class Score(ABC):
    """Ranks tokens before a layer."""

    attends = False  # whether it needs the attention of the layer before each stage

    @abstractmethod
    def __call__(self, present: "Pass", layer: int, entries: Entries) -> torch.Tensor:
        """float32 [B, n], the greater the better, of the tokens of a pass that the layer before this one saw."""

    def queries(self, present: "Pass", entries: Entries) -> torch.Tensor:
        """int64 [B, Q]: the places among `entries` whose attention counts, -1 for none."""
        raise NotImplementedError


class Random(Score):
    """The baseline: no order at all, the same for the same tokens and seed."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, present, layer, entries):
        rows = []
        for ids in present.ids.cpu():
            places = torch.arange(1, len(ids) + 1)
            seed = (self.seed * 1_000_003 + int((ids * places * places).sum())) % 2**63
            rows.append(torch.rand(len(ids), generator=torch.Generator().manual_seed(seed)))
        return torch.stack(rows).to(entries.tokens.device).gather(1, entries.tokens)


class LastToken(Score):
    """The attention of the last token, the mean over heads (FastV, Chen et al. 2024, arXiv 2403.06764); with
    `per_turn`, of the last image token, which has not read the question that follows."""

    attends = True

    def __init__(self, per_turn: bool):
        self.per_turn = per_turn

    def __call__(self, present, layer, entries):
        return present.scores

    def queries(self, present, entries):
        wanted = present.images if self.per_turn else None
        if wanted is None and present.real is not None:
            wanted = present.real[:, -present.count :]
        places = torch.arange(entries.tokens.shape[1], device=entries.tokens.device).expand_as(entries.tokens)
        if wanted is not None:
            wanted = wanted.gather(1, entries.tokens)
            if entries.bias is not None:
                wanted &= entries.bias > -torch.inf
            places = places * wanted
        return places.max(1, keepdim=True).values


@dataclass(slots=True)
class ListenToAttention(Edit):
    """Lets `pruning` see the queries and keys of the attention called `name`, the attention of decoder layer `layer`.

    Its configuration becomes a copy that names an attention function of hasten's, which calls the one that the model's
    own configuration names."""

    name: str
    layer: int
    pruning: "VisionTokenPruning"
    config: Any = None

    def apply(self, model: nn.Module) -> None:
        AttentionInterface.register(LISTENED, listened_attention)
        module = model.get_submodule(self.name)
        self.config = module.config
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = LISTENED
        module._hasten_listener = Listener(self.layer, self.pruning, self.config)

    def check(self, model: nn.Module) -> None:
        module = model.get_submodule(self.name)
        if module.config._attn_implementation != LISTENED:
            raise StateError(
                f"the configuration of {self.name} was replaced after hasten.accelerate: undo that, then "
                "hasten.revert(model)"
            )

    def undo(self, model: nn.Module) -> None:
        if self.config is not None:
            module = model.get_submodule(self.name)
            module.config = self.config
            vars(module).pop("_hasten_listener", None)


@dataclass(slots=True)
class Listener:
    """What an attention module has for `listened_attention`: the number of its layer, and the model's configuration."""

    layer: int
    pruning: "VisionTokenPruning"
    config: Any


def listened_attention(module, query, key, value, attention_mask, **keywords):
    """The attention function of a module that `ListenToAttention` was applied to: query [B, H, n, D], key
    [B, G, N, D], rotated, as transformers calls it."""
    listener = module._hasten_listener
    listener.pruning.listen(listener.layer, query, key, keywords.get("scaling"))
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(listener.config._attn_implementation, eager)
    return attend(module, query, key, value, attention_mask, **keywords)
