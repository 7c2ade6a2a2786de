"""The embedded digit model: it loads, repeats, draws what it is asked for, counts what it computes, and refuses bad
input.
"""

import json
import math
import shutil

import pytest
import torch

import hasten
from hasten.guidance.diffusion.adaptive import AdaptiveGuidance
from hasten.guidance.diffusion.classifier_free import ClassifierFreeGuidance, Cutoff
from hasten.models.digit_diffusion.classifier import contrast, saturation
from hasten.models.digit_diffusion.drawing import draw
from hasten.models.digit_diffusion.modeling import alpha_sigma

FOLDER = hasten.embedded_model("digit-diffusion")
LABELS = torch.arange(100) % 10
CFG = ClassifierFreeGuidance(3.0)


@pytest.fixture(scope="module")
def model():
    return hasten.DigitDiffusion.load(FOLDER)


@pytest.fixture(scope="module")
def classifier():
    return hasten.DigitClassifier.load(FOLDER)


def test_the_weights_are_small_and_the_card_tells_what_was_measured():
    assert sum(file.stat().st_size for file in FOLDER.glob("*.safetensors")) <= 5e6
    record = json.loads((FOLDER / "training.json").read_text())
    card = (FOLDER / "README.md").read_text()
    assert f"{record['measured']['classifier_accuracy']:.1%} of the held-out digits" in card
    assert f"seed {record['run']['seed']}" in card and record["run"]["command"] in card


