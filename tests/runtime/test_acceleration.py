import json

import pytest
import torch
from running import decode_logits, distance
from snapshots import assert_unchanged, snapshot
from tiny_models import build, token_ids
from transformers import StaticCache

import hasten
from hasten.acceleration import measure
from hasten.acceleration.forwards import decode_rows
from hasten.acceleration.inference import Inference
from hasten.acceleration.techniques.base import DECODE
from hasten.sparsity.union import largest_union

PLANS = {
    "dense": hasten.DenseDecode(always=True),
    "wina": hasten.Wina(0.5),
    "wina-greedy": hasten.Wina(0.5, allocation="greedy"),
    "teal": hasten.Teal(0.5),
    "teal-mapping": hasten.Teal({"*.self_attn.*": 0.3, "down_proj": 0.6}),
    "cats": hasten.Cats(0.5),
    "cats-and-wina": [hasten.Cats(0.5), hasten.Wina({"*self_attn*": 0.4})],
}

pytestmark = pytest.mark.usefixtures("no_contest")


@pytest.fixture(params=PLANS)
def plan(request):
    return PLANS[request.param]


def accelerate(model, plan, **settings):
    return hasten.accelerate(model, plan, calibration=token_ids(seed=1), measure_speed=False, **settings)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_revert_is_bit_exact(name, dtype, plan):
    model = build(name, dtype)
    before, x = snapshot(model), token_ids()
    with torch.no_grad():
        logits = model(x).logits
        if plan is PLANS["teal-mapping"] or name != "phi3":
            accelerate(model, plan)
        else:
            accelerate(model, plan if not isinstance(plan, list) else plan[0])
        hasten.revert(model)
        assert_unchanged(model, before)
        assert torch.equal(model(x).logits, logits)


