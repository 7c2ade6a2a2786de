"""Adaptive Guidance: classifier-free guidance bit for bit until it stops, exact counts, per-sample measures, and the
lag.
"""

import math

import pytest
import torch
from mixture import KINDS, SCHEDULES, Counting, mixture, start, step_at

from hasten.guidance.diffusion.adaptive import AdaptiveGuidance
from hasten.guidance.diffusion.classifier_free import ClassifierFreeGuidance, Cutoff
from hasten.guidance.diffusion.intervals import StepInterval, StepSet, Within
from hasten.guidance.diffusion.sampling import sample

N, B = 16, 5


def run(guide, name="vp", kind="epsilon", x=None, model=None, steps=N):
    schedule, predict = SCHEDULES[name](steps), Counting((model or mixture()).denoiser(kind))
    result = sample(guide, predict, schedule, start(schedule, B) if x is None else x, kind)
    assert (result.evaluations, sum(result.calls)) == (predict.rows, predict.calls)
    return result


@pytest.mark.parametrize("batch", ["all", "rows"])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_threshold_above_one_is_cfg_bit_for_bit(name, kind, batch):
    never = run(AdaptiveGuidance(5.0, threshold=math.inf, batch=batch), name, kind)
    assert torch.equal(never.sample, run(ClassifierFreeGuidance(5.0), name, kind).sample)
    assert never.evaluations == 2 * N * B


@pytest.mark.parametrize("batch", ["all", "rows"])
@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("guard", [1, 4, N])
def test_a_threshold_that_always_fires_stops_after_the_guard_and_the_lag(guard, lag, batch):
    result = run(AdaptiveGuidance(5.0, threshold=-1.0, min_guided_steps=guard, batch=batch, lag=lag))
    guided = min(guard + lag, N)
    assert result.evaluations == B * (2 * guided + (N - guided))
    assert result.calls == (2,) * guided + (1,) * (N - guided)
    assert torch.equal(result.sample, run(Cutoff(5.0, steps=guided)).sample)
    assert result.memory["adaptive_guidance"]["lag"] == lag


@pytest.mark.parametrize("kind", ["epsilon", "v"])
@pytest.mark.parametrize("space", ["epsilon", "x0", "model"])
def test_what_is_recorded_is_what_brute_force_measures(space, kind):
    schedule, model, seen = SCHEDULES["vp"](N), mixture(), {}

    def predict(x, step, name, rows):
        asked = {"epsilon": "epsilon", "x0": "sample", "model": kind}[space]
        seen[step.index, name] = model.predict(x, step.alpha, step.sigma, name, asked)
        return model.predict(x, step.alpha, step.sigma, name, kind)

    guide = AdaptiveGuidance(5.0, threshold=math.inf, space=space)
    result = sample(guide, predict, schedule, start(schedule, B), kind)
    assert result.memory["adaptive_guidance"]["space"] == space
    for index in range(N):
        recorded = result.trace[index]
        for row in range(B):
            c, u = seen[index, "conditional"][row], seen[index, "unconditional"][row]
            assert recorded["cosine"][row].item() == pytest.approx(float(c @ u / (c.norm() * u.norm())), abs=1e-11)
            assert recorded["update_norm"][row].item() == pytest.approx(float((c - u).norm()), rel=1e-8, abs=1e-12)
            assert recorded["conditional_norm"][row].item() == pytest.approx(float(c.norm()), rel=1e-9)
        assert recorded["scale"] == 5.0


def test_spaces_differ_where_noise_is_high():
    """Both noise predictions are nearly the sample itself there: the reason for the guard."""
    first = [run(AdaptiveGuidance(5.0, math.inf, space=space)).trace[0]["cosine"] for space in ("epsilon", "x0")]
    assert (first[0] > 0.99).all() and (first[1] < 0.9).all()


def stops(result):
    """Per row, after how many guided steps it stopped, from the recorded cosines."""
    measured = torch.stack([result.trace[i].get("cosine", torch.full((B,), torch.nan)) for i in range(N)])
    return (~measured.isnan()).sum(dim=0)


GUIDE = dict(scale=4.0, threshold=0.97, space="x0", min_guided_steps=2)


def test_rows_stop_by_themselves_as_if_alone():
    together = run(AdaptiveGuidance(batch="rows", **GUIDE))
    guided = stops(together)
    assert len(guided.unique()) > 1 and guided.max() < N  # rows that differ, or this test says nothing
    assert together.evaluations == B * N + int(guided.sum())
    x = start(SCHEDULES["vp"](N), B)
    for row in range(B):
        alone = run(AdaptiveGuidance(batch="rows", **GUIDE), x=x[row : row + 1])
        assert alone.evaluations == N + guided[row]
        torch.testing.assert_close(alone.sample[0], together.sample[row], rtol=0, atol=1e-12)
    within = run(Within(AdaptiveGuidance(batch="rows", **GUIDE), StepInterval()))
    assert within.rows == together.rows and torch.equal(within.sample, together.sample)


def test_the_batch_stops_with_its_last_row():
    rows, together = run(AdaptiveGuidance(batch="rows", **GUIDE)), run(AdaptiveGuidance(batch="all", **GUIDE))
    last = int(stops(rows).max())
    assert together.calls == (2,) * last + (1,) * (N - last)
    assert together.evaluations == B * (N + last)
    assert torch.equal(together.sample, run(Cutoff(4.0, steps=last)).sample)
    assert together.memory["adaptive_guidance"]["stopped"].all()
    assert together.trace[last]["scale"] == 1.0 and "cosine" not in together.trace[last]


