"""LinearAG: exact where the unconditional prediction is linear in the past, scored by brute force where it is not, and
bound to its runs.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from mixture import SCHEDULES, Counting, Mixture, mixture, start

from hasten.guidance.diffusion.classifier_free import ClassifierFreeGuidance, Cutoff
from hasten.guidance.diffusion.intervals import StepInterval, StepSet, Within
from hasten.guidance.diffusion.linear_ag import (
    Coefficients,
    LinearAG,
    LinearRecorder,
    RunKey,
    Trajectories,
    alternating,
    fit,
)
from hasten.guidance.diffusion.sampling import sample

N, SCALE, D = 12, 3.0, 6
KEY = RunKey("mixture", "ddim on vp", N, SCALE, (D,), "epsilon")


def gaussians():
    """Two Gaussians that differ in their mean alone: everything lies in the span of the first noise and the
    two means.
    """
    means = torch.randn(2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    weights, identity = torch.ones(2, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
    return Mixture(weights, means, 0.5 * identity.expand(2, D, D), {"conditional": [0], "unconditional": [1]})


def run(guide, model, seed=5, batch=4):
    schedule = SCHEDULES["vp"](N)
    predict = Counting(model.denoiser("epsilon"))
    result = sample(guide, predict, schedule, start(schedule, batch, D, seed), "epsilon")
    assert (result.evaluations, sum(result.calls)) == (predict.rows, predict.calls)
    return result


def recorded(model, seed, batch=32, predicted=None):
    trajectories = Trajectories(KEY, alternating(N) if predicted is None else predicted)
    run(LinearRecorder(trajectories), model, seed, batch)
    return trajectories


def fitted(model):
    return fit(recorded(model, 1), recorded(model, 2))


def test_the_published_choice_alternates_in_the_first_half():
    assert alternating(12) == (1, 3, 5) and alternating(20) == (1, 3, 5, 7, 9)


def test_recording_is_classifier_free_guidance():
    guide = LinearRecorder(Trajectories(KEY, alternating(N)))
    assert torch.equal(run(guide, mixture()).sample, run(ClassifierFreeGuidance(SCALE), mixture()).sample)


def test_where_the_target_is_linear_in_the_regressors_it_is_exact():
    """Hence the run is that of a fixed stop, at three fewer evaluations per sample."""
    coefficients = fitted(gaussians())
    assert all(1 - r2 < 1e-14 for r2 in coefficients.r2.values()), coefficients.r2
    guided, cut = (run(guide, gaussians(), seed=3) for guide in (LinearAG(coefficients, KEY), Cutoff(SCALE, N // 2)))
    torch.testing.assert_close(guided.sample, cut.sample, rtol=0, atol=1e-8 * float(cut.sample.abs().max()))
    not_guided = run(ClassifierFreeGuidance(SCALE, interval=StepSet([0, 2, 4])), gaussians(), seed=3).sample
    assert (not_guided - cut.sample).abs().max() > 0.05


def test_it_computes_every_second_pass_of_the_first_half_and_none_of_the_second():
    result = run(LinearAG(fitted(mixture()), KEY), mixture())
    assert result.calls == (2, 1) * (N // 4) + (1,) * (N // 2)
    assert result.evaluations == 4 * (N + N // 4)
    assert [result.trace[i]["scale"] for i in range(N)] == [SCALE] * (N // 2) + [1.0] * (N // 2)
    longer = run(LinearAG(fitted(mixture()), KEY, stop=9), mixture())
    assert longer.calls == (2, 1, 2, 1, 2, 1, 2, 2, 2, 1, 1, 1)


def regressors_and_target(model, seed, step, batch):
    """By brute force: the rows of the least-squares problem at `step`, [K, elements], and its target."""
    seen, schedule = {}, SCHEDULES["vp"](N)

    def predict(x, at, name, rows):
        seen[at.index, name] = model.predict(x, at.alpha, at.sigma, name, "epsilon")
        return seen[at.index, name]

    sample(ClassifierFreeGuidance(SCALE), predict, schedule, start(schedule, batch, D, seed), "epsilon")
    rows = []
    for index in range(step + 1):
        rows.append(seen[index, "conditional"].flatten())
        if index < step and index not in alternating(N):
            rows.append(seen[index, "unconditional"].flatten())
    return torch.stack(rows), seen[step, "unconditional"].flatten()


def test_the_streamed_fit_and_its_scores_are_those_of_least_squares():
    trajectories = recorded(mixture(), 1, 32)
    run(LinearRecorder(trajectories), mixture(), 4, 48)  # a second batch, of another size, adds to the first
    coefficients = fit(trajectories, recorded(mixture(), 2, 32), ridge=0.0)
    for step in alternating(N):
        batches = [regressors_and_target(mixture(), seed, step, batch) for seed, batch in ((1, 32), (4, 48))]
        rows, target = (torch.cat(parts, dim=-1) for parts in zip(*batches, strict=True))
        beta = torch.linalg.lstsq(rows.T, target[:, None]).solution[:, 0]
        assert coefficients.betas[step] == pytest.approx(beta.tolist(), rel=1e-6, abs=1e-7)

        rows, target = regressors_and_target(mixture(), 2, step, 32)
        left = (beta @ rows - target).square().sum()
        assert coefficients.r2[step] == pytest.approx(float(1 - left / (target - target.mean()).square().sum()))
        over = 1 - left / (rows[-1] - target).square().sum()
        assert coefficients.r2_over_conditional[step] == pytest.approx(float(over), rel=1e-6)
        assert 0.5 < coefficients.r2_over_conditional[step] < 1


def test_a_ridge_makes_coefficients_smaller():
    size = [
        sum(math.hypot(*betas) for betas in fit(recorded(mixture(), 1), recorded(mixture(), 2), ridge).betas.values())
        for ridge in (0.0, 1e-3, 1e-1, 10.0)
    ]
    assert size == sorted(size, reverse=True) and size[-1] < 0.5 * size[0]
    once, often = recorded(mixture(), 1), recorded(mixture(), 1)
    often.grams.update({step: 100 * gram for step, gram in often.grams.items()})
    for step, betas in fit(once, recorded(mixture(), 2), 0.1).betas.items():  # it counts in the regressors' own size
        assert fit(often, recorded(mixture(), 2), 0.1).betas[step] == pytest.approx(betas, rel=1e-6)


def test_saved_coefficients_come_back_exactly(tmp_path):
    coefficients = fitted(mixture())
    coefficients.save(tmp_path / "linear_ag.json")
    assert Coefficients.load(tmp_path / "linear_ag.json", KEY) == coefficients
    assert json.loads((tmp_path / "linear_ag.json").read_text())["key"]["model"] == "mixture"


@pytest.mark.parametrize(
    "change",
    [
        {"model": "another"},
        {"scheduler": "euler"},
        {"steps": 14},
        {"scale": 5.0},
        {"shape": (4, 4)},
        {"parameterization": "v"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_coefficients_of_other_runs_are_refused_by_both_names(tmp_path, change):
    coefficients, other = fitted(mixture()), replace(KEY, **change)
    coefficients.save(tmp_path / "linear_ag.json")
    (name,) = change
    message = rf"coefficients of RunKey\(model='mixture'.* cannot serve RunKey\(.*\): {name} differ"
    for use in (
        lambda: LinearAG(coefficients, other),
        lambda: Coefficients.load(tmp_path / "linear_ag.json", other),
        lambda: fit(recorded(mixture(), 1), Trajectories(other, (1,))),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_a_run_that_is_not_that_of_the_key_is_refused():
    guide, schedule = LinearAG(fitted(mixture()), KEY), SCHEDULES["vp"](N + 1)
    with pytest.raises(ValueError, match=r"cannot serve .*steps=13.*: steps differ"):
        sample(guide, mixture().denoiser("epsilon"), schedule, start(schedule), "epsilon")
    schedule = SCHEDULES["vp"](N)
    with pytest.raises(ValueError, match=r"cannot serve .*: parameterization differ"):
        sample(guide, mixture().denoiser("v"), schedule, start(schedule), "v")


def test_bad_input_is_refused(tmp_path):
    trajectories = recorded(mixture(), 1)
    with pytest.raises(ValueError, match=r"steps to predict must lie in \[1, 11\], got \(0, 2\)"):
        Trajectories(KEY, (0, 2))
    with pytest.raises(ValueError, match="held_out must be other runs than those fitted"):
        fit(trajectories, trajectories)
    with pytest.raises(ValueError, match="held_out hold no recorded runs for step 1"):
        fit(trajectories, Trajectories(KEY, alternating(N)))
    with pytest.raises(ValueError, match="ridge must be a finite number"):
        fit(trajectories, recorded(mixture(), 2), ridge=-1.0)
    with pytest.raises(ValueError, match=r"stop must be an integer of at least 0, got 0.5"):
        LinearAG(fitted(mixture()), KEY, stop=0.5)
    (tmp_path / "other.json").write_text(json.dumps({"version": 2}))
    with pytest.raises(ValueError, match="holds no LinearAG coefficients of version 1"):
        Coefficients.load(tmp_path / "other.json", KEY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["key"].pop("model"), "missing .* 'model'"),
        (lambda saved: saved["key"].update(seed=1), "unexpected keyword argument 'seed'"),
        (lambda saved: saved["key"].update(steps="12"), "steps must be an integer"),
        (lambda saved: saved.update(key=[1]), "must be a mapping"),
        (lambda saved: saved.update(more=1), "unknown more"),
        (lambda saved: saved.pop("r2"), "'r2'"),
        (lambda saved: saved["betas"].update({"1": [1.0]}), "expected 3 numbers as coefficients of step 1"),
        (lambda saved: saved["betas"].update({"3": ["a"] * 6}), "expected 6 numbers as coefficients of step 3"),
        (lambda saved: saved["betas"].update({"first": [1.0]}), "first"),
    ],
)
def test_a_damaged_file_is_refused_by_its_name(tmp_path, change, message):
    path = tmp_path / "linear_ag.json"
    fitted(mixture()).save(path)
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=f"linear_ag.json holds no LinearAG coefficients of version 1: .*{message}"):
        Coefficients.load(path, KEY)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"linear_ag.json holds no LinearAG coefficients"):
        Coefficients.load(path, KEY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model must be a name, got None"),
        ({"steps": 12.0}, "steps must be an integer of at least 1"),
        ({"shape": None}, "shape must be that of one sample, got None"),
        ({"parameterization": "eps"}, "unknown prediction type 'eps'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_keys_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(KEY, **change)


def test_it_refuses_to_estimate_from_a_part_of_the_run():
    schedule, guide = SCHEDULES["vp"](N), Within(LinearAG(fitted(mixture()), KEY), StepInterval(0.2, 1.0))
    with pytest.raises(ValueError, match=r"step 3: LinearAG needs the predictions of all earlier steps, 6, .*: 3"):
        sample(guide, mixture().denoiser("epsilon"), schedule, start(schedule), "epsilon")


def test_predictions_are_kept_up_to_the_last_predicted_step():
    schedule, last, kept = SCHEDULES["vp"](N), max(alternating(N)), []

    class Watched(LinearAG):
        def __call__(self, step):
            guided = super().__call__(step)
            kept.append(len(step.memory.get("linear_ag", [])))
            return guided

    result = sample(
        Watched(fitted(mixture()), KEY, stop=N), mixture().denoiser("epsilon"), schedule, start(schedule), "epsilon"
    )
    assert all(kept[: last + 1]) and not any(kept[last + 1 :])
    assert result.calls == tuple(1 if index in alternating(N) else 2 for index in range(N))
    assert all(result.trace[index]["scale"] == KEY.scale for index in range(N))
