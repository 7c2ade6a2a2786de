"""Asking a guide, checking what it answers, and recording how far the predictions agreed: the same for wrapped loops and for guider components."""

from __future__ import annotations

import torch

from hasten.guidance.diffusion.adaptive import agreement
from hasten.guidance.diffusion.guide import TRACE, Guide, Pass, State, Step


def asked_passes(guide: Guide, step: Step, available: tuple[Pass, ...], pipeline: str) -> tuple[Pass, ...]:
    """What guide.passes asks for at this step.

    Raises:
        ValueError: a pass that is not among those that the pipeline makes, or no conditional one.
    """
    passes = guide.passes(step)
    if "conditional" not in passes or set(passes) - set(available):
        raise ValueError(
            f"the guide {guide} asks for {passes} at step {step.index}; {pipeline} makes {available}, and the conditional pass is always among them"
        )
    return passes


def guided_prediction(guide: Guide, state: State) -> torch.Tensor:
    """What the guide makes of the predictions, [B, ...]. Their `agreement` goes into the trace, unless the guide itself recorded one.

    Raises:
        ValueError: that is no tensor of the sample's shape.
    """
    prediction = guide(state)
    if not isinstance(prediction, torch.Tensor) or prediction.shape != state.sample.shape:
        found = tuple(prediction.shape) if isinstance(prediction, torch.Tensor) else prediction
        raise ValueError(
            f"step {state.index}: the guide {guide} returned {found}, expected a tensor {tuple(state.sample.shape)}"
        )
    if state.unconditional is not None and "cosine" not in state.memory.get(TRACE, {}).get(state.index, {}):
        state.record({"space": "model", **agreement(state.conditional, state.unconditional)})
    return prediction
