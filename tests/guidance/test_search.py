"""The search for a policy: within its budget, no worse than any interval, and stable under every exchange
of one step.
"""

import itertools

import pytest
import torch
from mixture import SCHEDULES, mixture, start

from hasten.guidance.diffusion.classifier_free import ClassifierFreeGuidance
from hasten.guidance.diffusion.intervals import StepSet
from hasten.guidance.diffusion.sampling import sample
from hasten.guidance.diffusion.search import root_mean_square, search

N = 7


def run(policy):
    schedule = SCHEDULES["vp"](N)
    guide = ClassifierFreeGuidance(4.0, interval=policy)
    return sample(guide, mixture().denoiser("epsilon"), schedule, start(schedule), "epsilon")


def distance(indices):
    return root_mean_square(run(StepSet(indices)).sample, run(StepSet(range(N))).sample)


@pytest.mark.parametrize("budget", [N + 1, N + 3, 2 * N - 2])
def test_the_best_policy_beats_intervals_and_exchanges_within_the_budget(budget):
    seen = []
    found = search(lambda policy: run(policy).sample, N, budget, progress=seen.append)
    best, guided = found.best, budget - N
    assert found.trials == tuple(seen) and len({trial.policy for trial in seen}) == len(seen)
    assert all(sum(run(trial.policy).calls) == trial.evaluations == budget for trial in seen)
    assert best.distance == distance(best.policy.indices) == min(trial.distance for trial in seen)
    assert best.distance <= min(distance(range(first, first + guided)) for first in range(N - guided + 1))
    chosen = set(best.policy.indices)
    for given_up, taken in itertools.product(chosen, set(range(N)) - chosen):
        assert best.distance <= distance({*chosen, taken} - {given_up})


def test_where_steps_contribute_by_themselves_it_finds_the_most_important_ones():
    importance = torch.tensor([9.0, 1.0, 2.0, 8.0, 3.0, 0.5, 4.0, 7.0])
    found = search(
        lambda policy: torch.where(torch.isin(torch.arange(8), torch.tensor(policy.indices)), importance, 0.0),
        steps=8,
        budget=11,
    )
    assert found.best.policy == StepSet([0, 3, 7])


def test_everything_and_nothing_guided_are_policies_too():
    full = search(lambda policy: run(policy).sample, N, 2 * N)
    assert (full.best.policy, full.best.distance, len(full.trials)) == (StepSet(range(N)), 0.0, 1)
    nothing = search(lambda policy: run(policy).sample, N, N)
    assert (nothing.best.policy, len(nothing.trials)) == (StepSet([]), 1) and nothing.best.distance > 0


def test_the_number_of_trials_is_a_bound():
    assert len(search(lambda policy: run(policy).sample, N, N + 3, trials=6).trials) == 6


@pytest.mark.parametrize("budget", [N - 1, 2 * N + 1, 9.5])
def test_a_budget_out_of_reach_is_refused(budget):
    with pytest.raises(ValueError, match=f"budget must .*got {budget}"):
        search(lambda policy: run(policy).sample, N, budget)


def test_a_distance_that_is_no_number_stops_the_search():
    def broken(policy):
        return torch.full((1, 2), torch.nan if policy.indices == (1, 2, 3) else 1.0)

    with pytest.raises(ValueError, match=r"distance of StepSet\(indices=\(1, 2, 3\)\) .* finite number, got nan"):
        search(broken, N, N + 3)
