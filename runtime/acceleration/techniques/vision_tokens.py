"""Vision-token pruning: image tokens that the decoder's deeper layers need not see."""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from hasten.acceleration.edits import ReplaceForward
from hasten.acceleration.image_tokens import ImageTokens
from hasten.acceleration.techniques.base import DECODE, Regime, Settings, Technique
from hasten.acceleration.techniques.vision_token_layers import PrunedLayer, VisionTokenPruning, WatchPasses
from hasten.acceleration.techniques.vision_token_scores import LastToken, ListenToAttention, Random, Score
from hasten.errors import SavedPlanError
from hasten.sparsity.vision_tokens import FastV, Schedule, schedule

SCORES = ("last_token", "random")
MODES = ("drop",)
TURNS = ("prompt", "per_turn")
IMAGE, PROMPT = 576, 640  # tokens of an image, and of a prompt with it: LLaVA-1.5's, with a question


@dataclass(frozen=True, slots=True)
class VisionTokens(Technique):
    """Decoder layers see fewer and fewer of a prompt's image tokens: those that score least are dropped on the way.

    Args:
        schedule: which layer sees which share of them: a `Schedule`, or a mapping from layers to shares, as in
            {2: 0.5, 8: 0.25}.
        score: "last_token", the attention of the prompt's last token in the layer before (FastV, arXiv 2403.06764);
            "random", the baseline.
        mode: "drop".
        when: "prompt" ranks by the prompt with its question; "per_turn" by the image alone, so that a later question
            finds its tokens.
        seed: of random scores.
    """

    schedule: Schedule = field(default_factory=FastV)
    score: str = "last_token"
    mode: str = "drop"
    when: str = "prompt"
    seed: int = 0
    exact: ClassVar[bool] = False

    def __post_init__(self):
        object.__setattr__(self, "schedule", schedule(self.schedule))
        for name, known in (("score", SCORES), ("mode", MODES), ("when", TURNS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")

    def targets(self, anatomy):
        names = list(anatomy.images.layers)
        return tuple(names[min(self._stages(anatomy.images), default=len(names)) :])

    def settle(self, anatomy, statistics):
        return Settings({"shares": list(self.schedule.shares(len(anatomy.images.layers)))})

    def read(self, saved, anatomy):
        expected = self.settle(anatomy, None)
        if saved != expected:
            raise SavedPlanError(f"VisionTokens: expected the settings {expected.values}, got {saved.values}")
        return saved

    def edits(self, anatomy, settings):
        images, config = anatomy.images, anatomy.decoder.config
        stages, score = self._stages(images), self._score()
        pruning = VisionTokenPruning(stages, score, images.ids, anatomy.model, config)
        names = list(images.layers)
        edits = [WatchPasses(pruning)]
        if score.attends:
            edits += [ListenToAttention(images.attentions[layer - 1], layer - 1, pruning) for layer in stages]
        for index in range(min(stages, default=len(names)), len(names)):
            make = partial(PrunedLayer, pruning=pruning, index=index, last=index == len(names) - 1)
            edits.append(ReplaceForward(names[index], make))
        return edits

    def regimes(self, anatomy):
        return (Regime(tokens=PROMPT, image=IMAGE), Regime(context=PROMPT, image=IMAGE), DECODE)

    def _stages(self, images: ImageTokens) -> dict[int, float]:
        return self.schedule.stages(len(images.layers))

    def _score(self) -> Score:
        if self.score == "random":
            return Random(self.seed)
        return LastToken(self.when == "per_turn")
