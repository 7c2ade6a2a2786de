"""The self-check: a short prefill and a decode step, in which every edit runs what it installed beside
its definition."""

import contextlib
from collections.abc import Mapping, Sequence

import torch

from hasten.acceleration.edits import Edit, Verification
from hasten.acceleration.inference import Inference
from hasten.acceleration.undisturbed import undisturbed
from hasten.errors import HastenError, UnsupportedModelError
from hasten.model_facts import device_of, longest_input

# Relative distance of a module's output by kernel from its output by definition, on the same input.
LIMIT = {torch.float64: 1e-5, torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
TOKENS, TOKENS_WITH_IMAGE = 17, 40


@torch.no_grad()
def self_check(inference: Inference, techniques: Mapping[str, Sequence[Edit]], image: bool = False) -> float | None:
    """Runs the model with every edit of every technique, by the technique's name, verifying itself; with `image`, on a
    prompt with one, where the model can be given one.

    Returns:
        the largest relative distance of an output from its definition; None where no edit verifies itself.

    Raises:
        HastenError: it is over LIMIT, so that a kernel is wrong on this machine; or the definition overflows.
        UnsupportedModelError: nothing that a technique installed was run, neither in the prefill nor in the step.
    """
    model = inference.model
    tokens = max(1, min(TOKENS_WITH_IMAGE if image else TOKENS, longest_input(model) - 1))
    prompt = inference.prompt(tokens, image=tokens if image else 0)
    with contextlib.ExitStack() as stack:
        seen = {name: [stack.enter_context(edit.verify(model)) for edit in edits] for name, edits in techniques.items()}
        stack.enter_context(torch.autocast(device_of(model).type, enabled=False))
        stack.enter_context(undisturbed(model))
        _, reading = inference.prefill(prompt)
        inference.step(reading, reading.ids[:, -1:])
    distances = []
    for name, verifications in seen.items():
        verifications = [verification for verification in verifications if verification is not None]
        if verifications and not any(verification.calls for verification in verifications):
            reason = f"{name} would change nothing: no decode step runs what it installs" + (
                "" if inference.has_cache else ", since a model without a cache reads its whole text in every step"
            )
            raise UnsupportedModelError("", type(model).__qualname__, reason, f"leave {name} out of the plan")
        distances += [_distance(verification) for verification in verifications if verification.calls]
    return max(distances, default=None)


def _distance(verification: Verification) -> float:
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
    return verification.distance
