"""The calibration pass: one run of the dense model over some text, which gathers what all techniques of a plan ask for."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from hasten.acceleration.anatomy import Anatomy, Block, Projection, dissect
from hasten.acceleration.plan import Plan
from hasten.acceleration.preflight import refuse_unready
from hasten.acceleration.techniques import Cats, InputSparsity, Technique, Wina
from hasten.acceleration.windows import Texts, windows
from hasten.model_facts import longest_input, progress, vocabulary
from hasten.sparsity.histogram import ScoreHistogram
from hasten.sparsity.scores import column_norms

BLOCK_SAMPLES = 2
# The first position of a sequence is an attention sink with extreme activations, and part of the dense prefill of every prompt but one of one token.
FIRST = 1


@dataclass(slots=True)
class Statistics:
    """What one calibration pass gathered; serves any number of accelerations of the same model, at any sparsity.

    `histograms` maps (score, module name) to the distribution of scores; `block_inputs` maps a block's name to the arguments of a few calls of it
    (for greedy allocation); `tokens` is how many tokens were seen.
    """

    histograms: dict[tuple[str, str], ScoreHistogram] = field(default_factory=dict)
    block_inputs: dict[str, list[tuple[tuple, dict]]] = field(default_factory=dict)
    tokens: int = 0


def calibrate(
    model: nn.Module,
    plan: Plan | Technique | Iterable[Technique],
    calibration: Texts,
    tokenizer=None,
    *,
    strict: bool = True,
) -> Statistics:
    """Runs the dense model over `calibration` and gathers what the techniques of `plan` ask for. The model is not changed.

    Args:
        model: a `transformers` model that `accelerate` supports, in eval mode, not accelerated.
        plan: techniques; their sparsities do not matter here.
        calibration: texts, or tensors of token ids [T] or [B, T]; a few thousand tokens of what the model will be used for.
        tokenizer: the model's tokenizer, needed for texts.
        strict: as for `hasten.accelerate`.

    Raises:
        ValueError, TypeError: as `hasten.accelerate` on bad calibration data.
        UnsupportedModelError, StateError: as `hasten.accelerate`.
    """
    refuse_unready(model)
    anatomy = dissect(model, strict=strict)
    pieces = windows(calibration, tokenizer, vocabulary(model), longest=longest_input(model))
    return gather(model, anatomy, Plan(plan), pieces)


def gather(model: nn.Module, anatomy: Anatomy, plan: Plan, pieces: list[torch.Tensor]) -> Statistics:
    """`calibrate` on an anatomy that was found and token windows that were checked."""
    statistics = Statistics()
    with contextlib.ExitStack() as hooks:
        for technique in plan:
            for handle in _listeners(technique, anatomy, statistics):
                hooks.callback(handle.remove)
        device = next(anatomy.projections()).module.weight.device
        for piece in progress(pieces, "calibrating", unit="window"):
            forward(model, piece[None].to(device))
            statistics.tokens += piece.numel()
    return statistics


@torch.no_grad()
def forward(model: nn.Module, ids: torch.Tensor) -> None:
    """One dense pass over `ids` [1, T] without a cache; logits of the last position only, where the model can."""
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    model(input_ids=ids, use_cache=False, **last_only)


def scored(technique: Technique, anatomy: Anatomy) -> list[Projection]:
    """The projections whose inputs an activation-sparsity technique scores."""
    return list(anatomy.projections()) if isinstance(technique, InputSparsity) else []


def gated_mlps(anatomy: Anatomy) -> list[Block]:
    """The blocks whose MLP has a gate and can be replaced as a whole."""
    return [block for block in anatomy.blocks if block.mlp_name and block.mlp_refusal is None]


def _listeners(
    technique: Technique, anatomy: Anatomy, statistics: Statistics
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    for projection in scored(technique, anatomy):
        histogram = statistics.histograms[score_name(technique), projection.name] = ScoreHistogram()
        weights = column_norms(projection.module.weight) if isinstance(technique, Wina) else None
        yield projection.module.register_forward_pre_hook(_input_listener(histogram, weights))
    if isinstance(technique, Cats):
        for block in gated_mlps(anatomy):
            histogram = statistics.histograms[score_name(technique), block.mlp_name] = ScoreHistogram()
            yield _activation(block).register_forward_hook(_output_listener(histogram))
    if getattr(technique, "allocation", None) == "greedy":
        for block in anatomy.blocks:
            calls = statistics.block_inputs[block.name] = []
            yield block.module.register_forward_pre_hook(_call_listener(calls), with_kwargs=True)


def score_name(technique: Technique) -> str:
    return type(technique).__name__


def _activation(block: Block) -> nn.Module:
    return block.module.get_submodule(block.activation_name.removeprefix(f"{block.name}."))


def _input_listener(histogram: ScoreHistogram, weights: torch.Tensor | None) -> Callable:
    def listen(module, arguments):
        scores = arguments[0].detach().abs().float()
        _add(histogram, scores if weights is None else scores * weights)

    return listen


def _output_listener(histogram: ScoreHistogram) -> Callable:
    def listen(module, arguments, output):
        _add(histogram, output.detach().abs())

    return listen


def _add(histogram: ScoreHistogram, scores: torch.Tensor) -> None:
    scores = scores.reshape(-1, scores.shape[-1])
    histogram.add(scores[FIRST:])


def _call_listener(calls: list) -> Callable:
    def listen(module, arguments, keywords):
        if len(calls) < BLOCK_SAMPLES:
            calls.append((arguments, keywords))

    return listen
