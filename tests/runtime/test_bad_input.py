"""Every bad input is a clear error, and the model works as before."""

import json
import math

import pytest
import torch
import transformers as tf
from running import decode_logits
from snapshots import assert_unchanged, snapshot
from tiny_models import build, token_ids
from torch.nn.utils import prune

import hasten
from hasten.acceleration import edits, measure
from hasten.acceleration.inference import Inference
from hasten.acceleration.techniques import input_sparsity
from hasten.bench.runtime import tiny_zoo
from hasten.errors import UnsupportedModelError

QUICK = {"measure_speed": False, "measure_drift": False}

pytestmark = pytest.mark.usefixtures("no_contest")


@pytest.fixture
def model():
    """A model that must come out of the test as it went in."""
    model = build("llama")
    before, x = snapshot(model), token_ids()
    with torch.no_grad():
        logits = model(x).logits
    yield model
    if hasattr(model, "_hasten"):
        hasten.revert(model)
    assert_unchanged(model, before)
    with torch.no_grad():
        assert torch.equal(model(x).logits, logits)


@pytest.mark.parametrize("technique", [hasten.Wina, hasten.Teal, hasten.Cats])
@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, math.nan, math.inf, {"up_proj": -1}, {}], ids=str)
def test_sparsity_out_of_range(technique, sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        technique(sparsity)


@pytest.mark.parametrize("sparsity", ["0.5", None, True, [0.5], {3: 0.5}, {"up_proj": "a"}], ids=str)
def test_sparsity_of_a_wrong_type(sparsity):
    with pytest.raises(TypeError, match="sparsity"):
        hasten.Wina(sparsity)


def test_unknown_allocation():
    with pytest.raises(ValueError, match=r'"uniform" or "greedy".*\'best\''):
        hasten.Wina(0.5, allocation="best")
    with pytest.raises(ValueError, match="greedy"):
        hasten.Wina({"up_proj": 0.5}, allocation="greedy")
    with pytest.raises(ValueError, match=r"0\.95.*0\.97"):
        hasten.Wina(0.97, allocation="greedy")


def test_misspelt_argument(model):
    with pytest.raises(TypeError, match="sparsty"):
        hasten.Wina(sparsty=0.5)
    with pytest.raises(TypeError, match="calibraton"):
        hasten.accelerate(model, hasten.Wina(0.5), calibraton=token_ids())


@pytest.mark.parametrize(
    ("plan", "error", "words"),
    [
        ([], ValueError, "at least one"),
        (None, TypeError, "None"),
        ("wina", TypeError, "'wina'"),
        (hasten.Wina, TypeError, "Wina"),
        ([hasten.Wina], TypeError, r"did you mean hasten\.Wina\(\)"),
        ([hasten.Wina(0.5), hasten.Wina(0.2)], ValueError, "twice"),
        ([hasten.Wina(0.5), hasten.Teal(0.2)], ValueError, "Wina and Teal would both change"),
        ([hasten.Cats(0.5), hasten.Wina(0.5)], ValueError, "both change .*(up|down)_proj"),
    ],
    ids=["empty", "none", "string", "class", "class-in-list", "twice", "overlap", "overlap-in-mlp"],
)
def test_plans_that_cannot_be(model, plan, error, words):
    with pytest.raises(error, match=words):
        hasten.accelerate(model, plan, calibration=token_ids())


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (None, ValueError, "Wina needs calibration"),
        ([], ValueError, "calibration is empty"),
        (torch.empty(0, dtype=torch.int64), ValueError, "calibration is empty"),
        ([torch.tensor([4, 5])], ValueError, "longest sequence has 2 tokens"),
        (["some text"], ValueError, "tokenizer="),
        ("some text", ValueError, "tokenizer="),
        (3, TypeError, "int"),
        ([3], TypeError, "int"),
        (torch.rand(2, 50), ValueError, "float32"),
        (torch.zeros(1, 2, 50, dtype=torch.int64), ValueError, r"\[2, 50\]|\[1, 2, 50\]"),
        (torch.full((1, 50), 300), ValueError, r"token id 300.*0\.\.299"),
        (torch.full((1, 50), -1), ValueError, r"token id -1"),
    ],
    ids=[
        "none",
        "empty",
        "empty-tensor",
        "short",
        "texts",
        "text",
        "number",
        "numbers",
        "floats",
        "3d",
        "large-id",
        "negative-id",
    ],
)
def test_calibration_data(model, data, error, words):
    with pytest.raises(error, match=words):
        hasten.accelerate(model, hasten.Wina(0.5), calibration=data)