def test_rows_may_be_computed_that_were_not_asked_for():
    """Whoever cannot slice the batch gives all rows, of which a stopped one reads nothing: any finite number does."""
    schedule, guide, model = SCHEDULES["vp"](N), AdaptiveGuidance(batch="rows", **GUIDE), mixture()
    expected, memory, x = run(guide), {}, start(SCHEDULES["vp"](N), B)
    for index in range(N):
        step = schedule.step(index, x, "epsilon", memory)
        needed = torch.tensor(guide.rows(step))
        c, u = (model.predict(x, step.alpha, step.sigma, name, "epsilon") for name in ("conditional", "unconditional"))
        u = torch.where(needed[:, None], u, torch.full_like(u, 1e6))
        guided = guide(step.with_predictions(c, u if "unconditional" in guide.passes(step) else None))
        x = step.next_alpha * (x - step.sigma * guided) / step.alpha + step.next_sigma * guided
    torch.testing.assert_close(x, expected.sample, rtol=0, atol=1e-12)


def test_equal_predictions_lose_nothing():
    model = mixture()
    model.classes["unconditional"] = model.classes["conditional"]
    adaptive = run(AdaptiveGuidance(5.0, threshold=0.999, min_guided_steps=1), model=model)
    assert adaptive.evaluations == B * (N + 1)
    torch.testing.assert_close(
        adaptive.sample, run(ClassifierFreeGuidance(5.0), model=model).sample, rtol=0, atol=1e-12
    )


def test_the_first_unguided_step_is_off_by_the_update_it_leaves_out():
    """The closed form of the error: |a' d_x0 + s' d_noise| with d_noise = (scale - 1) * (conditional -
    unconditional).
    """
    schedule = SCHEDULES["vp"](N)
    stop = 6
    full = run(AdaptiveGuidance(5.0, math.inf)).trace[stop]["update_norm"]
    shorter = type(schedule)(schedule.alphas[: stop + 2], schedule.sigmas[: stop + 2])
    x, denoiser = start(schedule, B), mixture().denoiser("epsilon")
    cut, cfg = (
        sample(guide, denoiser, shorter, x, "epsilon").sample
        for guide in (Cutoff(5.0, stop), ClassifierFreeGuidance(5.0))
    )
    a, s, a1, s1 = schedule.alphas[stop], schedule.sigmas[stop], schedule.alphas[stop + 1], schedule.sigmas[stop + 1]
    torch.testing.assert_close((cut - cfg).norm(dim=1), abs(s1 - a1 * s / a) * 4.0 * full, rtol=1e-10, atol=0)


def test_the_criterion_with_the_scale_accounts_for_it():
    agreed = []
    for scale in (1.5, 2.0, 8.0):
        step = step_at(SCHEDULES["vp"](N), 9, "epsilon", batch=64)
        AdaptiveGuidance(scale, threshold=-1.0, space="x0", min_guided_steps=1, tolerance=0.5)(step)
        c, u = step_at(SCHEDULES["vp"](N), 9, "sample", batch=64).require("conditional", "unconditional")
        stopped = step.memory["adaptive_guidance"]["stopped"]
        assert torch.equal(stopped, (scale - 1) * (c - u).norm(dim=1) < 0.5 * c.norm(dim=1))
        agreed.append(int(stopped.sum()))
    assert 64 > agreed[0] > agreed[1] > agreed[2] > 0
    assert run(AdaptiveGuidance(3.0, min_guided_steps=1, tolerance=0.0)).calls == (2,) * N
    assert run(AdaptiveGuidance(3.0, min_guided_steps=3, tolerance=1e9)).calls == (2,) * 3 + (1,) * (N - 3)


def test_runs_do_not_remember_each_other():
    guide = AdaptiveGuidance(batch="all", **GUIDE)
    first, second = run(guide), run(guide)
    assert first.calls == second.calls and torch.equal(first.sample, second.sample)


def test_the_guard_counts_guided_steps_wherever_they_begin():
    late = Within(AdaptiveGuidance(5.0, threshold=-1.0, min_guided_steps=3), StepSet(range(6, N)))
    result = run(late)
    assert result.calls == (1,) * 6 + (2,) * 3 + (1,) * (N - 9)
    assert result.memory["adaptive_guidance"]["guided"] == 3


def test_scale_one_asks_for_nothing_more():
    assert run(AdaptiveGuidance(1.0)).evaluations == N * B


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(threshold=1.5), r"threshold \(or math.inf: never stop\) must be a finite number in \[-1, 1\], got 1.5"),
        (dict(threshold=-1.01), "got -1.01"),
        (dict(threshold=-math.inf), "got -inf"),
        (dict(space="noise"), "unknown space 'noise': expected one of epsilon, x0, model"),
        (dict(min_guided_steps=0), "min_guided_steps must be an integer of at least 1, got 0"),
        (dict(batch="any"), "unknown batch rule 'any'"),
        (dict(tolerance=-1.0), "tolerance must be a finite number"),
        (dict(lag=-1), "lag must be an integer of at least 0"),
    ],
)
def test_bad_input_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveGuidance(**fields)
