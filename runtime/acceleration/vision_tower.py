"""The vision tower of a multimodal model: whose attention ranks patches, and which image tokens these become."""

import contextlib
import inspect
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hasten.acceleration.families import VISION_TOWERS
from hasten.acceleration.image_tokens import attentions_below
from hasten.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class TowerRun:
    """What those that listen to a tower must know of its run.

    Attributes:
        places: int64 [tiles], for each tile of the call its place among those that are computed; None where all are.
        heard: whether it counts: not what runs beside a call to check it.
    """

    places: torch.Tensor | None = None
    heard: bool = True


_present: ContextVar[TowerRun | None] = ContextVar("hasten_tower_run", default=None)  # of this thread


def present_run() -> TowerRun:
    """The run of the vision tower of which this is a part."""
    return _present.get() or TowerRun()


@contextlib.contextmanager
def run_with(places: torch.Tensor) -> Iterator[None]:
    """While open, a tower computes some of the tiles, of which each tile of the call has one in these places."""
    before = _present.set(TowerRun(places, present_run().heard))
    try:
        yield
    finally:
        _present.reset(before)


@contextlib.contextmanager
def run_unheard() -> Iterator[None]:
    """While open, runs of a tower do not count."""
    before = _present.set(TowerRun(heard=False))
    try:
        yield
    finally:
        _present.reset(before)


@dataclass(frozen=True, slots=True)
class VisionTower:
    """A vision tower and the attention of its last layer that is used.

    Attributes:
        name: its path in the model.
        module: it.
        owner: the module that holds it, which puts its features into the order of image tokens; `owner_name` is its
            path.
        attention: the path of that attention.
        class_token: whether the first of its tokens stands for the whole image.
    """

    name: str
    module: nn.Module
    owner: nn.Module
    owner_name: str
    attention: str
    class_token: bool

    def of_tokens(self, patches: Sequence[torch.Tensor], count: int, given: Mapping[str, Any]) -> torch.Tensor:
        """Scores of patches, laid onto the image tokens that the patches become.

        Args:
            patches: float32 [tiles, P], one tensor for each call of the tower's attention.
            count: how many image tokens there are features of.
            given: the arguments with which the owner is asked for these features.

        Returns:
            float32 [count], in the order of the tokens; a token of several patches has their mean.

        Raises:
            ValueError: the patches do not become so many tokens in a way that is known.
        """
        tiles = [tile for call in patches for tile in call]
        total = sum(len(tile) for tile in tiles)
        if hasattr(self.owner, "pack_image_features") and given.get("image_sizes") is not None:
            scores = self._packed(tiles, given)
        elif hasattr(self.module, "spatial_merge_size"):  # its patches come in the order of tokens, group by group
            scores = torch.cat(tiles).view(-1, self.module.spatial_merge_size**2).mean(1)
            if hasattr(self.module, "window_size"):
                scores = scores[self._windows(given).to(scores.device).argsort()]
        else:
            side = math.isqrt(max(1, total // count)) if count else 1
            scores = torch.cat([_pooled(tile, side) for tile in tiles])
        if len(scores) != count:
            raise ValueError(
                f"score='vision': {total} patches of the tower became {len(scores)} scores, and the prompt has {count} "
                "image tokens; use another score for this model"
            )
        return scores

    def _windows(self, given: Mapping[str, Any]) -> torch.Tensor:
        """The order in which a tower with windows (Qwen2.5-VL) has its groups of patches."""
        grids = given["image_grid_thw"] if given.get("image_grid_thw") is not None else given["video_grid_thw"]
        from transformers.vision_utils import get_vision_window_index  # not in every version that hasten takes

        sizes = self.module.spatial_merge_size, self.module.window_size, self.module.patch_size
        return get_vision_window_index(grids, *sizes)[0]

    def _packed(self, tiles: list[torch.Tensor], given: Mapping[str, Any]) -> torch.Tensor:
        """Scores of tiles, packed as the model packs their features (LLaVA-Next, LLaVA-OneVision): what it adds between
        rows scores 0."""
        config, owner = self.owner.config, self.owner
        tiles_of = sys.modules[type(owner).__module__].image_size_to_num_patches
        sizes, features, first = given["image_sizes"], [], 0
        for size in sizes:
            number = tiles_of(
                image_size=size, grid_pinpoints=config.image_grid_pinpoints, patch_size=config.vision_config.image_size
            )
            features.append(torch.stack(tiles[first : first + number])[..., None])
            first += number
        choices = {
            "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
            "vision_aspect_ratio": given.get("vision_aspect_ratio") or getattr(config, "vision_aspect_ratio", None),
        }
        known = inspect.signature(owner.pack_image_features).parameters
        choices = {name: value for name, value in choices.items() if name in known}
        newline = torch.zeros(1, device=tiles[0].device)
        packed, _ = owner.pack_image_features(features, sizes, image_newline=newline, **choices)
        return torch.cat([*packed]).flatten() if isinstance(packed, list | tuple) else packed.flatten()


def tower_name(model: nn.Module) -> str | None:
    """The path of the vision tower of a model, None if it has none."""
    return next((name for name, _ in model.named_modules() if name.rpartition(".")[2] in VISION_TOWERS), None)


def vision_tower(model: nn.Module) -> VisionTower:
    """The vision tower of a model.

    Raises:
        UnsupportedModelError: none is found, or its attention cannot be listened to.
    """
    modules, name = dict(model.named_modules()), tower_name(model)
    attentions = [] if name is None else [f"{name}.{below}" for below in attentions_below(modules[name])]
    if not attentions:
        reason = "it has no vision tower whose attention calls the function that its configuration names"
        raise UnsupportedModelError("", type(model).__qualname__, reason, "use another score than 'vision'")
    used = getattr(model.config, "vision_feature_layer", None)
    used = max(used) if isinstance(used, list | tuple) else used
    # The features are hidden states, of which there is one more than layers: -2 is what the last but one returns.
    attention = attentions[used] if isinstance(used, int) and -len(attentions) <= used < 0 else attentions[-1]
    tower = modules[name]
    class_token = any(
        path.rpartition(".")[2] in ("class_embedding", "cls_token") for path, _ in tower.named_parameters()
    )
    owner = name.rpartition(".")[0]
    return VisionTower(name, tower, modules[owner], owner, attention, class_token)


def _pooled(tile: torch.Tensor, side: int) -> torch.Tensor:
    """Means of squares of side x side patches of a square tile [P], row by row."""
    across = math.isqrt(len(tile))
    if side == 1 or across * across != len(tile) or across % side:
        return tile
    return tile.view(across // side, side, across // side, side).mean((1, 3)).flatten()