def test_cats_keeps_a_fused_gate_to_itself():
    plan = [hasten.Cats(0.5), hasten.Wina({"gate_up_proj": 0.5})]
    with pytest.raises(ValueError, match=r"Cats and Wina would both change .*gate_up_proj"):
        hasten.accelerate(build("phi3"), plan, calibration=token_ids())
    plan = [hasten.Cats(0.5), hasten.Wina({"gate_proj": 0.5})]
    report = hasten.accelerate(build("llama"), plan, calibration=token_ids(), **QUICK)
    assert [len(entry.edited) for entry in report.techniques] == [2, 2, 9]


def test_heldout_data_is_named(model):
    with pytest.raises(ValueError, match="heldout"):
        hasten.accelerate(model, hasten.DenseDecode(), heldout=[])


def test_statistics_of_something_else(model):
    statistics = hasten.calibrate(model, hasten.Teal(), token_ids())
    with pytest.raises(ValueError, match="hold nothing for Wina"):
        hasten.accelerate(model, hasten.Wina(0.5), calibration=statistics)
    statistics = hasten.calibrate(model, hasten.Wina(), token_ids())
    with pytest.raises(ValueError, match="calibrate with greedy"):
        hasten.accelerate(model, hasten.Wina(0.5, "greedy"), calibration=statistics)


def test_statistics_of_another_model(model):
    """Of the same shapes, and of the same weights but for one."""
    statistics = hasten.calibrate(build("llama", seed=1), hasten.Wina(), token_ids())
    with pytest.raises(ValueError, match="gathered on other weights: calibrate this model"):
        hasten.accelerate(model, hasten.Wina(0.5), calibration=statistics)
    statistics = hasten.calibrate(model, hasten.Wina(), token_ids())
    other = build("llama")
    hasten.accelerate(other, hasten.Wina(0.5), calibration=statistics, **QUICK)
    hasten.revert(other)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match="gathered on other weights"):
        hasten.accelerate(other, hasten.Wina(0.5), calibration=statistics)


def test_unknown_module_names_the_nearest(model):
    with pytest.raises(ValueError, match=r"'up_porj'.*'up_proj'"):
        hasten.accelerate(model, hasten.Wina({"up_porj": 0.5}), calibration=token_ids())
    with pytest.raises(ValueError, match=r"layers\.7\.mlp\.up_proj'.*'model\.layers\.[01]\.mlp\.up_proj'"):
        hasten.accelerate(model, hasten.Wina({"model.layers.7.mlp.up_proj": 0.5}), calibration=token_ids())


def test_second_accelerate(model):
    hasten.accelerate(model, hasten.DenseDecode(always=True), **QUICK)
    with pytest.raises(hasten.StateError, match=r"accelerated already.*revert"):
        hasten.accelerate(model, hasten.Wina(0.5), calibration=token_ids())
    assert decode_logits(model, token_ids(), 90).isfinite().all()


def test_a_model_inside_that_is_accelerated():
    model = build("llama")
    hasten.accelerate(model, hasten.DenseDecode(always=True), **QUICK)
    with pytest.raises(hasten.StateError, match=r"^0 is accelerated already.*revert"):
        hasten.accelerate(torch.nn.Sequential(model).eval(), hasten.DenseDecode())


def test_calibrating_an_accelerated_model(model):
    hasten.accelerate(model, hasten.DenseDecode(always=True), **QUICK)
    with pytest.raises(hasten.HastenError):
        hasten.calibrate(model, hasten.Wina(), token_ids())


def test_revert_without_accelerate(model):
    with pytest.raises(hasten.StateError, match="not accelerated"):
        hasten.revert(model)


