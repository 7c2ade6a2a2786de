import json

import pytest
import torch
import transformers
from tiny_models import build, token_ids

import hasten
from hasten.acceleration import measure


@pytest.fixture(
    params=[hasten.DenseDecode(always=True), hasten.Wina(0.5), hasten.Wina(0.5, "greedy"), hasten.Cats(0.5)], ids=str
)
def technique(request):
    return request.param


def saved(model, technique, folder):
    hasten.accelerate(model, technique, calibration=token_ids(seed=1), measure_speed=False)
    hasten.save(model, folder)
    return measure.decode_logits(model, token_ids()[0], 8)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip(tmp_path, name, dtype, technique):
    model = build(name, dtype)
    expected = saved(model, technique, tmp_path)
    loaded = hasten.load(tmp_path)
    assert type(loaded) is type(model) and loaded.dtype == dtype
    assert loaded._hasten.settings == model._hasten.settings and loaded._hasten.plan == model._hasten.plan
    if dtype == torch.float32:
        # Which dense products are hasten's is measured anew; the other order of sums can tip an input at its cutoff.
        distance = (measure.decode_logits(loaded, token_ids()[0], 8) - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert (distance < 1e-4).float().mean() >= 0.95
    hasten.revert(loaded)
    hasten.revert(model)
    for key, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key


def test_thresholds_are_those_that_were_saved(tmp_path):
    model = build("llama")
    saved(model, hasten.Wina(0.5), tmp_path)
    loaded = hasten.load(tmp_path)
    for (name, module), (_, other) in zip(model.named_modules(), loaded.named_modules(), strict=True):
        if hasattr(module, "cutoff"):
            assert torch.equal(module.cutoff, other.cutoff), name


def test_plain_transformers_loads_the_dense_model(tmp_path, technique):
    model, x = build("llama"), token_ids()
    with torch.no_grad():
        dense = model(x).logits
        saved(model, technique, tmp_path)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
        assert torch.equal(plain(x).logits, dense)


def test_tokenizer_is_saved_along(tmp_path):
    folder = hasten.embedded_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").requires_grad_(False)
    text = (folder / "heldout.txt").read_text(encoding="utf-8")[:20000]
    hasten.accelerate(model, hasten.Teal(0.4), calibration=[text], tokenizer=tokenizer, measure_speed=False)
    hasten.save(model, tmp_path, tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids
    assert (
        hasten.load(tmp_path).generate(tokenizer("def ", return_tensors="pt").input_ids, max_new_tokens=3).shape[1] > 3
    )


def test_saving_what_is_not_accelerated(tmp_path):
    with pytest.raises(hasten.StateError, match="not accelerated"):
        hasten.save(build("llama"), tmp_path)


def test_a_folder_without_a_plan(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"hasten_plan\.json"):
        hasten.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        hasten.load(tmp_path / "nowhere")


def _edit_plan(folder, **changes):
    path = folder / "hasten_plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_settings(folder, change):
    _edit_plan(folder, settings=change(json.loads((folder / "hasten_plan.json").read_text())["settings"]))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "hasten_plan.json").write_text("{..."), "not JSON"),
        (lambda folder: (folder / "hasten_plan.json").write_bytes(b"\xff\xfe\x00"), "not JSON"),
        (lambda folder: _edit_plan(folder, version=7), "version 7"),
        (lambda folder: _edit_plan(folder, settings=[{"name": "x"}]), "damaged"),
        (lambda folder: _edit_plan(folder, settings=None), "damaged"),
        (lambda folder: _edit_plan(folder, settings=[]), "not those that its plan asks for"),
        (lambda folder: _edit_settings(folder, lambda settings: settings[:3]), "not those that its plan asks for"),
        (lambda folder: _edit_settings(folder, lambda settings: [*settings, settings[0]]), "not those that"),
        (
            lambda folder: _edit_settings(folder, lambda settings: [s | {"technique": "Cats"} for s in settings]),
            "not those",
        ),
        (
            lambda folder: _edit_settings(folder, lambda settings: [s | {"threshold": 1e999} for s in settings]),
            "threshold inf",
        ),
        (lambda folder: (folder / "config.json").write_text("{}"), "damaged"),
        (lambda folder: (folder / "config.json").unlink(), "damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "damaged"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:5000]
            ),
            "damaged",
        ),
    ],
    ids=[
        "plan-no-json",
        "plan-bytes",
        "newer",
        "settings",
        "no-settings",
        "empty-settings",
        "cut-settings",
        "double-settings",
        "other-technique",
        "threshold",
        "config",
        "no-config",
        "no-weights",
        "cut-weights",
    ],
)
def test_damaged_folders(tmp_path, damage, words):
    saved(build("llama"), hasten.Wina(0.5), tmp_path)
    damage(tmp_path)
    with pytest.raises(hasten.SavedPlanError, match=words):
        hasten.load(tmp_path)


@pytest.mark.parametrize("other", ["llama", "phi3"])
def test_a_plan_of_another_model(tmp_path, other):
    saved(build("llama"), hasten.Wina(0.5), tmp_path)
    build(other, seed=1).save_pretrained(tmp_path)
    with pytest.raises(hasten.SavedPlanError, match="another model"):
        hasten.load(tmp_path)
    with pytest.raises(hasten.SavedPlanError, match="another model"):
        hasten.load(tmp_path, dtype=torch.bfloat16)


def test_loading_in_another_dtype(tmp_path):
    saved(build("llama"), hasten.Wina(0.5), tmp_path)
    assert hasten.load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="banana"):
        hasten.load(tmp_path, dtype="banana")


def test_a_class_that_transformers_does_not_have(tmp_path):
    model = build("llama")
    model.__class__ = type("MyLlama", (type(model),), {})
    hasten.accelerate(model, hasten.DenseDecode(always=True), measure_speed=False)
    with pytest.raises(hasten.UnsupportedModelError, match="MyLlama"):
        hasten.save(model, tmp_path)


def test_saving_what_was_loaded(tmp_path):
    saved(build("llama"), hasten.Teal({"*.self_attn.*": 0.3}), tmp_path / "first")
    loaded = hasten.load(tmp_path / "first")
    hasten.save(loaded, tmp_path / "second")
    first, second = ((tmp_path / name / "hasten_plan.json").read_text() for name in ("first", "second"))
    assert first == second
