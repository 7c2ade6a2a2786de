"""What ranks the image tokens of a prompt."""

import contextlib
import copy
import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hasten.acceleration.edits import Edit, Verification
from hasten.acceleration.forwards import NO_GRADIENTS
from hasten.acceleration.image_tokens import ImageTokens
from hasten.acceleration.shortened_cache import Entries
from hasten.acceleration.vision_tower import VisionTower, present_run
from hasten.errors import StateError
from hasten.kernels import backend
from hasten.kernels.token_scores import token_scores
from hasten.sparsity.vision_tokens import random_scores, text_raters

if TYPE_CHECKING:
    from hasten.acceleration.techniques.vision_token_pass import Pass, VisionTokenPruning

LISTENED = "hasten_listened"  # the name by which transformers knows `listened_attention`
KINDS = ("image", "video")
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
    """The baseline: no order at all, the same for the same tokens and seed; with `per_turn`, for the same image
    tokens."""

    def __init__(self, seed: int, per_turn: bool):
        self.seed, self.per_turn = seed, per_turn

    def __call__(self, present, layer, entries):
        ids, device = present.ids, entries.tokens.device
        if self.per_turn:
            ids = present.placeholders.long()
        real = torch.ones_like(ids) if present.real is None else present.real[:, -present.count :].long()
        places = real.cumsum(1) * real  # from 1 on, whatever padding stands before them
        sums = (ids * places * places).sum(1).tolist()
        scores = [random_scores((self.seed * 1_000_003 + number) % 2**63, 1, present.count) for number in sums]
        return torch.cat(scores).to(device).gather(1, (places - 1).clamp(min=0)).gather(1, entries.tokens)


class Attention(Score):
    """The attention, in the layer before, of some of the tokens; the mean over these and over heads."""

    def __call__(self, present, layer, entries):
        return present.scores

    def edits(self, pruning, images):
        return [ListenToAttention(images.attentions[layer - 1], ToLayer(pruning)) for layer in pruning.stages]

    @abstractmethod
    def queries(self, present: "Pass", entries: Entries) -> torch.Tensor:
        """int64 [B, Q]: the places among `entries` of the tokens whose attention counts, -1 for none."""


class LastToken(Attention):
    """The attention of the last token (FastV, Chen et al. 2024, arXiv 2403.06764); with `per_turn`, of the last image
    token, which has not read the question that follows."""

    def __init__(self, per_turn: bool):
        self.per_turn = per_turn

    def queries(self, present, entries):
        wanted = entries.seen() & (entries.tokens < present.prompt)
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
        text[:, present.prompt :] = False
        if present.real is not None:
            text &= present.real[:, -present.count :]
        images = present.images | ~present.images.any(1, keepdim=True)  # a row without any rates all the same
        places = _packed(torch.arange(present.count, device=text.device).expand_as(text), text, -1)
        if not places.shape[1]:
            return text
        rows = torch.arange(len(text), device=text.device)[:, None]
        some = places >= 0
        some[:, 0] |= ~some.any(1)  # and so does one without text
        rated = text_raters(present.embeddings, present.embeddings[rows, places.clamp(min=0)], images, some)
        rated &= places >= 0
        return torch.zeros_like(text).int().scatter_reduce(1, places.clamp(min=0), rated.int(), "amax").bool()


class VisionSide(Score):
    """The attention in the vision tower: of its class token (as VisionZip, Yang et al. 2024, arXiv 2412.04467, ranks),
    or, of a tower without one, of ASKED of its patches, evenly spaced. It knows nothing of the text.

    Args:
        tower: of the model.
        video_ids: the tokens that stand for videos alone.
    """

    def __init__(self, tower: VisionTower, video_ids: tuple[int, ...]):
        self.tower, self.video_ids = tower, torch.tensor(video_ids, dtype=torch.int64)

    def edits(self, pruning, images):
        owner = self.tower.owner_name
        return [
            ListenToAttention(self.tower.attention, ToTower(pruning, self.tower.class_token)),
            *(ScoreFeatures(owner, kind, pruning, self.tower) for kind in KINDS),
        ]

    def __call__(self, present, layer, entries):
        return present.once(self._of_all, present).gather(1, entries.tokens)

    def _of_all(self, present: "Pass") -> torch.Tensor:
        """float32 [B, T], 0 for text."""
        videos = present.placeholders & torch.isin(present.ids, self.video_ids.to(present.ids.device))
        of_kind = {"image": present.placeholders & ~videos, "video": videos}
        if not self.video_ids.numel() and present.features.keys() == {"video"}:
            of_kind = {"video": present.placeholders}  # one token stands for both
        scores = torch.zeros(present.ids.shape, device=present.ids.device)
        for kind, places in of_kind.items():
            if bool(places.any()):
                if kind not in present.features:
                    raise ValueError(
                        f"score='vision' ranks by the vision tower: give the {kind}s where their tokens are read"
                    )
                scores = scores.masked_scatter(places, _of_rows(present.features[kind], places.sum(1).tolist()))
        return scores


