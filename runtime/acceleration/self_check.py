"""The self-check: a short prefill and a decode step, in which every edit runs what it installed beside
its definition."""

import contextlib

import torch

from hasten.acceleration.edits import Edit
from hasten.acceleration.inference import Inference, undisturbed
from hasten.errors import HastenError
from hasten.model_facts import device_of, longest_input

# Relative distance of a module's output by kernel from its output by definition, on the same input.
LIMIT = {torch.float64: 1e-5, torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
TOKENS = 17


@torch.no_grad()
def self_check(inference: Inference, edits: list[Edit]) -> float:
    """Runs the model with every edit verifying itself.

    Returns:
        the largest relative distance of an output from its definition.

    Raises:
        HastenError: it is over LIMIT, so that a kernel is wrong on this machine; or the definition overflows.
    """
    model = inference.model
    prompt = inference.prompt(max(1, min(TOKENS, longest_input(model) - 1)))
    with contextlib.ExitStack() as stack:
        seen = [stack.enter_context(edit.verify(model)) for edit in edits]
        stack.enter_context(torch.autocast(device_of(model).type, enabled=False))
        stack.enter_context(undisturbed(model))
        _, reading = inference.prefill(prompt)
        inference.step(reading, reading.ids[:, -1:])
    worst = 0.0
    for verification in seen:
        if verification is None or not verification.calls:
            continue
        if not verification.finite:
            raise HastenError(
                f"self-check: {verification.name} overflows in {verification.dtype} by its definition too; "
                "the model was left as it was"
            )
        if not verification.distance <= LIMIT[verification.dtype]:
            raise HastenError(
                f"self-check: {verification.name} differs from its definition by {verification.distance:.2g} "
                "(relative); the model was left as it was"
            )
        worst = max(worst, verification.distance)
    return worst
