"""`hasten demo vision`, on a few questions, with schedules that were searched before."""

import json

import pytest
from command_line import run

import hasten
from hasten.acceleration.anatomy import Anatomy
from hasten.bench.runtime import vision_token_quality as study
from hasten.cli import picture_vision
from hasten.models.digit_questions import digit_questions

pytest.importorskip("sklearn")
FOUND = {
    "G-Search": hasten.FoundSchedule(((2, 0.25),), 8, "g_search", 0.8, 0.8, 0.4, 144.0, 5, 20),
    "P-Sigmoid": hasten.FoundSchedule(((1, 0.2), (3, 0.1)), 8, "p_sigmoid", 0.6, 0.8, 0.25, 144.0, 9, 20),
}


@pytest.fixture(scope="module")
def embedded():
    return study.embedded()


def test_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "search", lambda *arguments, **settings: FOUND)
    monkeypatch.setattr(
        study, "asked", lambda model, processor, samples, asked=study.asked: asked(*_few(model, processor))
    )
    monkeypatch.setattr(study, "PREFILLS", 1)
    result = run("demo", "vision", "--quick", "--plot", tmp_path / "kept.png", "--json", tmp_path / "kept.json")
    assert (tmp_path / "kept.png").stat().st_size > 20_000
    record = json.loads((tmp_path / "kept.json").read_text())
    names = [row["name"] for row in record["results"]]
    assert names[0] == "all image tokens" and all(name in result.stdout for name in names)
    assert {f"25%, {name}" for name in study.SCORES} < set(names)
    assert record["results"][0]["operations"] == 1
    for row in record["results"][1:]:
        assert row["operations"] < 1 and row["kv_bytes"] < record["results"][0]["kv_bytes"]
    assert record["searched"]["G-Search"]["by_layer"] == [[2, 0.25]]


def _few(model, processor):
    return model, processor, digit_questions(5, study.QUESTION_SEED)


def test_schedules_of_equal_cost_do_not_exceed_it(embedded):
    model, processor = embedded
    questions = study.asked(*_few(model, processor))
    anatomy = Anatomy(model)
    compared = study.variants(model, questions, FOUND, ())
    costs = {
        name: questions.cost(technique.schedule.shares(8), anatomy)
        for name, technique in compared.items()
        if "of operations" in name and "P-Sigmoid" not in name
    }
    assert len(costs) == 1 + len(study.PYRAMIDS)
    assert all(0.2 < cost <= study.BUDGET for cost in costs.values())
    with pytest.raises(ValueError, match="costs more than 25% of the operations"):
        study.within(questions, model, lambda share: hasten.FastV(4, share))


def test_the_picture_shows_what_is_kept(embedded):
    model, processor = embedded
    sample = digit_questions(1, seed=7)[0]
    kept = picture_vision.kept_patches(model, processor, sample, hasten.VisionTokens(hasten.FastV(2, 0.25)))
    assert kept.shape == (12, 12) and kept.sum() == 36
    for digit in sample.digits:  # what the model reads of them
        left, top, right, bottom = (edge // 6 for edge in digit.box)
        assert kept[top : bottom + 1, left : right + 1].any()
    whole = picture_vision.kept_patches(model, processor, sample, hasten.VisionTokens(hasten.FastV(2, 1.0)))
    assert whole.all()


def test_differences_are_taken_question_by_question():
    def result(correct):
        return study.Result("", "", 0.0, 0.0, 0.0, 0.0, 0, correct)

    same = study.difference(result((1.0, 0.0, 1.0)), result((1.0, 0.0, 1.0)))
    assert same == {"difference": 0.0, "error": 0.0}
    other = study.difference(result((1.0, 1.0, 1.0, 0.0)), result((0.0, 1.0, 0.0, 0.0)))
    assert other["difference"] == 0.5 and other["error"] == pytest.approx(1.96 * (1 / 3) ** 0.5 / 2)