def _of_rows(scores: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Scores of the image tokens of some prompts, for rows with so many image tokens: for as many equal rows one after
    the other (beams, samples) as the prompts fit in.

    Raises:
        ValueError: they do not.
    """
    repeats, rest = divmod(sum(counts), len(scores))
    pieces = [] if rest else scores.split(counts[::repeats]) if sum(counts[::repeats]) == len(scores) else []
    if not pieces:
        raise ValueError(f"score='vision': the tower scored {len(scores)} image tokens, and the rows have {counts}")
    return torch.cat([piece for piece in pieces for _ in range(repeats)])


@dataclass(slots=True)
class ScoreFeatures(Edit):
    """Lets the output of `get_image_features`, or of `get_video_features`, of the module called `name` carry the scores
    of its image tokens. `generate` calls them before any pass."""

    name: str
    kind: str
    pruning: "VisionTokenPruning"
    tower: VisionTower

    def apply(self, model: nn.Module) -> None:
        owner = model.get_submodule(self.name) if self.name else model
        if hasattr(type(owner), f"get_{self.kind}_features"):
            vars(owner)[f"get_{self.kind}_features"] = ScoredFeatures(owner, self.kind, self.pruning, self.tower)

    def undo(self, model: nn.Module) -> None:
        owner = model.get_submodule(self.name) if self.name else model
        vars(owner).pop(f"get_{self.kind}_features", None)


class ScoredFeatures:
    """Stands in for `get_image_features` or `get_video_features` of a model."""

    def __init__(self, owner: nn.Module, kind: str, pruning: "VisionTokenPruning", tower: VisionTower):
        self.owner, self.kind, self.pruning, self.tower = owner, kind, pruning, tower

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self.owner), f"get_{self.kind}_features").__get__(self.owner))

    def __call__(self, *arguments, **keywords):
        with self.pruning.attended() as patches:
            output = getattr(type(self.owner), f"get_{self.kind}_features")(self.owner, *arguments, **keywords)
        features = getattr(output, "pooler_output", None)
        if patches and features is not None:
            given = self.__signature__.bind(*arguments, **keywords).arguments
            count = sum(len(piece.flatten(0, -2)) for piece in features)
            scores = self.tower.of_tokens(patches, count, given | given.get("kwargs", {}))
            output.hasten_scores = scores
            if self.pruning.present is not None:
                self.pruning.present.features[self.kind] = scores
        return output


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


@dataclass(frozen=True, slots=True)
class Attended:
    """A call of an attention: softmax over keys of softcap * tanh(scale * q . k / softcap).

    Attributes:
        query: [B, H, n, D], rotated.
        key: [B, G, N, D], rotated; the last n are those of the queries.
        mask, causal: as `shortened_masks.seen_by` takes them.
        scale, softcap: None for D ** -0.5, and for logits that are not capped.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    causal: bool
    scale: float | None
    softcap: float | None


class Listener(ABC):
    """Scores tokens by the attention of a module."""

    @abstractmethod
    def scores(self, call: Attended) -> torch.Tensor | None:
        """float32 [B, n], of the keys of the queries; None where no scores are wanted."""

    @abstractmethod
    def take(self, scores: torch.Tensor) -> None:
        """Hands them to the pass that runs."""


@dataclass(slots=True)
class ToLayer(Listener):
    """Listens to the attention of the decoder layer before a stage."""

    pruning: "VisionTokenPruning"

    def scores(self, call):
        return self.pruning.scores(call)

    def take(self, scores):
        self.pruning.present.scores = scores


@dataclass(slots=True)
class ToTower(Listener):
    """Listens to the attention of a vision tower."""

    pruning: "VisionTokenPruning"
    class_token: bool

    def scores(self, call):
        run = present_run()
        if not run.heard:
            return None
        step = math.ceil(call.query.shape[2] / ASKED)
        asked = call.query[:, :, :1] if self.class_token else call.query[:, :, ::step]
        scores = token_scores(asked.transpose(1, 2), call.key, scale=call.scale)
        scores = scores if run.places is None else scores[run.places]
        return scores[:, 1:] if self.class_token else scores

    def take(self, scores):
        self.pruning.hear(scores)


@dataclass(slots=True)
class ListenToAttention(Edit):
    """Lets `listener` have every call of the attention called `name`.

    Its configuration becomes a copy that names an attention function of hasten's, which calls the one that the model's
    own configuration names."""

    name: str
    listener: Listener
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

    @contextlib.contextmanager
    def verify(self, model: nn.Module) -> Iterator[Verification]:
        module, seen = model.get_submodule(self.name), Verification(self.name)
        module._hasten_listener = (Compared(self.listener, seen), self.config)
        try:
            yield seen
        finally:
            module._hasten_listener = (self.listener, self.config)


@dataclass(slots=True)
class Compared(Listener):
    """A listener whose scores are computed by their definition too, into `seen`."""

    listener: Listener
    seen: Verification

    def scores(self, call):
        scores = self.listener.scores(call)
        if scores is not None:
            with backend.use("reference"):
                self.seen.add(scores, self.listener.scores(call))
        return scores

    def take(self, scores):
        self.listener.take(scores)


def listened_attention(module, query, key, value, attention_mask, **keywords):
    """The attention function of a module that `ListenToAttention` was applied to: query [B, H, n, D], key
    [B, G, N, D], rotated, as transformers calls it."""
    listener, config = module._hasten_listener
    causal = keywords.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    call = Attended(query, key, attention_mask, causal, keywords.get("scaling"), keywords.get("softcap"))
    try:
        scores = listener.scores(call)
    except NotImplementedError as error:
        raise StateError(f"the queries or keys of {type(module).__name__}: something {NO_GRADIENTS}") from error
    if scores is not None:
        listener.take(scores)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    return attend(module, query, key, value, attention_mask, **keywords)


def _places(entries: Entries) -> torch.Tensor:
    """int64 [B, n]: the place of each among them."""
    return torch.arange(entries.tokens.shape[1], device=entries.tokens.device).expand_as(entries.tokens)


def _packed(values: torch.Tensor, chosen: torch.Tensor, filler: int) -> torch.Tensor:
    """The `chosen` [B, n] of `values` [B, n], in order, in as many columns as the longest row takes; then `filler`."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)[:, : int(chosen.sum(1).max())]
    return values.gather(1, order).where(chosen.gather(1, order), filler)
