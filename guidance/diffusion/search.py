"""The search for a guidance policy: which steps to guide under a budget of evaluations, with the distance to full
guidance as its objective.

The question of the policy search of Castillo et al. 2023 (arXiv 2312.12487, section 4), asked in a discrete way: every
contiguous interval first, then single steps exchanged as long as that helps. Only a callable that runs a policy is
needed, hence no gradients and no access to the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hasten.guidance.diffusion.guide import check_count, check_number
from hasten.guidance.diffusion.intervals import StepSet


@dataclass(frozen=True)
class Trial:
    """One policy that was run: the steps that it guides, evaluations per sample, distance to full guidance."""

    policy: StepSet
    evaluations: int
    distance: float


@dataclass(frozen=True)
class Search:
    """What a search found: the best trial, and all trials in the order in which they were run."""

    best: Trial
    trials: tuple[Trial, ...]


def root_mean_square(samples: torch.Tensor, reference: torch.Tensor) -> float:
    """The distance over all elements of two batches [B, ...]."""
    return float((samples.double() - reference.double()).square().mean().sqrt())


def search(
    run: Callable[[StepSet], torch.Tensor],
    steps: int,
    budget: int,
    trials: int = 200,
    distance: Callable[[torch.Tensor, torch.Tensor], float] = root_mean_square,
    progress: Callable[[Trial], None] | None = None,
) -> Search:
    """The best of up to `trials` policies with budget - steps guided steps.

    Args:
        run: runs a policy, always from the same noise and conditions, and returns the samples [B, ...]. With a guide,
            that is `ClassifierFreeGuidance(scale, interval=policy)`.
        steps: N of a run.
        budget: evaluations per sample, between N (nothing guided) and 2 N (everything).
        distance: of samples to those of full guidance; what is minimised.
        progress: called with every trial.

    Raises:
        ValueError: a budget out of reach, or a distance that is no finite number, which has no place in an order.
    """
    check_count("steps", steps, 1)
    check_count("budget", budget, steps)
    check_count("trials", trials, 1)
    if budget > 2 * steps:
        raise ValueError(f"budget must lie in [{steps}, {2 * steps}], got {budget}")
    reference = run(StepSet(range(steps)))
    tried: dict[StepSet, Trial] = {}

    def attempt(policy: StepSet) -> None:
        if policy not in tried and len(tried) < trials:
            away = distance(run(policy), reference)
            check_number(f"the distance of {policy} to full guidance", away)
            tried[policy] = Trial(policy, steps + len(policy.indices), away)
            if progress is not None:
                progress(tried[policy])

    guided = budget - steps
    for start in range(steps - guided + 1):
        attempt(StepSet(range(start, start + guided)))
    while len(tried) < trials:
        best = min(tried.values(), key=lambda trial: trial.distance)
        before = len(tried)
        for given_up in best.policy.indices:
            for taken in sorted(set(range(steps)) - set(best.policy.indices)):
                attempt(StepSet({*best.policy.indices, taken} - {given_up}))
        if len(tried) == before or min(tried.values(), key=lambda trial: trial.distance) is best:
            break
    return Search(min(tried.values(), key=lambda trial: trial.distance), tuple(tried.values()))
