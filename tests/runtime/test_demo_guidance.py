"""`hasten demo guidance`, and the statistics of the study in bench/."""

import json

import pytest
import torch
from command_line import run

import hasten
from hasten.cli import demo_guidance


def test_every_method_is_drawn_and_costs_what_it_should(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_guidance, "STEPS", 10)
    result = run("demo", "guidance", "--quick", "--plot", tmp_path / "digits.png", "--json", tmp_path / "digits.json")
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "digits.json").read_text())
    found = {(record["method"], record["scale"]): record for record in written["guidance"]}
    methods = set(demo_guidance.METHODS) - {demo_guidance.CONDITIONAL}
    assert set(found) == {(name, scale) for name in methods for scale in (3, 10)} | {("conditional only", 1)}
    assert all(name in result.stdout for name in demo_guidance.METHODS)
    assert found["conditional only", 1]["evaluations"] == 10
    for scale in (3, 10):
        cost = {name: found[name, scale]["evaluations"] for name in methods}
        assert cost["CFG"] == cost["APG"] == cost["CFG++"] == 20
        assert all(10 < cost[name] < 20 for name in ("interval", "cutoff", "adaptive (AG)"))
        assert cost["adaptive (AG)"] % 1  # a mean over digits that stop one by one
        assert found["CFG", scale]["distance"] == 0 and found["cutoff", scale]["distance"] > 0
    assert found["CFG", 3]["accuracy"] >= 0.9
    assert found["CFG", 10]["saturation"] > found["APG", 10]["saturation"] >= 0


@pytest.mark.parametrize("option", ["--plot", "--json"])
def test_files_that_cannot_be_written_are_refused_before_anything_is_drawn(option, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_guidance, "compare", None)
    assert "there is no folder" in run("demo", "guidance", option, tmp_path / "nowhere" / "file", status=1).stderr


def test_an_unknown_topic_is_a_usage_error():
    assert "Usage" in run("demo", "digits", status=2).output


# ---------------------------------------------------------------- the study


@pytest.fixture
def study():
    pytest.importorskip("sklearn")
    from hasten.bench.runtime import guidance

    return guidance


@pytest.mark.parametrize(("criterion", "space"), [("cosine", "epsilon"), ("cosine", "x0"), ("update", "x0")])
def test_a_calibrated_threshold_stops_when_it_should(study, monkeypatch, criterion, space):
    """On the digits that it was set on, the mean number of guided steps is the one asked for, up to the one digit that
    the threshold moves.
    """
    count, steps = 20, 12
    monkeypatch.setattr(study, "STEPS", steps)
    monkeypatch.setattr(study, "GUIDED_STEPS", 7.5)
    monkeypatch.setattr(study, "MIN_GUIDED_STEPS", 2)
    monkeypatch.setattr(study, "CALIBRATION_SEEDS", range(count))
    model = hasten.DigitDiffusion.load(hasten.embedded_model("digit-diffusion"))
    threshold = study.calibrate(model, 3.0, space, criterion)
    guide = study.AdaptiveGuidance(
        3.0,
        threshold if criterion == "cosine" else 1.0,
        space,
        2,
        batch="rows",
        tolerance=threshold if criterion == "update" else None,
    )
    drawing = study.draw(model, torch.arange(count) % 10, guide, range(count), steps)
    assert drawing.rows / count - steps == pytest.approx(7.5, abs=1.5 / count * steps)


def test_cases_are_chosen_with_what_they_are_compared_with(study):
    every = [study.Case(name, None, "CFG 3") for name in ("CFG 3", "AG 3, x0", "AG 3, epsilon", "APG 10")]
    assert [case.name for case in study.select(every, ["AG*", "CFG 3"])] == ["CFG 3", "AG 3, x0", "AG 3, epsilon"]
    with pytest.raises(ValueError, match=r"must also match \['CFG 3'\]"):
        study.select(every, ["AG*"])
    with pytest.raises(ValueError, match="APG 10"):
        study.select(every, ["CFG+"])


def test_intervals(study):
    generator = torch.Generator().manual_seed(1)
    values = 3 + torch.randn(1000, generator=generator, dtype=torch.float64)
    found = study.bootstrap(values)
    assert found["estimate"] == pytest.approx(float(values.mean()))
    half = 1.96 * float(values.std()) / 1000**0.5
    assert found["high"] - found["estimate"] == pytest.approx(half, rel=0.1)
    assert found["estimate"] - found["low"] == pytest.approx(half, rel=0.1)
    few = torch.tensor([1.0, 2.0, 3.0, 100.0], dtype=torch.float64)
    assert study.bootstrap(few, study.median)["estimate"] == 2.5
    # Wilson's interval by its definition: the shares p with |share - p| = z sqrt(p (1 - p) / n).
    share = study.wilson(torch.tensor([1.0] * 19 + [0.0], dtype=torch.float64))
    for p in (share["low"], share["high"]):
        assert abs(0.95 - p) == pytest.approx(1.96 * (p * (1 - p) / 20) ** 0.5)
    assert study.wilson(torch.ones(50, dtype=torch.float64))["low"] < 1


def test_frechet_distance_of_gaussians(study):
    """Nothing to itself; the squared shift where only the mean differs; (a - 1)^2 trace where only the scale does."""
    cloud = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cloud = (cloud - cloud.mean(0)) @ torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert study.frechet(cloud, cloud) == pytest.approx(0, abs=1e-8)
    assert study.frechet(cloud, cloud + 2) == pytest.approx(24)
    trace = float(torch.cov(cloud.T).trace())
    assert study.frechet(cloud, 3 * cloud) == pytest.approx(4 * trace)
