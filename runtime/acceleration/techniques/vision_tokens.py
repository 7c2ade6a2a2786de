"""Vision-token pruning: image tokens that the decoder's deeper layers need not see."""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.edits import ReplaceForward
from hasten.acceleration.families import PICKS
from hasten.acceleration.found_schedule import FoundSchedule
from hasten.acceleration.image_tokens import ImageTokens, refusal
from hasten.acceleration.parts import kind_of
from hasten.acceleration.techniques.base import DECODE, Regime, Settings, Technique
from hasten.acceleration.techniques.vision_token_layers import PrunedLayer
from hasten.acceleration.techniques.vision_token_pass import VisionTokenPruning, WatchPasses
from hasten.acceleration.techniques.vision_token_scores import (
    Attention,
    LastToken,
    Random,
    Score,
    TextRaters,
    VisionSide,
)
from hasten.errors import SavedPlanError, UnsupportedModelError
from hasten.sparsity.vision_tokens import FastV, LayerShape, Schedule, schedule

SCORES = ("last_token", "text_raters", "vision", "random")
MODES = ("drop", "merge")
TURNS = ("prompt", "per_turn")
IMAGE, PROMPT = 576, 640  # tokens of an image, and of a prompt with it: LLaVA-1.5's, with a question


@dataclass(frozen=True, slots=True)
class VisionTokens(Technique):
    """Decoder layers see fewer and fewer of a prompt's image tokens: those that score least are dropped on the way.

    Args:
        schedule: which layer sees which share of them: `FastV`, `Pyramid`, `PSigmoid`, what `search_vision_tokens`
            found, or a mapping from layers to shares, as in {2: 0.5, 8: 0.25}.
        score: "last_token", the attention of the prompt's last token in the layer before (FastV, arXiv 2403.06764);
            "text_raters", that of the text tokens that are most alike to the image (SparseVLM, arXiv 2410.04417);
            "vision", the attention in the vision tower, of its class token where it has one (VisionZip, arXiv
            2412.04467); "random", the baseline.
        mode: "drop"; or "merge": tokens that are most alike become one (ToMe, arXiv 2210.09461), whatever they score,
            and later tokens attend to it as to all that it was made of.
        when: "prompt" ranks by the whole prompt; "per_turn" without what follows the image, so that later questions on
            the same cache find their tokens: of "last_token", by the last image token, which has read what stands
            before it (and, where attention over a prompt goes both ways as in PaliGemma, what follows).
        seed: of random scores.

    Raises:
        ValueError: a value that is none of these.
    """

    schedule: Schedule | FoundSchedule = field(default_factory=FastV)
    score: str = "last_token"
    mode: str = "drop"
    when: str = "prompt"
    seed: int = 0
    of_images: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "schedule", schedule(self.schedule))
        for name, known in (("score", SCORES), ("mode", MODES), ("when", TURNS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        if self.mode == "merge" and self.score != "last_token":
            raise ValueError(
                f"mode='merge' goes by likeness and takes no score, got score={self.score!r}: leave it out"
            )
        if self.when == "per_turn" and self.score == "text_raters":
            raise ValueError("when='per_turn' ranks without the text, and score='text_raters' by the text: use another")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")

    def targets(self, anatomy):
        images = anatomy.images
        names, stages = list(images.layers), self._stages(images)
        if self.score == "vision" and self.mode == "drop" and not anatomy.was_run(anatomy.vision_tower.name):
            reason = "score='vision' ranks by its vision tower, and it was examined without a picture"
            remedy = "give calibration= as a dictionary that its processor returns for a prompt with a picture"
            raise UnsupportedModelError("", type(anatomy.model).__qualname__, reason, remedy)
        first = min(stages, default=len(names))
        if first < images.deep_stack:
            reason = f"features of the image are added to what the first {images.deep_stack} layers return"
            kind, remedy = kind_of(images.layers[names[first]]), f"drop from layer {images.deep_stack} on"
            raise UnsupportedModelError(names[first], kind, reason, remedy)
        implementation = anatomy.decoder.config._attn_implementation
        if self.mode == "merge" and "flash" in (implementation or ""):
            reason = f"mode='merge' adds to the logits of merged tokens, which {implementation} cannot"
            remedy = "use mode='drop', or load the model with attn_implementation='sdpa'"
            raise UnsupportedModelError("", type(anatomy.model).__qualname__, reason, remedy)
        listens = self.mode == "drop" and isinstance(self._score(anatomy), Attention)
        used = {*range(first, len(names)), *(layer - 1 for layer in stages if listens)}
        for index in sorted(used):
            if found := refusal(images, index, implementation):
                raise found.error()
        return tuple(names[first:])

    def settle(self, anatomy, statistics):
        return Settings({"shares": list(self.schedule.shares(len(anatomy.images.layers)))})

    def read(self, saved, anatomy):
        expected = self.settle(anatomy, None)
        if saved != expected:
            raise SavedPlanError(f"VisionTokens: expected the settings {expected.values}, got {saved.values}")
        return saved

    def edits(self, anatomy, settings):
        images, stages, score = anatomy.images, self._stages(anatomy.images), self._score(anatomy)
        merges = self.mode == "merge"
        pruning = VisionTokenPruning(stages, score, merges, images.ids, anatomy.model, anatomy.decoder.config)
        names = list(images.layers)
        edits = [WatchPasses(pruning, names[-1]), *([] if merges else score.edits(pruning, images))]
        for index in range(min(stages, default=len(names)), len(names)):
            make = partial(PrunedLayer, pruning=pruning, index=index)
            edits.append(ReplaceForward(names[index], make))
        return edits

    def summary(self, settings):
        shares = settings.values["shares"]
        changes = [(layer, share) for layer, share in enumerate(shares) if layer and share < shares[layer - 1]]
        kept = ", ".join(f"{share:.3g} of the image tokens from layer {layer} on" for layer, share in changes)
        return kept + (", merged by likeness whatever they score" if self.mode == "merge" else "")

    def regimes(self, anatomy):
        return (Regime(tokens=PROMPT, image=IMAGE), Regime(context=PROMPT, image=IMAGE), DECODE)

    def _stages(self, images: ImageTokens) -> dict[int, float]:
        return self.schedule.stages(len(images.layers))

    def _score(self, anatomy) -> Score:
        if self.score == "vision":
            return VisionSide(anatomy.vision_tower, anatomy.images.video_ids)
        if self.score == "random":
            return Random(self.seed, self.when == "per_turn")
        return TextRaters() if self.score == "text_raters" else LastToken(self.when == "per_turn")


def layer_shapes(anatomy: Anatomy) -> list[LayerShape]:
    """What each decoder layer of a model computes for a token, for the cost of a schedule. Of fused experts, those that
    a token picks count."""
    config = anatomy.decoder.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    shapes = []
    for layer in anatomy.images.layers.values():
        weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)
        fused = [parameter for parameter in layer.parameters() if parameter.dim() == 3]
        picked = next((value for name in PICKS if isinstance(value := getattr(config, name, None), int)), 1)
        weights += sum(parameter.numel() // parameter.shape[0] * picked for parameter in fused)
        shapes.append(LayerShape(weights, heads, groups, head_dim))
    return shapes