def test_the_classifier_knows_the_digits_that_were_held_out(classifier):
    datasets, selection = pytest.importorskip("sklearn.datasets"), pytest.importorskip("sklearn.model_selection")
    record = json.loads((FOLDER / "training.json").read_text())
    images, labels = datasets.load_digits(return_X_y=True)
    _, held_out, _, answers = selection.train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=record["run"]["seed"]
    )
    digits = torch.tensor(held_out, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    accuracy = float(classifier.correct(digits, torch.tensor(answers)).float().mean())
    assert accuracy == pytest.approx(record["measured"]["classifier_accuracy"], abs=1e-6) and accuracy > 0.98
    assert saturation(digits).sum() == 0


@pytest.mark.parametrize(("scale", "bound"), [(1.0, 0.9), (3.0, 0.97)])
def test_samples_are_the_digits_that_were_asked_for(model, classifier, scale, bound):
    samples = draw(model, LABELS, ClassifierFreeGuidance(scale), range(100), 20).samples
    assert classifier.correct(samples, LABELS).float().mean() >= bound
    assert classifier.correct(samples, LABELS.roll(1)).float().mean() <= 1 - bound


def test_the_scale_pulls_away_from_the_unconditional_class(model):
    weak, strong = (draw(model, LABELS[:20], ClassifierFreeGuidance(w), range(20), 10).samples for w in (1.0, 10.0))
    assert saturation(strong).mean() > 0.05 > saturation(weak).mean()
    assert contrast(strong).mean() > contrast(weak).mean()


def test_a_seed_gives_the_same_digit_again_whatever_is_drawn_beside_it(model):
    drawn = draw(model, LABELS[:12], CFG, range(12), 10).samples
    assert torch.equal(drawn, draw(model, LABELS[:12], CFG, range(12), 10).samples)
    two = draw(model, LABELS[[7, 2]], CFG, [7, 2], 10).samples
    torch.testing.assert_close(two, drawn[[7, 2]], rtol=0, atol=1e-4)
    assert not torch.allclose(draw(model, LABELS[[7]], CFG, [6], 10).samples, two[:1], atol=0.1)


def test_the_unconditional_class_averages_over_digits(model):
    """At the noisiest time a digit's class says most about it: the unconditional x0 lies nearer to every class's than
    these to each other.
    """
    time = model.config.latest
    alpha, sigma = alpha_sigma(time)
    x = model.noise(range(10))
    x0 = {label: alpha * x - sigma * model(x, time, torch.full((10,), label)) for label in range(11)}
    between = torch.stack([(x0[a] - x0[b]).norm() for a in range(10) for b in range(a)])
    to_none = torch.stack([(x0[a] - x0[model.unconditional]).norm() for a in range(10)])
    assert to_none.mean() < between.mean()


def test_every_prediction_that_is_computed_is_counted(model):
    seen = []
    hook = model.register_forward_hook(lambda module, arguments, output: seen.append(len(output)))
    guides = {
        "conditional": (ClassifierFreeGuidance(1.0), 6 * 10),
        "full": (CFG, 6 * 20),
        "cutoff": (Cutoff(3.0, 2), 2 * 20 + 4 * 10),
        "adaptive": (AdaptiveGuidance(3.0, -1.0, min_guided_steps=3), 3 * 20 + 3 * 10),
        "adaptive, by row": (AdaptiveGuidance(3.0, 0.97, "x0", 2, batch="rows"), None),
    }
    for guide, rows in guides.values():
        seen.clear()
        drawing = draw(model, LABELS[:10], guide, range(10), 6)
        assert (drawing.rows, drawing.calls) == (sum(seen), len(seen))
        assert rows is None or drawing.rows == rows
    assert any(
        10 < a + b < 20 for a, b in zip(seen[::2], seen[1::2], strict=False)
    )  # some rows had stopped, others not
    hook.remove()


def test_adaptive_guidance_that_never_stops_is_full_guidance(model):
    full = draw(model, LABELS[:10], CFG, range(10), 6).samples
    assert torch.equal(draw(model, LABELS[:10], AdaptiveGuidance(3.0, math.inf), range(10), 6).samples, full)


def test_the_schedule_keeps_the_variance_and_ends_clean(model):
    times = model.times(7)
    assert len(times) == 8 and times[0] == model.config.latest and times == sorted(times, reverse=True)
    assert all(sum(level**2 for level in alpha_sigma(time)) == pytest.approx(1) for time in times)
    assert alpha_sigma(times[-1]) == (1.0, 0.0)


def test_saturation_counts_pixels_beyond_half_a_grey_level():
    digits = torch.zeros(2, 1, 8, 8)
    digits[1].view(-1)[:4] = torch.tensor([1.0, 1.06, 1.07, -1.07])
    assert saturation(digits).tolist() == [0, 2 / 64]
    assert contrast(digits)[0] == 0 and contrast(digits)[1] == pytest.approx(4.2 / 64)


def test_saving_keeps_every_bit(model, tmp_path):
    model.save(tmp_path)
    again = hasten.DigitDiffusion.load(tmp_path)
    x, labels = model.noise(range(3)), torch.tensor([0, 9, 10])
    assert again.config == model.config and torch.equal(again(x, 0.5, labels), model(x, 0.5, labels))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 8, 8), 0.5, LABELS[:2]), r"\[B, 1, 8, 8\], not \[2, 8, 8\]"),
        ((torch.zeros(2, 1, 8, 9), 0.5, LABELS[:2]), r"not \[2, 1, 8, 9\]"),
        ((torch.zeros(2, 1, 8, 8), 0.5, LABELS[:3]), r"int64 of \[2\], not torch.int64 of \[3\]"),
        ((torch.zeros(2, 1, 8, 8), 0.5, LABELS[:2].float()), "not torch.float32"),
        ((torch.zeros(2, 1, 8, 8), 0.5, torch.tensor([0, 11])), "10 for none, not 0 to 11"),
        ((torch.zeros(2, 1, 8, 8), 0.5, torch.tensor([-1, 0])), "not -1 to 0"),
        ((torch.zeros(2, 1, 8, 8), 1.5, LABELS[:2]), r"time must lie in \[0, 1\], not 1.5"),
        ((torch.zeros(2, 1, 8, 8), math.nan, LABELS[:2]), "time must lie in"),
    ],
)
def test_the_model_refuses(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(*arguments)


def test_drawing_refuses(model):
    with pytest.raises(ValueError, match="one seed per label, not 3 for 2"):
        draw(model, LABELS[:2], CFG, [0, 1, 2])
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        draw(model, LABELS[:2], CFG, [0, 1], steps=0)


def test_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a digit-diffusion model"):
        hasten.DigitDiffusion.load(hasten.embedded_model("stdlib-llama"))
    with pytest.raises(OSError, match="nowhere"):
        hasten.DigitDiffusion.load(tmp_path / "nowhere")
    shutil.copy(FOLDER / "model.safetensors", tmp_path)
    config = json.loads((FOLDER / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer": 6}))
    with pytest.raises(ValueError, match="'layer'"):
        hasten.DigitDiffusion.load(tmp_path)


def test_an_unknown_embedded_model_is_refused_with_the_names_that_exist():
    with pytest.raises(ValueError, match="digit-diffusion, digits-llava, stdlib-llama"):
        hasten.embedded_model("digits")
