"""Decoder layers that run on fewer image tokens, inside the unmodified forward of a multimodal model.

One pass of the model reads some tokens: a prompt, a part of one, or one token of an answer. `VisionTokenPruning` finds
the image tokens among them when the pass begins. Before a stage, a layer drops those that score least; it and the
layers after it get hidden states, rotary tables, positions and masks of the tokens that are left, and store no others.
After the last layer every token has its old place again; one that was dropped has no prediction, its values are NaN.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache

from hasten.acceleration.caches import CACHES, with_own_entries
from hasten.acceleration.forwards import Forward
from hasten.acceleration.shortened_cache import Entries, ShortenedLayer
from hasten.acceleration.shortened_masks import along_tokens, cut_mask
from hasten.acceleration.techniques.vision_token_pass import Pass, VisionTokenPruning, first_of, is_shortened


class PrunedLayer(Forward):
    """The forward of one decoder layer, on the tokens that are left.

    Args:
        pruning: of the model.
        index: the number of the layer, and of its entries in a cache.
    """

    def __init__(self, module: nn.Module, name: str, pruning: VisionTokenPruning, index: int):
        super().__init__(module, name)
        self.pruning, self.index = pruning, index
        self.parameters = [word for word in inspect.signature(type(module).forward).parameters if word != "self"]
        self.causal = all(getattr(below, "is_causal", True) for below in module.modules())

    def is_own(self, hidden_states, *arguments, **keywords) -> bool:
        present = self.pruning.present
        if present is None:
            return False
        return present.images is not None or is_shortened(_cache(keywords), self.index)

    def own(self, hidden_states, *arguments, **keywords):
        keywords = dict(zip(self.parameters[1:], arguments, strict=False)) | keywords
        present = self.pruning.present
        if present.images is not None and self.index in self.pruning.stages:
            drop = self.pruning.drop(self.index, hidden_states)
            hidden_states = drop(hidden_states)
            present.entries = drop.after
        keywords = self._shortened(present, hidden_states, keywords)
        return type(self.module).forward(self.module, hidden_states, **keywords)

    def _shortened(self, present: Pass, hidden_states: torch.Tensor, keywords: dict[str, Any]) -> dict[str, Any]:
        """The other arguments of a call for the tokens that are left; the cache is told which these are."""
        cache, entries = _cache(keywords), present.entries
        queries = keys = entries or present.all_entries(hidden_states)
        if cache is not None:
            layer = _shortened_layer(cache, self.index)
            layer.next = keys = present.once(_following, layer.entries, queries)
        keywords = dict(keywords)
        for name, value in keywords.items():
            if name == "attention_mask":
                how = (hidden_states.dtype, self.pruning.flash, self.causal)
                keywords[name] = present.once(cut_mask, value, queries, keys, *how)
            elif entries is not None and name not in CACHES:
                keywords[name] = present.once(_of_tokens, value, entries)
        return keywords

    def beside_definition(self, hidden_states, *arguments, **keywords):
        """A call on an empty cache, and the layer of the model's class on all tokens, with the dropped ones masked."""
        keywords = dict(zip(self.parameters[1:], arguments, strict=False)) | keywords
        present = self.pruning.present
        own = {name: with_own_entries(value, {self.index}) for name, value in keywords.items()}
        if present.images is None or self.pruning.merges or _length(_cache(keywords), self.index):
            return super().beside_definition(hidden_states, **keywords)
        before = present.entries
        written = self.own(hidden_states, **own)
        after, present.entries, present.heard = present.entries, before, False
        masked = self._masked(present, hidden_states, before, after, keywords)
        present.heard = True
        return first_of(written), masked.gather(1, after.tokens[..., None].expand(-1, -1, masked.shape[2]))

    def _masked(self, present, hidden_states, before: Entries | None, after: Entries, keywords):
        """The hidden states [B, T, D] that the layer returns for all tokens, of which those not in `after` are seen by
        none."""
        if before is not None:
            full = hidden_states.new_zeros(len(hidden_states), present.count, hidden_states.shape[2])
            hidden_states = full.scatter_(1, before.tokens[..., None].expand_as(hidden_states), hidden_states)
        seen = torch.full(present.images.shape, -torch.inf, device=hidden_states.device)
        seen.scatter_(1, after.tokens, torch.zeros_like(seen) if after.bias is None else after.bias)
        everything = present.all_entries(hidden_states)
        masked = Entries(everything.tokens, seen, present.count)
        how = (hidden_states.dtype, self.pruning.flash, self.causal)
        mask = cut_mask(keywords.get("attention_mask"), everything, masked, *how)
        keywords = {name: value for name, value in keywords.items() if name not in CACHES} | {"attention_mask": mask}
        return first_of(type(self.module).forward(self.module, hidden_states, **keywords))


def _cache(keywords: Mapping[str, Any]) -> Cache | None:
    """The cache among a layer's arguments."""
    return next((keywords[name] for name in CACHES if keywords.get(name) is not None), None)


def _length(cache: Cache | None, index: int) -> int:
    return 0 if cache is None else cache.get_seq_length(index)


def _of_tokens(value: Any, entries: Entries) -> Any:
    """An argument for some of the tokens it is for: rotary tables [..., T, D], positions and others [.., T, ..]."""
    if isinstance(value, tuple | list):
        return type(value)(_of_tokens(part, entries) for part in value)
    if not isinstance(value, torch.Tensor) or entries.read not in value.shape[1:]:
        return value
    if value.is_floating_point() and value.dim() >= 3 and value.shape[-2] == entries.read:
        return along_tokens(value, entries.tokens, -2)
    return along_tokens(value, entries.tokens, 1 if value.shape[1] == entries.read else -1)


def _following(before: Entries | None, entries: Entries) -> Entries:
    return entries if before is None else before.followed_by(entries)


def _shortened_layer(cache: Cache, index: int) -> ShortenedLayer:
    """A layer of a cache, made one that can be shortened."""
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    if not isinstance(cache.layers[index], ShortenedLayer):
        cache.layers[index] = ShortenedLayer.taking_over(cache.layers[index])
    return cache.layers[index]