def test_training_mode(model):
    model.train()
    with pytest.raises(hasten.StateError, match=r"training mode.*eval"):
        hasten.accelerate(model, hasten.DenseDecode())
    model.eval()


@pytest.mark.parametrize("technique", [hasten.Wina(0.5), hasten.Cats(0.5)], ids=["wina", "cats"])
def test_weight_changed_after_accelerate(technique):
    model, x = build("llama"), token_ids()
    hasten.accelerate(model, technique, calibration=x, **QUICK)
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight.mul_(2)
        with pytest.raises(hasten.StateError, match=r"layers\.1\.mlp.*changed.*revert"):
            model(x)
        hasten.revert(model)
        other = build("llama")
        other.model.layers[1].mlp.down_proj.weight.mul_(2)
        assert torch.equal(model(x).logits, other(x).logits)


def test_weights_loaded_after_accelerate():
    model, x = build("llama"), token_ids()
    hasten.accelerate(model, hasten.Wina(0.5), calibration=x, **QUICK)
    model.load_state_dict(build("llama", seed=1).state_dict())
    with pytest.raises(hasten.StateError, match="changed"):
        model(x)
    hasten.revert(model)
    with torch.no_grad():
        assert torch.equal(model(x).logits, build("llama", seed=1)(x).logits)


def test_dtype_changed_after_accelerate():
    model, x = build("llama"), token_ids()
    hasten.accelerate(model, hasten.Wina(0.5), calibration=x, **QUICK)
    model.to(torch.bfloat16)
    with pytest.raises(hasten.StateError, match="changed"):
        model(x)
    hasten.revert(model)
    with torch.no_grad():
        assert torch.equal(model(x).logits, build("llama", torch.bfloat16)(x).logits)


def test_module_replaced_after_accelerate(model):
    hasten.accelerate(model, hasten.DenseDecode(always=True), **QUICK)
    mlp = model.model.layers[0].mlp
    ours, mlp.up_proj = mlp.up_proj, torch.nn.Linear(64, 176)
    with pytest.raises(hasten.StateError, match=r"layers\.0\.mlp\.up_proj was replaced by a Linear"):
        hasten.revert(model)
    mlp.up_proj = ours


def test_a_weight_on_the_meta_device(model):
    norm = model.model.layers[0].mlp
    weight = norm.up_proj.weight
    norm.up_proj.weight = torch.nn.Parameter(weight.detach().to("meta"), requires_grad=False)
    with pytest.raises(hasten.UnsupportedModelError, match=r"up_proj"):
        hasten.accelerate(model, hasten.DenseDecode())
    norm.up_proj.weight = weight


def test_an_interrupt_in_the_midst_of_calibration(model, monkeypatch):
    passes, plain = iter(range(100)), Inference.forward

    def interrupted(*arguments):
        if next(passes) == 1:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(Inference, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hasten.accelerate(model, hasten.Wina(0.5), calibration=token_ids(), **QUICK)
    assert_unchanged(model, snapshot(model))


def test_broken_activations_are_named(model):
    norm = model.model.layers[1].input_layernorm.weight
    kept = norm.clone()
    norm.data.fill_(math.nan)
    words = r"model\.layers\.1\.\S+ .*NaN or infinite activations there; load the model in a dtype"
    for technique in (hasten.Wina(0.5), hasten.Cats(0.5)):
        with pytest.raises(hasten.UnsupportedModelError, match=words):
            hasten.accelerate(model, technique, calibration=token_ids(), **QUICK)
    norm.data.copy_(kept)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan | {"version": 99}, "version 99"),
        (lambda plan: {k: v for k, v in plan.items() if k != "version"}, "it has no version"),
        (lambda plan: plan | {"techniques": [{"technique": "Magic"}]}, "unknown technique 'Magic'"),
        (lambda plan: plan | {"techniques": [{"technique": "Wina", "speed": 3}]}, "no field speed"),
        (lambda plan: plan | {"techniques": [{"technique": "Wina", "sparsity": 2}]}, "sparsity"),
        (lambda plan: plan | {"techniques": []}, "at least one"),
    ],
    ids=["newer", "no-version", "unknown", "extra-field", "bad-value", "empty"],
)
def test_plans_from_json(change, words):
    plan = hasten.Plan([hasten.Wina({"up_proj": 0.25}), hasten.DenseDecode()])
    assert hasten.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(hasten.SavedPlanError, match=words):
        hasten.Plan.from_json(json.dumps(change(plan.to_dict())))


