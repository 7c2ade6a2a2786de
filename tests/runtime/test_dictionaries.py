"""What a processor returns as calibration: a batch measures and verifies as much as its rows one by one."""

import pytest
import torch
from tiny_models import token_ids

import hasten
from hasten.bench.runtime import tiny_inputs, tiny_zoo

ROWS = 12

pytestmark = pytest.mark.usefixtures("no_contest")


def batch(kind: str, rows: int = ROWS) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model and a batch for it, a picture or sound in every row."""
    model = tiny_zoo.build(*kind.split("/")).eval()
    return model, tiny_inputs.INPUTS[tuple(kind.split("/"))](model, rows=rows)


def one_by_one(given: dict[str, torch.Tensor], rows: int = ROWS) -> list[dict[str, torch.Tensor]]:
    """The rows of a batch; whatever is packed has as many parts in each."""
    return [{name: value.chunk(rows)[i] for name, value in given.items()} for i in range(rows)]


@pytest.mark.parametrize("kind", ["image-text/llava", "image-text/qwen2_vl", "speech/whisper"])
def test_a_batch_is_as_good_as_its_rows(kind):
    model, given = batch(kind)
    reports = []
    for calibration in (given, one_by_one(given)):
        with hasten.accelerated(model, hasten.Wina(0.5), calibration=calibration, measure_speed=False) as report:
            reports.append(report)
    whole, rows = reports
    assert whole.drift == rows.drift and whole.drift.kl > 1e-6
    assert whole.self_check == rows.self_check and whole.calibration_tokens == rows.calibration_tokens
    assert whole.techniques[0].active_share == rows.techniques[0].active_share < 0.9


def test_a_batch_held_out_is_decoded_row_by_row():
    model, given = batch("image-text/llava")
    kls = []
    for heldout in (given, one_by_one(given)):
        with hasten.accelerated(
            model, hasten.Wina(0.5), calibration=token_ids() % 80, heldout=heldout, measure_speed=False
        ) as report:
            kls.append((report.drift, report.techniques[0].active_share))
    assert kls[0] == kls[1] and kls[0][0].kl > 1e-6


@pytest.mark.parametrize(
    ("calibration", "heldout", "arguments", "words"),
    [
        (1, None, {}, "a tenth of calibration could not be set aside: give heldout="),
        (2, None, {"measure_drift": False}, "measure_drift=False"),
        (2, 24, {}, "4 tokens after those of its prefill"),
    ],
    ids=["one window", "not wanted", "nothing follows the picture"],
)
def test_the_report_says_why_drift_was_not_measured(calibration, heldout, arguments, words):
    model = tiny_zoo.build("image-text", "llava").eval()
    given = tiny_inputs.with_pixels(model, 16, rows=calibration)
    held = None if heldout is None else tiny_inputs.with_pixels(model, 16, at=heldout)
    with hasten.accelerated(
        model, hasten.Wina(0.5), calibration=given, heldout=held, measure_speed=False, **arguments
    ) as report:
        assert report.drift is None and f"not measured: {report.techniques[0].no_drift}" in str(report)
        assert words in report.to_dict()["techniques"][0]["no_drift"]


def test_a_batch_is_timed_as_the_report_says():
    """Eight rows of 40 tokens with a picture each: decode of one row after 128 tokens."""
    model, given = batch("image-text/llava", 8)
    shapes = set()
    inner = model.model.language_model
    hook = inner.register_forward_pre_hook(
        lambda module, x, arguments: shapes.add(tuple(arguments["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    with hasten.accelerated(model, hasten.Wina(0.5), calibration=given, measure_drift=False) as report:
        assert (1, 128) in shapes and {rows for rows, _ in shapes} == {1}
        assert "decode, after 128 tokens" in str(report) and report.speedup > 0
    hook.remove()
