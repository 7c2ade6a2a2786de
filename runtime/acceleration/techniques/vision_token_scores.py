"""What ranks the image tokens of a prompt."""

import copy
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hasten.acceleration.edits import Edit
from hasten.acceleration.image_tokens import ImageTokens
from hasten.acceleration.shortened_cache import Entries
from hasten.acceleration.vision_tower import VisionTower
from hasten.errors import StateError
from hasten.kernels.token_scores import token_scores
from hasten.sparsity.vision_tokens import random_scores, text_raters

if TYPE_CHECKING:
    from hasten.acceleration.techniques.vision_token_layers import Pass, VisionTokenPruning

LISTENED = "hasten_listened"  # the name by which transformers knows `listened_attention`
ASKED = 64  # patches whose attention stands for that of all, in a tower without a class token


class Score(ABC):
    """Ranks the image tokens of a pass before a layer."""

    @abstractmethod
    def __call__(self, present: "Pass", layer: int, entries: Entries) -> torch.Tensor:
        """float32 [B, n], the greater the better: of the tokens of a pass that the layer before this one saw."""

    def edits(self, pruning: "VisionTokenPruning", images: ImageTokens) -> list[Edit]:
        """What lets it see what it ranks by."""
        return []


class Random(Score):
    """The baseline: no order at all, the same for the same tokens and seed."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, present, layer, entries):
        places = torch.arange(1, present.count + 1)
        sums = (present.ids.cpu() * places * places).sum(1).tolist()
        scores = [random_scores((self.seed * 1_000_003 + number) % 2**63, 1, present.count) for number in sums]
        return torch.cat(scores).to(entries.tokens.device).gather(1, entries.tokens)


class Attention(Score):
    """The attention, in the layer before, of some of the tokens; the mean over these and over heads."""

    def __call__(self, present, layer, entries):
        return present.scores

    def edits(self, pruning, images):
        return [ListenToAttention(images.attentions[layer - 1], pruning.listen) for layer in pruning.stages]

    @abstractmethod
    def queries(self, present: "Pass", entries: Entries) -> torch.Tensor:
        """int64 [B, Q]: the places among `entries` of the tokens whose attention counts, -1 for none."""


class LastToken(Attention):
    """The attention of the last token (FastV, Chen et al. 2024, arXiv 2403.06764); with `per_turn`, of the last image
    token, which has not read the question that follows."""

    def __init__(self, per_turn: bool):
        self.per_turn = per_turn

    def queries(self, present, entries):
        wanted = entries.seen()
        if self.per_turn:
            wanted = wanted & present.images.gather(1, entries.tokens)
        elif present.real is not None:
            wanted = wanted & present.real[:, -present.count :].gather(1, entries.tokens)
        return _places(entries).where(wanted, 0).max(1, keepdim=True).values


class TextRaters(Attention):
    """The attention of those text tokens that are most alike to the image (SparseVLM, Zhang et al. 2024, arXiv
    2410.04417)."""

    def edits(self, pruning, images):
        return [WatchEmbeddings(next(iter(images.layers)), pruning), *super().edits(pruning, images)]

    def queries(self, present, entries):
        raters = present.once(self._raters, present)
        return _packed(_places(entries), raters.gather(1, entries.tokens) & entries.seen(), -1)

    def _raters(self, present: "Pass") -> torch.Tensor:
        """bool [B, T]"""
        text = ~present.images
        if present.real is not None:
            text &= present.real[:, -present.count :]
        images = present.images | ~present.images.any(1, keepdim=True)  # a row without any rates all the same
        places = _packed(torch.arange(present.count, device=text.device).expand_as(text), text, -1)
        rows = torch.arange(len(text), device=text.device)[:, None]
        rated = text_raters(present.embeddings, present.embeddings[rows, places.clamp(min=0)], images, places >= 0)
        return torch.zeros_like(text).int().scatter_reduce(1, places.clamp(min=0), rated.int(), "amax").bool()


class VisionSide(Score):
    """The attention in the vision tower: of its class token (as VisionZip, Yang et al. 2024, arXiv 2412.04467, ranks),
    or, of a tower without one, of ASKED of its patches, evenly spaced. It knows nothing of the text.

    Args:
        tower: of the model.
    """

    def __init__(self, tower: VisionTower):
        self.tower = tower

    def edits(self, pruning, images):
        return [ListenToAttention(self.tower.attention, ToTower(pruning, self.tower.class_token))]

    def __call__(self, present, layer, entries):
        return present.once(self._of_all, present).gather(1, entries.tokens)

    def _of_all(self, present: "Pass") -> torch.Tensor:
        """float32 [B, T], 0 for text."""
        if not present.attended:
            raise ValueError("score='vision' ranks by the vision tower: give the pictures in the pass that reads them")
        scores = self.tower.of_tokens(present.attended, int(present.placeholders.sum()), present.given)
        return torch.zeros(present.ids.shape, device=scores.device).masked_scatter(present.placeholders, scores)


@dataclass(slots=True)
class WatchEmbeddings(Edit):
    """Keeps what the first decoder layer, called `name`, gets in a pass with images."""

    name: str
    pruning: "VisionTokenPruning"
    handles: list[RemovableHandle] = field(default_factory=list)

    def apply(self, model: nn.Module) -> None:
        layer = model.get_submodule(self.name)
        self.handles.append(layer.register_forward_pre_hook(self.keep, with_kwargs=True))

    def keep(self, layer: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        present = self.pruning.present
        if present is not None and present.images is not None:
            present.embeddings = arguments[0] if arguments else keywords["hidden_states"]

    def undo(self, model: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()


@dataclass(slots=True)
class ListenToAttention(Edit):
    """Lets `listener` have every call of the attention called `name`: its (query, key, mask, causal, scale, softcap).

    Its configuration becomes a copy that names an attention function of hasten's, which calls the one that the model's
    own configuration names."""

    name: str
    listener: Callable[..., None]
    config: Any = None

    def apply(self, model: nn.Module) -> None:
        AttentionInterface.register(LISTENED, listened_attention)
        module = model.get_submodule(self.name)
        self.config = module.config
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = LISTENED
        module._hasten_listener = (self.listener, self.config)

    def check(self, model: nn.Module) -> None:
        if model.get_submodule(self.name).config._attn_implementation != LISTENED:
            raise StateError(
                f"the configuration of {self.name} was replaced after hasten.accelerate: undo that, then "
                "hasten.revert(model)"
            )

    def undo(self, model: nn.Module) -> None:
        if self.config is not None:
            module = model.get_submodule(self.name)
            module.config = self.config
            vars(module).pop("_hasten_listener", None)


def listened_attention(module, query, key, value, attention_mask, **keywords):
    """The attention function of a module that `ListenToAttention` was applied to: query [B, H, n, D], key
    [B, G, N, D], rotated, as transformers calls it."""
    listener, config = module._hasten_listener
    causal = keywords.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    listener(query, key, attention_mask, causal, keywords.get("scaling"), keywords.get("softcap"))
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    return attend(module, query, key, value, attention_mask, **keywords)


@dataclass(slots=True)
class ToTower:
    """Listens to the attention of a vision tower."""

    pruning: "VisionTokenPruning"
    class_token: bool

    def __call__(self, query, key, mask, causal, scale, softcap):
        present = self.pruning.present
        if present is None:
            return
        count = query.shape[2]
        asked = query[:, :, :1] if self.class_token else query[:, :, :: math.ceil(count / ASKED)]
        scores = token_scores(asked.transpose(1, 2), key, scale=scale)
        present.attended.append(scores[:, 1:] if self.class_token else scores)


def _places(entries: Entries) -> torch.Tensor:
    """int64 [B, n]: the place of each among them."""
    return torch.arange(entries.tokens.shape[1], device=entries.tokens.device).expand_as(entries.tokens)


def _packed(values: torch.Tensor, chosen: torch.Tensor, filler: int) -> torch.Tensor:
    """The `chosen` [B, n] of `values` [B, n], in order, in as many columns as the longest row takes; then `filler`."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)[:, : int(chosen.sum(1).max())]
    return values.gather(1, order).where(chosen.gather(1, order), filler)