def test_plan_that_is_no_json():
    with pytest.raises(hasten.SavedPlanError, match="not JSON"):
        hasten.Plan.from_json("{")


def test_no_model_at_all():
    with pytest.raises(TypeError, match="'gpt2'"):
        hasten.accelerate("gpt2", hasten.DenseDecode())


def test_wrapped_and_headless_models():
    with pytest.raises(hasten.UnsupportedModelError, match="accelerate the model itself"):
        hasten.accelerate(torch.nn.DataParallel(build("llama")), hasten.DenseDecode())
    with pytest.raises(hasten.UnsupportedModelError, match="accelerate the model itself, and compile"):
        hasten.accelerate(torch.compile(build("llama"), backend="eager"), hasten.DenseDecode())
    config = build("llama").config
    headless = (tf.LlamaModel, tf.LlamaForSequenceClassification, tf.LlamaForTokenClassification)
    for kind in (*headless, tf.LlamaForQuestionAnswering):
        with pytest.raises(hasten.UnsupportedModelError, match=r"no language-model head.*ForCausalLM"):
            hasten.accelerate(kind(config).eval(), hasten.DenseDecode())


NO_TEXT = {
    "a linear map": lambda: torch.nn.Linear(3, 3),
    "a diffusion transformer": lambda: hasten.DigitDiffusion(),
    "a vision transformer": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=28)
    ),
}


@pytest.mark.parametrize("kind", NO_TEXT)
@pytest.mark.parametrize("call", ["accelerate", "calibrate"])
def test_models_without_a_vocabulary(kind, call):
    with pytest.raises(hasten.UnsupportedModelError, match=r"ForCausalLM"):
        getattr(hasten, call)(NO_TEXT[kind]().eval(), hasten.Wina(0.5), calibration=token_ids())


@pytest.mark.parametrize("name", ["strict", "measure_speed", "measure_drift"])
@pytest.mark.parametrize("value", ["no", 1, None])
def test_flags_of_a_wrong_type(model, name, value):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got {value!r}"):
        hasten.accelerate(model, hasten.Wina(0.5), calibration=token_ids(), **{name: value})
    if name == "strict":
        with pytest.raises(TypeError, match="strict must be True or False"):
            hasten.calibrate(model, hasten.Wina(0.5), token_ids(), strict=value)


@pytest.mark.parametrize("share", ["module", "weight"])
def test_shared_weights_are_refused(share):
    model = build("llama")
    first, second = model.model.layers
    if share == "module":
        second.mlp = first.mlp
    else:
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(hasten.UnsupportedModelError, match=r"layers\.1\.mlp.*shares its weight with .*layers\.0\.mlp"):
        hasten.accelerate(model, hasten.Wina(0.5), calibration=token_ids())


@pytest.mark.parametrize("technique", [hasten.DenseDecode(always=True), hasten.Wina(0.5)])
def test_a_model_without_a_cache_has_no_decode_step_to_change(technique):
    model = tiny_zoo.build("causal", "cpmant")
    before = snapshot(model)
    with pytest.raises(
        UnsupportedModelError, match=r"CpmAnt.* would change nothing: .* without a cache reads its whole"
    ):
        hasten.accelerate(model, technique, calibration=token_ids(4, 40), **QUICK)
    assert_unchanged(model, before)


def test_pruned_weights_are_refused():
    model = build("llama")
    prune.random_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)
    with pytest.raises(hasten.UnsupportedModelError, match=r"up_proj.*prune\.remove"):
        hasten.accelerate(model.requires_grad_(False), hasten.Wina(0.5), calibration=token_ids())


