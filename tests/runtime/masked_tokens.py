"""The definition of vision-token pruning: an unmodified model of full length, in which no query sees a dropped token.

Written apart from what hasten installs: with eager attention, whose weights rank the tokens, with full caches, and with
masks that are edited before each decoder layer.
"""

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn


@dataclass
class Masked:
    """What is masked in a model.

    Args:
        model: in eval mode, with eager attention.
        stages: the share of the image tokens that layers see, from each of these layers on.
        ids: the tokens that stand for images.
        asks: which query ranks tokens: the last token of a prompt, or its last "image" token.

    Attributes:
        hidden: by layer, bool [B, R] of all tokens read: those that no query sees.
        kept: by stage and pass, the tokens of each row that are left.
    """

    model: nn.Module
    stages: Mapping[int, float]
    ids: tuple[int, ...]
    asks: str = "last"
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    kept: list[dict[int, list[list[int]]]] = field(default_factory=list)

    def begin(self, model, arguments, keywords):
        ids = inspect.signature(type(model).forward).bind(model, *arguments, **keywords).arguments["input_ids"]
        cache, self.weights = keywords.get("past_key_values"), None
        self.read = 0 if cache is None else cache.get_seq_length()
        self.images = torch.isin(ids, torch.tensor(self.ids)) & (ids.shape[1] > 1)
        mask = keywords.get("attention_mask")
        self.real = torch.ones_like(ids).bool() if mask is None else mask[:, -ids.shape[1] :].bool()
        for row in range(len(ids)):  # the last token's prediction is wanted
            self.images[row, int(self.real[row].nonzero().max())] = False
        self.dropped = torch.zeros_like(self.images)
        if not self.read:
            self.hidden = {}
        if self.images.any():
            self.kept.append({})

    def before_layer(self, layer, module, arguments, keywords):
        if layer in self.stages and self.images.any():
            self.drop(layer)
        before = self.hidden.get(layer, self.dropped.new_zeros(len(self.dropped), self.read))
        if len(before) != len(self.dropped):  # a prompt in as many rows as beams or samples
            before = before.repeat_interleave(len(self.dropped) // len(before), 0)
        self.hidden[layer] = hidden = torch.cat([before, self.dropped], 1)
        mask = keywords["attention_mask"]
        lowest = torch.finfo(mask.dtype).min
        hidden = hidden[:, None, None, -mask.shape[-1] :]
        return arguments, keywords | {"attention_mask": mask.masked_fill(hidden, lowest)}

    def drop(self, layer):
        kept = {}
        for row, images in enumerate(self.images):
            candidates = (images & ~self.dropped[row]).nonzero()[:, 0].tolist()
            places = (images & ~self.dropped[row] if self.asks == "image" else self.real[row]).nonzero()
            scores = self.weights[row, :, int(places.max())].mean(0)[-len(images) :]
            count = math.ceil(self.stages[layer] * int(images.sum()) - 1e-9)
            best = sorted(candidates, key=lambda token: (-float(scores[token]), token))[:count]
            self.dropped[row, [token for token in candidates if token not in best]] = True
            kept[row] = sorted(best)
        self.kept[-1][layer] = list(kept.values())

    def after_attention(self, layer, module, arguments, output):
        if layer + 1 in self.stages:
            self.weights = output[1].float()  # [B, H, T, N]


@contextlib.contextmanager
def masked(model: nn.Module, stages: Mapping[int, float], ids: tuple[int, ...], asks: str = "last") -> Iterator[Masked]:
    """A block in which `model` runs with dropped tokens masked, and eager attention."""
    reference = Masked(model, stages, ids, asks)
    decoder = model.get_decoder()
    attention, decoder.config._attn_implementation = decoder.config._attn_implementation, "eager"
    handles = [model.register_forward_pre_hook(reference.begin, with_kwargs=True)]
    for index, layer in enumerate(decoder.layers):
        handles.append(layer.register_forward_pre_hook(partial(reference.before_layer, index), with_kwargs=True))
        handles.append(layer.self_attn.register_forward_hook(partial(reference.after_attention, index)))
    try:
        yield reference
    finally:
        decoder.config._attn_implementation = attention
        for handle in handles:
            handle.remove()