def test_state_dict_is_the_dense_models(plan):
    model = build("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    accelerate(model, plan)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_prefill_stays_dense(plan):
    model, x = build("llama"), token_ids()
    with torch.no_grad():
        dense = model(x).logits
        accelerate(model, plan)
        torch.testing.assert_close(model(x).logits, dense, rtol=1e-5, atol=1e-5)


def sparse_projections(model):
    """The projections that skip inputs, by their names."""
    modules = dict(model.named_modules())
    return {name: module for name, module in modules.items() if hasattr(vars(module).get("forward"), "cutoff")}


def test_greedy_keeps_the_budget_of_every_block():
    model = build("llama")
    report = accelerate(model, hasten.Wina(0.5, allocation="greedy"))
    for block in range(2):
        decided = report.techniques[0].settings.values
        settings = {name: own["sparsity"] for name, own in decided.items() if f"layers.{block}." in name}
        sizes = {name: model.get_submodule(name).weight.numel() for name in settings}
        everything = sum(
            m.weight.numel()
            for n, m in model.named_modules()
            if n.startswith(f"model.layers.{block}.") and hasattr(m, "in_features")
        )
        assert sum(sizes[name] * settings[name] for name in settings) / everything == pytest.approx(0.5)
        assert len(set(settings.values())) > 1


def test_sparsity_mapping_names_modules_endings_and_patterns():
    model = build("llama")
    mapping = {"model.layers.0.mlp.up_proj": 0.1, "down_proj": 0.2, "*.1.self_attn.*": 0.3}
    report = accelerate(model, hasten.Wina(mapping))
    sparsities = {name: own["sparsity"] for name, own in report.techniques[0].settings.values.items()}
    assert sparsities == {
        "model.layers.0.mlp.up_proj": 0.1,
        "model.layers.0.mlp.down_proj": 0.2,
        "model.layers.1.mlp.down_proj": 0.2,
        **{f"model.layers.1.self_attn.{role}_proj": 0.3 for role in "qkvo"},
    }
    assert sparse_projections(model).keys() == sparsities.keys() == set(report.techniques[0].edited)


@pytest.mark.parametrize(
    "settings",
    [{}, {"do_sample": True, "top_k": 20}, {"num_beams": 3}, {"cache_implementation": "static"}],
    ids=["greedy", "sampling", "beams", "static-cache"],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_generate(settings, rows, plan):
    """Runs in every mode, repeatably, and DenseDecode emits just what the dense model does."""
    model, x = build("llama"), token_ids(rows, 12)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | settings

    def generate():
        torch.manual_seed(0)
        return model.generate(x, attention_mask=torch.ones_like(x), **settings)

    dense = generate()
    accelerate(model, plan)
    first = generate()
    assert first.shape == dense.shape
    assert torch.equal(first, generate())
    if plan is PLANS["dense"]:
        assert torch.equal(first, dense)


def test_static_and_dynamic_caches_agree():
    model, ids = build("llama"), token_ids()[0]
    accelerate(model, hasten.Wina(0.5))
    dynamic = decode_logits(model, ids[None], 8)[0, 7:]
    cache = StaticCache(config=model.config, max_cache_len=128)
    rows = []
    with torch.no_grad():
        rows.append(model(ids[None, :8], past_key_values=cache).logits[0, -1])
        for position in range(8, len(ids)):
            rows.append(model(ids[None, position : position + 1], past_key_values=cache).logits[0, -1])
    close = (torch.stack(rows) - dynamic).norm(dim=-1) < 1e-4 * dynamic.norm(dim=-1)
    assert close.float().mean() >= 0.95


@pytest.mark.parametrize("name", ["dense", "wina", "cats"])
def test_a_layer_compiles_without_graph_breaks(name):
    model, ids = build("llama"), token_ids()[0]
    accelerate(model, PLANS[name])
    expected = decode_logits(model, ids[None, :24], 8)
    torch.compiler.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(decode_logits(model, ids[None, :24], 8), expected, rtol=1e-3, atol=1e-3)


def test_a_batch_uses_the_union_while_it_pays():
    assert [largest_union(sparsity, 8) for sparsity in (0.1, 0.3, 0.5, 0.65, 0.9)] == [1, 1, 2, 4, 8]
    model = build("llama")
    accelerate(model, hasten.Wina(0.5))
    projection = model.model.layers[0].mlp.up_proj
    x = torch.randn(4, 1, 64)
    active = x.abs() > projection.forward.cutoff
    for batch, expected in ((1, active[:1]), (2, active[:2].any(0)), (4, torch.ones(64, dtype=torch.bool))):
        rows = x[:batch]
        torch.testing.assert_close(projection(rows), (rows * expected) @ projection.weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_cats_is_exact_for_batches_whose_union_does_not_pay(name):
    model = build(name)
    x = torch.randn(4, 1, 64)
    with torch.no_grad():
        dense = model.model.layers[0].mlp(x)
        accelerate(model, hasten.Cats(0.5))
        mlp = model.model.layers[0].mlp
        assert mlp.forward.max_union == 2
        torch.testing.assert_close(mlp(x), dense, rtol=1e-4, atol=1e-5)
        assert (mlp(x[:1]) - dense[:1]).norm() > 1e-3 * dense[:1].norm()


def test_what_counts_as_decode():
    assert [decode_rows(torch.empty(*shape)) for shape in ((1, 1, 8), (5, 1, 8), (1, 2, 8), (1, 8), (2, 8))] == [
        1,
        5,
        0,
        1,
        0,
    ]


def test_accelerated_reverts_also_after_an_error(plan):
    model = build("llama")
    before = snapshot(model)
    with (
        pytest.raises(ZeroDivisionError),
        hasten.accelerated(model, plan, calibration=token_ids(), measure_speed=False) as report,
    ):
        assert report.techniques
        1 / 0  # noqa: B018 - any error inside the block
    assert_unchanged(model, before)


def test_state_lives_on_the_model():
    model, other = build("llama"), build("llama")
    before = snapshot(other)
    accelerate(model, hasten.Wina(0.5))
    assert_unchanged(other, before)


def test_statistics_serve_any_sparsity():
    model = build("llama")
    pieces = token_ids(4, 200, seed=1)
    statistics = hasten.calibrate(model, [hasten.Wina(), hasten.Cats()], pieces)
    assert statistics.tokens == pieces.numel()
    for technique in (hasten.Wina(0.3), hasten.Wina(0.7), hasten.Cats(0.5)):
        direct = hasten.accelerate(model, technique, calibration=pieces, heldout=token_ids(), measure_speed=False)
        hasten.revert(model)
        report = hasten.accelerate(model, technique, calibration=statistics, heldout=token_ids(), measure_speed=False)
        hasten.revert(model)
        assert report.techniques[0].settings == direct.techniques[0].settings
        assert report.drift == direct.drift


def test_drift_grows_with_sparsity_and_is_nought_for_the_same_model():
    model = build("llama")
    statistics = hasten.calibrate(model, hasten.Wina(), token_ids(4, 200, seed=1))
    kls = []
    for sparsity in (0.1, 0.3, 0.6, 0.9):
        with hasten.accelerated(
            model, hasten.Wina(sparsity), calibration=statistics, heldout=token_ids(), measure_speed=False
        ) as report:
            kls.append(report.drift.kl)
    assert kls == sorted(kls)
    assert kls[-1] > 10 * kls[0]
    logits = measure.heldout_logits(Inference(model), list(token_ids()))
    same = measure.drift(logits, logits)
    assert same.kl == 0 and same.top1 == 1 and same.dense_perplexity == same.fast_perplexity


def test_drift_against_plain_arithmetic():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    ids = torch.tensor([1])
    result = measure.drift([(ids, p.log())], [(ids, q.log())])
    assert result.kl == pytest.approx(0.5 * torch.log(torch.tensor(2.0)) - 0.25 * torch.log(torch.tensor(2.0)))
    assert (result.top1, result.tokens) == (0, 1)
    assert result.dense_perplexity == pytest.approx(4) and result.fast_perplexity == pytest.approx(2)


def test_report_shows_what_was_measured():
    model = build("llama")
    report = hasten.accelerate(model, hasten.Wina(0.5), calibration=token_ids(seed=1))
    text = str(report)
    for part in ("Wina(sparsity=0.5", "decode", "prefill", "drift", "KL", "memory", " ms (", "active"):
        assert part in text
    assert ("slower" in text) or ("faster" in text) or ("the same" in text)
    data = json.loads(report.to_json())
    assert data["techniques"][0]["technique"] == "Wina"
    assert data["techniques"][0]["configuration"] == {"sparsity": 0.5, "allocation": "uniform"}
    assert data["speedup"] == report.speedup
    ratios = [timing.ratio for entry in report.techniques for timing in entry.timings if timing.regime == DECODE]
    assert len(ratios) == 2, "DenseDecode is implied"
    assert report.speedup == pytest.approx(ratios[0] * ratios[1])
    assert report.memory_after <= 1.05 * report.memory_before


def test_memory_holds_each_weight_once():
    model = build("llama", torch.bfloat16)
    before = measure.memory(model)
    accelerate(model, hasten.Wina(0.5))
    cutoffs = sum(module.forward.cutoff.nbytes for module in sparse_projections(model).values())
    assert cutoffs and measure.memory(model) == before + cutoffs


def test_inference_mode_leaves_no_trace():
    model = build("llama")
    with (
        torch.inference_mode(),
        hasten.accelerated(model, hasten.Wina(0.5), calibration=token_ids(), measure_speed=False),
    ):
        model(token_ids())
    assert not any(parameter.is_inference() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize("technique", [hasten.DenseDecode(always=True), hasten.Wina(0.01), hasten.Cats(0.01)], ids=str)
def test_autocast_computes_as_the_dense_model_does(name, technique):
    """Over weights in float32, whose projections then give bfloat16."""
    model, ids = build(name), token_ids(1, 24)
    with torch.autocast("cpu", torch.bfloat16):
        expected = decode_logits(model, ids, 8).float()
        accelerate(model, technique)
        fast = decode_logits(model, ids, 8).float()
    assert distance(fast, expected) < 0.05


def test_training_mode_survives_revert():
    model = build("llama")
    accelerate(model, hasten.Wina(0.5))
    model.train()
    hasten.revert(model)
    assert all(module.training for module in model.modules())


def test_short_texts_are_used_whole():
    class Tokenizer:
        def __call__(self, text, verbose):
            return {"input_ids": [3 + ord(letter) % 200 for letter in text]}

    statistics = hasten.calibrate(build("llama"), hasten.Wina(), ["import os"] * 100, Tokenizer())
    assert statistics.tokens == 900


def test_models_of_few_positions():
    model = build("opt-short")
    report = hasten.accelerate(model, hasten.Wina(0.5), calibration=token_ids(2, 400))
    assert report.drift.tokens > 0 and report.speedup > 0


def test_left_padded_batches_generate_as_the_dense_model_does():
    model, x = build("llama"), token_ids(3, 12)
    mask = torch.ones_like(x)
    mask[1, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    dense = model.generate(x, **settings)
    accelerate(model, hasten.DenseDecode(always=True))
    assert torch.equal(model.generate(x, **settings), dense)