def _five_times(mlp):
    stock = type(mlp)
    mlp.__class__ = type("FiveTimesMLP", (stock,), {"forward": lambda self, x: 5 * stock.forward(self, x)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_five_times, "FiveTimesMLP.*not the stock one"),
        (lambda mlp: setattr(mlp, "forward", mlp.forward), "not the stock one"),
    ],
    ids=["class", "forward"],
)
def test_cats_refuses_mlps_that_compute_something_else(change, words):
    model = build("llama")
    change(model.model.layers[0].mlp)
    with pytest.raises(hasten.UnsupportedModelError, match=rf"layers\.0\.mlp .*{words}"):
        hasten.accelerate(model, hasten.Cats(0.5), calibration=token_ids())
    report = hasten.accelerate(model, hasten.Cats(0.5), calibration=token_ids(), strict=False, **QUICK)
    assert report.techniques[0].settings.values.keys() == {"model.layers.1.mlp"}
    assert [skip.name for skip in report.skipped if "torch's product" not in skip.reason] == ["model.layers.0.mlp"]


def test_strict_false_leaves_what_it_cannot_change():
    model = build("llama")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(
            model.model.layers[0].self_attn,
            name,
            type("Odd", (torch.nn.Linear,), {})(64, 32 if name in "k_proj v_proj" else 64),
        )
    model.eval().requires_grad_(False)
    for technique in (hasten.Wina(0.5), hasten.Wina(0.5, "greedy")):
        with hasten.accelerated(model, technique, calibration=token_ids(), strict=False, **QUICK) as report:
            odd = {skip.name for skip in report.skipped if "not a plain" in skip.reason}
            assert odd == {f"model.layers.0.self_attn.{role}_proj" for role in "qkvo"}
            assert len(report.techniques[0].settings.values) == 10
    assert hasten.calibrate(model, hasten.Wina(), token_ids(), strict=False).tokens == token_ids().numel()


def test_calibrate_asks_for_the_same_state(model):
    model.train()
    with pytest.raises(hasten.StateError, match="training mode"):
        hasten.calibrate(model, hasten.Wina(), token_ids())
    model.eval()
    hasten.accelerate(model, hasten.DenseDecode(always=True), **QUICK)
    with pytest.raises(hasten.StateError, match="accelerated already"):
        hasten.calibrate(model, hasten.Wina(), token_ids())


def test_writes_through_data_are_seen_by_the_next_prefill_and_by_save(tmp_path):
    model, x = build("llama"), token_ids()
    hasten.accelerate(model, hasten.Wina(0.5), calibration=x, **QUICK)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    with pytest.raises(hasten.StateError, match=r"up_proj.*changed"):
        hasten.save(model, tmp_path)
    with pytest.raises(hasten.StateError, match=r"up_proj.*changed"):
        model(x)


def test_an_interrupted_revert_can_be_repeated(model, monkeypatch):
    hasten.accelerate(model, hasten.Wina(0.5), calibration=token_ids(), **QUICK)
    calls, plain = iter(range(100)), edits.StoreColumnMajor.undo

    def interrupted(edit, model):
        plain(edit, model)
        if next(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(edits.StoreColumnMajor, "undo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hasten.revert(model)
    hasten.revert(model)


def test_interrupt_while_allocating_leaves_no_hooks(model, monkeypatch):
    calls, plain = iter(range(1000)), input_sparsity.cutoffs

    def interrupted(*arguments):
        if next(calls) == 60:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(input_sparsity, "cutoffs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hasten.accelerate(model, hasten.Wina(0.5, "greedy"), calibration=token_ids(), **QUICK)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_an_error_while_measuring_restores_the_model(model, monkeypatch):
    calls, plain = iter(range(100)), measure.memory
    monkeypatch.setattr(measure, "memory", lambda m: plain(m) if next(calls) == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hasten.accelerate(model, hasten.Wina(0.5), calibration=token_ids(), **QUICK)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_models(offload, tmp_path):
    """What accelerate keeps elsewhere is refused with the remedy that helps."""
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    if offload == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for technique in (hasten.DenseDecode(), hasten.Wina(0.5), hasten.Cats(0.5)):
        with pytest.raises(
            hasten.UnsupportedModelError, match=r"offloaded.*; load the whole model into the memory of one"
        ):
            hasten.accelerate(model, technique, calibration=token_ids())
