"""The search of schedules, on a tiny random model whose own answers are the right ones."""

import json

import pytest
import torch
import vision_models
from snapshots import assert_unchanged, snapshot
from vision_models import IMAGE, LAYERS

import hasten
from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.techniques.vision_tokens import layer_shapes
from hasten.sparsity.vision_tokens import prefill_cost

WORDS = ["what", "where", "how", "many", "left", "right", "top"]
SETTINGS = {"max_new_tokens": 2, "batch_size": 3, "levels": (1.0, 0.5, 0.25, 0.1)}


class Tokenizer:
    padding_side = "right"


class Processor:
    """Words as ids, an image of 16 tokens before them; answers as the numbers of their tokens."""

    def __init__(self):
        self.tokenizer, self.calls = Tokenizer(), 0

    def __call__(self, *, text, images, return_tensors, padding):
        assert (return_tensors, padding, self.tokenizer.padding_side) == ("pt", True, "left")
        self.calls += 1
        rows = [[IMAGE] * 16 + [3 + WORDS.index(word) for word in words.split()] for words in text]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.stack(list(images))}

    def batch_decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(map(str, row.tolist())) for row in ids]


@pytest.fixture(scope="module")
def model():
    return vision_models.build("llava")


@pytest.fixture(scope="module")
def samples(model):
    """Questions, with what the model answers when it sees all tokens."""
    made = []
    for i in range(8):
        words = " ".join(WORDS[(i + step) % len(WORDS)] for step in range(2 + i % 3))
        made.append({"text": words, "images": vision_models.noise(i, 3, 16, 16)})
    processor = Processor()
    for sample in made:
        processor.tokenizer.padding_side = "left"
        given = processor(text=[sample["text"]], images=[sample["images"]], return_tensors="pt", padding=True)
        written = model.generate(**given, max_new_tokens=2, do_sample=False)
        sample["answer"] = processor.batch_decode(written[:, given["input_ids"].shape[1] :], True)[0]
    return made


def by_prefix(text, sample):
    """Half of the credit for the first token."""
    first, second = (a == b for a, b in zip(text.split(), sample["answer"].split(), strict=True))
    return 0.5 * first + 0.5 * second


def test_within_a_tolerance(model, samples):
    before, processor = snapshot(model), Processor()
    found = hasten.search_vision_tokens(model, processor, samples, tolerance=0.25, **SETTINGS)
    assert_unchanged(model, before)
    assert processor.tokenizer.padding_side == "right"
    assert isinstance(found, hasten.FoundSchedule) and found.method == "g_search"
    assert found.full == 1.0 and found.metric >= 0.75
    shares = found.shares(LAYERS)
    assert shares[0] == 1 and list(shares) == sorted(shares, reverse=True) and set(shares) <= {1.0, 0.5, 0.25, 0.1}
    assert 1 < found.evaluations <= found.sweep and found.image_tokens == 16
    text = sum(len(sample["text"].split()) for sample in samples) / len(samples)
    cost, whole = (
        prefill_cost(each, round(text), 16, layer_shapes(Anatomy(model))).image_operations
        for each in (shares, (1.0,) * LAYERS)
    )
    assert found.cost == pytest.approx(cost / whole)
    with hasten.accelerated(model, hasten.VisionTokens(found), measure_speed=False):
        pass


def test_the_metric_that_is_reported_is_that_of_the_schedule(model, samples):
    """Measured again with the public API."""
    found = hasten.search_vision_tokens(model, Processor(), samples, by_prefix, tolerance=0.4, **SETTINGS)
    processor, total = Processor(), 0.0
    processor.tokenizer.padding_side = "left"
    with hasten.accelerated(model, hasten.VisionTokens(found), measure_speed=False):
        for sample in samples:
            given = processor(text=[sample["text"]], images=[sample["images"]], return_tensors="pt", padding=True)
            written = model.generate(**given, max_new_tokens=2, do_sample=False)
            total += by_prefix(processor.batch_decode(written[:, given["input_ids"].shape[1] :], True)[0], sample)
    assert found.metric == pytest.approx(total / len(samples))


@pytest.mark.parametrize("method", ["sobol", "auto"])
def test_within_a_budget(model, samples, method):
    found = hasten.search_vision_tokens(
        model, Processor(), samples, by_prefix, budget=0.4, evaluations=4, method=method, **SETTINGS
    )
    assert found.cost <= 0.4
    again = hasten.search_vision_tokens(
        model, Processor(), samples, by_prefix, budget=0.4, evaluations=4, method=method, **SETTINGS
    )
    assert again == found


