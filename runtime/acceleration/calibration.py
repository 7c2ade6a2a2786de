"""The calibration pass: one run of the dense model over some text,
which gathers what all techniques of a plan ask for."""

import contextlib
from collections.abc import Iterable

from torch import nn

from hasten.acceleration.arrangement import Assignment, arrange
from hasten.acceleration.checksums import sampled
from hasten.acceleration.inference import Inference, Inputs
from hasten.acceleration.plan import Plan
from hasten.acceleration.preflight import check_flags, examine, refuse_unready
from hasten.acceleration.statistics import Statistics
from hasten.acceleration.techniques import Technique
from hasten.acceleration.windows import Texts, windows
from hasten.model_facts import longest_input, progress, vocabulary


def calibrate(
    model: nn.Module,
    plan: Plan | Technique | Iterable[Technique],
    calibration: Texts,
    tokenizer=None,
    *,
    strict: bool = True,
) -> Statistics:
    """Runs the dense model over `calibration` and gathers what the techniques of `plan` ask for.
    The model is not changed.

    Args:
        model: a `transformers` model that `accelerate` supports, in eval mode, not accelerated.
        plan: techniques; their sparsities do not matter here.
        calibration: texts, token ids, or what a processor returns, as for `hasten.accelerate`; a few thousand tokens of
            what the model will be used for.
        tokenizer: the model's tokenizer, needed for texts.
        strict: as for `hasten.accelerate`.

    Raises:
        ValueError, TypeError: as `hasten.accelerate` on bad calibration data.
        UnsupportedModelError, StateError: as `hasten.accelerate`.
    """
    check_flags({"strict": strict})
    refuse_unready(model)
    pieces = windows(calibration, tokenizer, vocabulary(model), longest=longest_input(model))
    inference = Inference(model, pieces[0])
    anatomy = examine(inference, pieces[0])
    # Each on its own: techniques that could not be carried out together may listen together.
    assignments = [found for technique in Plan(plan) for found in arrange(Plan(technique), anatomy, strict)]
    return gather(inference, [found for found in assignments if not found.implied], pieces)


def gather(inference: Inference, assignments: list[Assignment], pieces: list[Inputs]) -> Statistics:
    """`calibrate` on techniques that were arranged and windows that were checked."""
    statistics = Statistics(model=sampled(inference.model))
    with contextlib.ExitStack() as hooks:
        for assignment in assignments:
            for handle in assignment.technique.listen(assignment.anatomy, statistics):
                hooks.callback(handle.remove)
        for piece in progress(pieces, "calibrating", unit="window"):
            inference.forward(piece)
            statistics.tokens += inference.token_ids(piece).numel()
    return statistics
