"""How long what is timed is repeated, and what follows from the times: with clocks that the tests wind."""

import pytest
import torch
from tiny_models import build, token_ids

from hasten.acceleration import measure
from hasten.acceleration.inference import Inference
from hasten.acceleration.techniques.base import Regime
from hasten.bench.runtime import tiny_inputs, tiny_zoo

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("times", "most", "taken", "median"),
    [
        ([9, 1, 1, 1, 1, 7], 24, 5, 1),
        ([9, *[10, 11.2, 9.1, 10.7, 9.4] * 5], 24, 19, 10),
        ([9, 1, 2, 4, 8, 16, 32, 64], 6, 7, 6),
        ([9, 4, 8], 1, 2, 4),
    ],
    ids=["alike", "spread", "never alike", "once"],
)
def test_repeated_until_the_median_is_certain(times, most, taken, median):
    """The first run is for warming up; then as few as give the median to 5 %."""
    clock = iter([float(time) for time in times])
    assert measure.settled(lambda: next(clock), most) == median
    assert len(times) - len(list(clock)) == taken


class Contest:
    """Two products whose times are `ours` and `theirs` (of a batch), by a clock that only they move."""

    def __init__(self, monkeypatch, ours, theirs):
        self.now, self.order, self.ours, self.theirs = 0.0, [], ours, theirs
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def __call__(self, batch, turn):
        def run(name, seconds):
            self.order.append((batch, turn, name))
            self.now += seconds(batch)

        return lambda: run("theirs", self.theirs), lambda: run("ours", self.ours)


@pytest.mark.parametrize(
    ("ours", "theirs", "largest", "ratio"),
    [
        (lambda batch: 1.0, lambda batch: 1.5, 8, 1.5),
        (lambda batch: batch, lambda batch: 3.0, 2, 3.0),
        (lambda batch: 2.0, lambda batch: 1.0, 0, 0.5),
        (lambda batch: 4.0 if batch == 1 else 1.0, lambda batch: 2.0, 0, 0.5),
    ],
    ids=["everywhere", "small batches", "nowhere", "not at one"],
)
def test_the_largest_batch_up_to_which_ours_is_faster(ours, theirs, largest, ratio, monkeypatch):
    contest = Contest(monkeypatch, ours, theirs)
    assert measure.faster_up_to(contest, CPU) == (largest, ratio)
    firsts = [name for _, _, name in contest.order[::2]]
    assert firsts[:4] == ["theirs", "ours", "theirs", "ours"], "who comes first alternates"
    assert {turn for batch, turn, _ in contest.order if batch == 1} == set(range(11))


@torch.no_grad()
def test_heldout_logits_are_those_of_the_tokens_that_come_next():
    model, ids = build("llama"), token_ids(2, 40)
    found = measure.heldout_logits(Inference(model), list(ids))
    for row, (targets, logits) in zip(ids, found, strict=True):
        expected = model(input_ids=row[None]).logits[0, measure.DRIFT_PREFIX - 1 : -1]
        assert torch.equal(targets, row[measure.DRIFT_PREFIX :])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    nll = torch.nn.functional.cross_entropy(torch.cat([logits for _, logits in found]), ids[:, 16:].flatten())
    assert measure.drift(found, found).dense_perplexity == pytest.approx(float(nll.exp()), rel=1e-5)
    few = measure.heldout_logits(Inference(model), list(ids), tokens=30)
    assert [len(targets) for targets, _ in few] == [24, 6], "no more tokens than were asked for, and no less"


def test_regimes_are_shortened_to_the_positions_of_a_model(monkeypatch):
    config = build("opt").config
    config.max_position_embeddings = 40
    run, shapes = Inference(type(build("opt"))(config).eval()), []
    run.model.get_input_embeddings().register_forward_pre_hook(lambda module, x: shapes.append(tuple(x[0].shape)))
    monkeypatch.setattr(measure, "settled", lambda once, most: once())
    for asked, expected, ran in [
        (Regime(context=128), [(1, 14), (1, 1)], Regime(context=14)),  # and room for further steps
        (Regime(tokens=128), [(1, 40)], Regime(tokens=40)),
        (Regime(batch=2, tokens=7, context=128), [(2, 33), (2, 7)], Regime(batch=2, tokens=7, context=33)),
        (Regime(context=9), [(1, 9), (1, 1)], Regime(context=9)),
    ]:
        shapes.clear()
        assert measure.possible(run, asked) == ran
        assert measure.times(run, [ran]).keys() == {ran}
        assert shapes == expected, asked


@pytest.mark.parametrize("at", [4, 24], ids=["text follows", "the picture is last"])
def test_a_prompt_with_a_picture_is_timed_under_its_own_length(at, monkeypatch):
    model = tiny_zoo.build("image-text", "llava")
    run, shapes = Inference(model, tiny_inputs.with_pixels(model, 16, at=at)), []
    inner = model.model.language_model
    inner.register_forward_pre_hook(
        lambda _, x, given: shapes.append(given["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    monkeypatch.setattr(measure, "settled", lambda once, most: once())
    for asked in (Regime(batch=2, context=90), Regime(batch=2, tokens=90), Regime(tokens=30), Regime(context=3)):
        shapes.clear()
        ran = measure.possible(run, asked)
        measure.times(run, [ran])
        assert shapes == [(ran.batch, ran.context), (ran.batch, 1)] if ran.context else [(ran.batch, ran.tokens)]
    assert measure.possible(run, Regime(context=90)) == Regime(context=90 if at == 4 else 40, image=16)
    assert measure.possible(run, Regime(context=3)) == Regime(context=20 if at == 4 else 40, image=16)


def test_a_picture_at_the_end_leaves_nothing_to_predict():
    model = tiny_zoo.build("image-text", "llava")
    last, before = (tiny_inputs.with_pixels(model, 16, at=at) for at in (24, 20))
    run = Inference(model, before)
    assert measure.heldout_logits(run, [last]) == []
    ((targets, logits),) = measure.heldout_logits(run, [last, before])
    assert len(targets) == len(logits) == 4