def test_an_interrupted_search_goes_on(model, samples, tmp_path):
    file = tmp_path / "search.json"
    whole = hasten.search_vision_tokens(model, Processor(), samples, by_prefix, tolerance=0.3, **SETTINGS)
    asked = 0

    def interrupted(text, sample):
        nonlocal asked
        asked += 1
        if asked > 3 * len(samples):
            raise KeyboardInterrupt
        return by_prefix(text, sample)

    interrupted.__qualname__ = by_prefix.__qualname__
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        hasten.search_vision_tokens(model, Processor(), samples, interrupted, tolerance=0.3, resume=file, **SETTINGS)
    assert_unchanged(model, before)
    assert len(json.loads(file.read_text())["evaluations"]) == 3
    rest = hasten.search_vision_tokens(model, Processor(), samples, by_prefix, tolerance=0.3, resume=file, **SETTINGS)
    assert rest.evaluations == whole.evaluations - 3
    assert rest.by_layer == whole.by_layer and rest.metric == whole.metric
    known = hasten.search_vision_tokens(model, Processor(), samples, by_prefix, tolerance=0.3, resume=file, **SETTINGS)
    assert known.evaluations == 0 and known.by_layer == whole.by_layer
    with pytest.raises(ValueError, match="is of a search with another model, other samples or other options"):
        hasten.search_vision_tokens(model, Processor(), samples[:-1], by_prefix, tolerance=0.3, resume=file, **SETTINGS)
    file.write_text("{}")
    with pytest.raises(ValueError, match="is no file of a search"):
        hasten.search_vision_tokens(model, Processor(), samples, by_prefix, tolerance=0.3, resume=file, **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": -0.1}, "tolerance must be at least 0, got -0.1"),
        ({"budget": 0.001}, "the budget must be at least"),
        ({"levels": 1}, "levels must be an integer of at least 2, got 1"),
        ({"stages": [9]}, "9"),
        ({"evaluations": 0}, "evaluations must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"method": "grid"}, "method must be one of 'auto', 'gp', 'sobol', got 'grid'"),
        ({"resume": "x.json", "metric": lambda text, sample: 1.0}, "resume needs a metric with a name"),
        ({"samples": [{"images": 1}]}, r"samples\[0\] must be a mapping with a text, got \['images'\]"),
        ({"samples": ["what"]}, r"samples\[0\] must be a mapping with a text, got str"),
        ({"samples": [{"text": "what", "images": 1}]}, r"samples\[0\] has no 'answer'"),
        ({"budget": 1.5}, r"budget must be in \(0, 1\), got 1.5"),
        ({"budget": True}, r"budget must be in \(0, 1\), got True"),
        ({"metric": lambda text, sample: float("nan")}, "the metric of '.*' is nan: it must be finite"),
        ({"score": "attention"}, "score must be one of"),
        ({"samples": []}, "samples is empty"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_settings(model, samples, settings, message):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        hasten.search_vision_tokens(**{"model": model, "processor": Processor(), "samples": samples} | settings)
    assert_unchanged(model, before)


def test_a_folder_that_is_not_there(model, samples, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        hasten.search_vision_tokens(model, Processor(), samples, resume=tmp_path / "no" / "search.json")


def test_a_metric_of_a_hundred_points(model, samples):
    """Its tolerance is in points."""

    def points(text, sample):
        return 100 * by_prefix(text, sample)

    found = hasten.search_vision_tokens(model, Processor(), samples, points, tolerance=30, **SETTINGS)
    one = hasten.search_vision_tokens(model, Processor(), samples, by_prefix, tolerance=0.3, **SETTINGS)
    assert found.by_layer == one.by_layer and found.metric == pytest.approx(100 * one.metric)


def test_a_sample_without_an_image(model, samples):
    class Blind(Processor):
        def __call__(self, **given):
            inputs = super().__call__(**given)
            inputs["input_ids"][-1] = 5
            return inputs

    with pytest.raises(ValueError, match=r"samples\[2\] has no image token"):
        hasten.search_vision_tokens(model, Blind(), samples, batch_size=3)


def test_an_accelerated_model_is_refused(model, samples):
    technique = hasten.VisionTokens({2: 0.5})
    refused = pytest.raises(hasten.StateError, match="accelerated already")
    with hasten.accelerated(model, technique, measure_speed=False), refused:
        hasten.search_vision_tokens(model, Processor(), samples)
