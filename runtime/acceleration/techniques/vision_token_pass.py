"""What one pass of a multimodal model reads, and which of its image tokens are left out before a layer."""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hasten.acceleration.caches import caches
from hasten.acceleration.edits import Edit
from hasten.acceleration.shortened_cache import Entries, ShortenedLayer
from hasten.acceleration.shortened_masks import along_tokens, seen_by
from hasten.kernels.token_scores import token_scores
from hasten.sparsity.vision_tokens import bipartite_merging, kept

if TYPE_CHECKING:
    from hasten.acceleration.techniques.vision_token_scores import Attended, Score

TAKEN = (DynamicLayer, DynamicSlidingWindowLayer, ShortenedLayer)  # layers of a cache that can be shortened


@dataclass(frozen=True, slots=True)
class Drop:
    """What was left out before a layer.

    Attributes:
        before, after: the entries of the pass before and after it.
        places: int64 [B, n] of those after among those before.
        into: int64 [B, m]: among those before, the token that each was merged into, its own place where it remains;
            None where tokens are dropped.
    """

    before: Entries
    after: Entries
    places: torch.Tensor
    into: torch.Tensor | None = None

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The hidden states [B, m, D] of the entries before, for those after: [B, n, D]."""
        if self.into is not None:
            sizes = self.before.sizes()
            weighted = hidden_states.float() * sizes[..., None]
            into = self.into[..., None].expand_as(weighted)
            total = torch.zeros_like(weighted).scatter_add_(1, into, weighted)
            size = torch.zeros_like(sizes).scatter_add_(1, self.into, sizes)
            hidden_states = (total / size.clamp(min=1)[..., None]).to(hidden_states.dtype)
        return along_tokens(hidden_states, self.places, 1)


@dataclass(slots=True)
class Pass:
    """What one pass of the model reads.

    Attributes:
        count: the number of tokens T.
        prompt: how many of them are a prompt, whose last one predicts the next token: not the candidates of assisted
            decoding after it.
        ids: int64 [B, T].
        embeddings: [B, T, D], what the first layer gets, where a score asks for it.
        features: scores of image tokens, float32 [V], by what they are of: "image" or "video".
        placeholders: bool [B, T], which of them stand for an image; None where none does.
        images: bool [B, T], those of them that may be dropped: not those whose predictions are wanted, which are the
            last token of the prompt and what follows.
        real: bool [B, R + T], which of the tokens in the cache, and then of these, are no padding; None if all are.
        entries: which of these tokens the present layer sees; None for all.
        scores: float32 [B, n] of these, from the attention of the layer before.
        heard: whether what attends now counts: not what runs beside it to check it.
        drops: by layer.
    """

    count: int
    prompt: int
    ids: torch.Tensor | None
    embeddings: torch.Tensor | None = None
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    placeholders: torch.Tensor | None = None
    images: torch.Tensor | None = None
    real: torch.Tensor | None = None
    entries: Entries | None = None
    scores: torch.Tensor | None = None
    heard: bool = True
    drops: dict[int, Drop] = field(default_factory=dict)
    _made: dict[tuple, tuple] = field(default_factory=dict)
    _all: Entries | None = None

    def once(self, make: Callable, *of) -> Any:
        """make(*of), made once for the same objects: layers of one stage share masks and rotary tables."""
        key = (make, *map(id, of))
        if key not in self._made:
            self._made[key] = (make(*of), of)  # kept with `of`, so that no other object gets its id
        return self._made[key][0]

    def forget(self) -> None:
        """Lets go of what was made for it, some of which refers to it."""
        self._made.clear()

    def all_entries(self, like: torch.Tensor) -> Entries:
        """Those of all T tokens, for hidden states [B, T, D]."""
        if self._all is None:
            self._all = Entries.all_of(self.count, len(like), like.device)
        return self._all


class VisionTokenPruning:
    """What the changes share that carry out `VisionTokens` on one model.

    Args:
        stages: the layers before which tokens are dropped, with the share of the image tokens that is then left.
        score: what ranks image tokens.
        merges: whether those that are alike become one, instead.
        ids: the tokens that stand for images.
        model: the model whose passes begin with tokens and pictures.
        config: that of the decoder, which names its attention function.
    """

    def __init__(
        self,
        stages: Mapping[int, float],
        score: "Score",
        merges: bool,
        ids: tuple[int, ...],
        model: nn.Module,
        config: PreTrainedConfig,
    ):
        self.stages, self.score, self.merges, self.config = dict(stages), score, merges, config
        self.ids = torch.tensor(ids)
        self.parameters = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
        self._local = threading.local()

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_local"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._local = threading.local()

    @property
    def present(self) -> Pass | None:
        """The pass that runs in this thread, the inner one where a hook runs one in another; None outside of any."""
        passes = self._passes
        return passes[-1] if passes else None

    @property
    def _passes(self) -> list[Pass]:
        if not hasattr(self._local, "passes"):
            self._local.passes = []
        return self._local.passes

    @property
    def flash(self) -> bool:
        """Whether the decoder's attention takes no masks but [B, T]."""
        return "flash" in (self.config._attn_implementation or "")

    def begin(self, model: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        """A forward pre-hook of the model.

        Raises:
            ValueError: an argument with which image tokens cannot be found or dropped.
        """
        given = dict(zip(self.parameters, arguments, strict=False)) | keywords
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        if ids is None:
            if embeddings is not None and embeddings.shape[1] > 1:
                raise ValueError(
                    f"image tokens cannot be found in inputs_embeds {list(embeddings.shape)}: give input_ids, or call "
                    "hasten.revert(model) first"
                )
            self._passes.append(Pass(1, 1, ids))
            return
        images = torch.isin(ids, self.ids.to(ids.device)) if ids.shape[1] > 1 else None
        if images is not None and not bool(images.any()):
            images = None
        cache = next(iter(caches(given).values()), None)
        if self.stages and images is not None:
            _refuse_cache(cache)
        if self.stages and (images is not None or is_shortened(cache)):
            _refuse_outputs(given, model.config, self.config)
        real = None if images is None else _real(given.get("attention_mask"))
        predictions = given.get("logits_to_keep")
        candidates = predictions - 1 if type(predictions) is int and predictions > 1 else 0
        prompt = max(1, ids.shape[1] - candidates)
        dropping = None if images is None else images & ~_wanted(images, real, prompt)
        encoded = (given.get("mm_encoder_outputs") or {}).items()
        features = {kind: output.hasten_scores for kind, output in encoded if hasattr(output, "hasten_scores")}
        self._passes.append(
            Pass(ids.shape[1], prompt, ids, features=features, placeholders=images, images=dropping, real=real)
        )

    @contextlib.contextmanager
    def attended(self) -> Iterator[list[torch.Tensor]]:
        """While open, collects what is heard of a vision tower's attention: scores of patches, float32 [tiles, P], one
        tensor for each call. Blocks may lie in one another."""
        before, own = getattr(self._local, "attended", None), []
        self._local.attended = own
        try:
            yield own
        finally:
            self._local.attended = before
            if before is not None:
                before.extend(own)

    def hear(self, scores: torch.Tensor) -> None:
        """Adds scores of patches to what is collected."""
        if (collected := getattr(self._local, "attended", None)) is not None:
            collected.append(scores)

    def end(self, model: nn.Module, arguments: tuple, output: Any) -> None:
        """A forward hook of the model, called after errors too."""
        if self._passes:  # not after an error before it began
            self._passes.pop().forget()

    def restore(self, layer: nn.Module, arguments: tuple, output: Any) -> Any:
        """A forward hook of the last layer: puts every token [B, T, D] in its place again."""
        present = self.present
        if present is None or present.entries is None:
            return output
        hidden_states, entries = first_of(output), present.entries
        full = hidden_states.new_full((len(hidden_states), present.count, hidden_states.shape[2]), torch.nan)
        hidden_states = hidden_states.masked_fill(~entries.seen()[..., None], torch.nan)
        full.scatter_(1, entries.tokens[..., None].expand_as(hidden_states), hidden_states)
        return (full, *output[1:]) if isinstance(output, tuple) else full

    @torch.compiler.disable
    def drop(self, layer: int, hidden_states: torch.Tensor) -> Drop:
        """What this layer leaves out of the pass, whose hidden states before it are [B, n, D]; decided once."""
        present = self.present
        if layer not in present.drops:
            present.drops[layer] = self._decide(present, layer, hidden_states)
        return present.drops[layer]

    @torch.compiler.disable
    def scores(self, call: "Attended") -> torch.Tensor | None:
        """float32 [B, n]: of the tokens of the pass by the attention of the layer before a stage."""
        present = self.present
        if present is None or present.images is None or not present.heard:
            return None
        query, key = call.query, call.key
        entries = present.entries or present.all_entries(query)
        places = self.score.queries(present, entries)
        first = key.shape[2] - query.shape[2]
        rows = torch.arange(len(query), device=query.device)[:, None]
        chosen = query.transpose(1, 2)[rows, places.clamp(min=0)]  # [B, Q, H, D]
        mask = seen_by(call.mask, places, query.shape[2], key.shape[2], call.causal)
        return token_scores(chosen, key, mask, scale=call.scale, softcap=call.softcap)[:, first:]

    def _decide(self, present: Pass, layer: int, hidden_states: torch.Tensor) -> Drop:
        """Each row keeps its text and as many of its image tokens as the share says, whatever other rows keep. Rows
        that keep fewer are filled with padding, then with dropped tokens, which no query sees."""
        before = present.entries or present.all_entries(present.images)
        images = present.images.gather(1, before.tokens)
        seen = before.seen()
        images &= seen
        text = ~images & seen
        if present.real is not None:
            text &= present.real[:, -present.count :].gather(1, before.tokens)
        numbers = [kept(self.stages[layer], number) for number in present.images.sum(1).tolist()]
        wanted = torch.tensor(numbers, device=images.device)
        into, sizes = None, before.sizes()
        if self.merges:
            into, stay = merge(hidden_states, wanted, images, sizes)
            sizes = torch.zeros_like(sizes).scatter_add_(1, into, sizes)
        else:
            scores = self.score(present, layer, before).masked_fill(~images, -torch.inf)
            rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            stay = images & (rank < wanted[:, None])
        order = 3 * text + 2 * stay + (~text & ~images & seen)  # text, image tokens, padding, the rest
        count = int((order > 1).sum(1).max())
        places = order.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values
        bias = sizes.log().gather(1, places).masked_fill(order.gather(1, places) == 0, -torch.inf)
        after = Entries(before.tokens.gather(1, places), bias if bool((bias != 0).any()) else None, present.count)
        return Drop(before, after, places, into)


def merge(x: torch.Tensor, wanted: torch.Tensor, images: torch.Tensor, sizes: torch.Tensor):
    """Merges image tokens that are alike: x [B, n, D], wanted [B], images bool [B, n], sizes [B, n] -> the place of the
    token that each was merged into [B, n], and bool [B, n]: the image tokens that remain."""
    into = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
    stay = torch.zeros_like(images)
    merged = bipartite_merging(x, wanted.clamp(min=1), images, sizes.long())
    for row, merging in enumerate(merged):
        into[row] = merging.columns[merging.into]
        stay[row, merging.columns] = True
    return into, stay & images


@dataclass(slots=True)
class WatchPasses(Edit):
    """Lets `pruning` know what every pass of the model reads, and put tokens back in their places after the layer
    called `last`."""

    pruning: VisionTokenPruning
    last: str
    name: str = ""
    handles: list[RemovableHandle] = field(default_factory=list)

    def apply(self, model: nn.Module) -> None:
        self.handles.append(model.register_forward_pre_hook(self.pruning.begin, with_kwargs=True))
        self.handles.append(model.register_forward_hook(self.pruning.end, always_call=True))
        self.handles.append(model.get_submodule(self.last).register_forward_hook(self.pruning.restore))

    def undo(self, model: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()


def first_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def is_shortened(cache: Cache | None, index: int | None = None) -> bool:
    """Whether this layer of a cache, or any, holds fewer entries than tokens were read."""
    layers = getattr(cache, "layers", ())
    return any(isinstance(layer, ShortenedLayer) for layer in (layers if index is None else layers[index : index + 1]))


def _refuse_cache(cache: Cache | None) -> None:
    for layer in getattr(cache, "layers", ()):
        if type(layer) not in TAKEN:
            raise ValueError(
                f"image tokens can be dropped from a DynamicCache, got a {type(cache).__name__} with a "
                f"{type(layer).__name__}: give another cache_implementation, or call hasten.revert(model) first"
            )


def _refuse_outputs(given: Mapping[str, Any], *configs: PreTrainedConfig) -> None:
    for name in ("output_attentions", "output_hidden_states"):
        if given.get(name) or (given.get(name) is None and any(getattr(config, name, False) for config in configs)):
            raise ValueError(
                f"{name}: layers after a drop have no such values for tokens that were dropped; leave it out, or call "
                "hasten.revert(model) first"
            )
    if given.get("labels") is not None:
        raise ValueError(
            "labels: tokens that were dropped have no predictions, and so no loss; leave them out, or call "
            "hasten.revert(model) first"
        )


def _wanted(tokens: torch.Tensor, real: torch.Tensor | None, prompt: int) -> torch.Tensor:
    """bool [B, T] or [T]: of tokens [B, T], those whose predictions are wanted: in each row the last of the first
    `prompt` that is no padding, and what follows these."""
    count = tokens.shape[1]
    order = torch.arange(1, count + 1, device=tokens.device)
    inside = order * (order <= prompt) if real is None else order * (order <= prompt) * real[:, -count:]
    return (inside == inside.max(-1, keepdim=True).values) | (order > prompt)


def _real(mask: Any) -> torch.Tensor | None:
    """Which tokens are no padding, bool [B, R + T], by the attention mask of a pass; None if all are."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    if mask.dim() == 4:  # the last query sees all that is no padding
        mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
    real = mask.bool()
    return None if bool(real.all()) else real
