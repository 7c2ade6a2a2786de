"""Plans that combine techniques of several kinds."""

import linear_models
import pytest
import torch
from linear_models import expected_logits
from running import decode_logits, distance, read
from snapshots import assert_unchanged, snapshot
from tiny_models import build, token_ids

import hasten
from hasten.acceleration.techniques import Technique

SOURCE = """
from dataclasses import dataclass
from hasten.acceleration.techniques import Technique
def inside():
    @dataclass(frozen=True, slots=True)
    class {name}(Technique):
        def targets(self, anatomy): return ()
        def edits(self, anatomy, settings): return []
    return {name}
made = inside()
"""


def test_a_technique_that_is_called_like_another_is_refused(monkeypatch):
    monkeypatch.setattr(Technique, "known", dict(Technique.known))
    known = dict(Technique.known)
    with pytest.raises(TypeError, match=r"a_module\.inside\.<locals>\.Wina .* hasten\.acceleration\..*\.wina\.Wina: "):
        exec(SOURCE.format(name="Wina"), {"__name__": "a_module"})
    assert Technique.known == known
    assert list(hasten.Plan.from_json(hasten.Plan(hasten.Wina(0.5)).to_json())) == [hasten.Wina(0.5)]
    for _ in range(2):  # as a notebook's cell runs again
        exec(SOURCE.format(name="Fresh"), space := {"__name__": "a_module"})
        assert Technique.known["Fresh"] is space["made"]
    with pytest.raises(TypeError, match=r"another_module.* a_module"):
        exec(SOURCE.format(name="Fresh"), {"__name__": "another_module"})


HYBRIDS = ["mamba2", "bamba", "qwen3_next", "falcon_h1", "kimi_linear"]
DENSE = hasten.DenseDecode(always=True)

pytestmark = pytest.mark.usefixtures("no_contest")


def accelerate(model, plan):
    return hasten.accelerate(
        model, plan, calibration=token_ids(1, 64, seed=1), heldout=token_ids(1, 24), measure_speed=False
    )


def generated(model, ids):
    return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)


def changed(report):
    """The parts that each technique changes, by its class name."""
    return {type(entry.technique).__name__: set(entry.edited) for entry in report.techniques}


@pytest.mark.parametrize("family", linear_models.CONFIGS)
def test_linear_attention_and_dense_decode(family):
    model, ids = linear_models.build(family), token_ids(linear_models.rows(family, 2), 24)
    parts = [16] + 8 * [1]
    tokens, logits = generated(model, ids), expected_logits(model, family, ids, parts)
    before = snapshot(model)  # RWKV scales its weights when it first runs
    report = accelerate(model, [hasten.FastLinearAttention(), DENSE])
    assert report.self_check < 5e-5 and report.drift.kl < 1e-6
    layers, products = (changed(report)[name] for name in ("FastLinearAttention", "DenseDecode"))
    assert layers and not layers & products
    inside = any(product.startswith(f"{layer}.") for layer in layers for product in products)
    assert inside or family == "xlstm", "whose cell has no products of its own"
    assert distance(read(model, ids, parts), logits) < 2e-5
    assert torch.equal(generated(model, ids), tokens)
    hasten.revert(model)
    assert_unchanged(model, before)
    assert torch.equal(expected_logits(model, family, ids, parts), logits)


@pytest.mark.parametrize("family", HYBRIDS)
def test_linear_attention_and_sparsity(family):
    model, ids = linear_models.build(family), token_ids(2, 24)
    before, logits = snapshot(model), decode_logits(model, ids, 16)
    report = accelerate(model, [hasten.FastLinearAttention(), hasten.Wina(0.5)])
    parts = changed(report)
    assert any(product.startswith(f"{layer}.") for layer in parts["FastLinearAttention"] for product in parts["Wina"])
    assert 0.4 < report.techniques[1].active_share < 0.6
    fast = decode_logits(model, ids, 16)
    assert distance(fast[:, :16], logits[:, :16]) < 2e-5, "prefill stays dense"
    assert distance(fast[:, 16:], logits[:, 16:]) > 1e-3
    assert generated(model, ids).shape == (2, 32)
    hasten.revert(model)
    assert_unchanged(model, before)


def test_the_order_of_a_plan_does_not_matter():
    logits = []
    for plan in ([hasten.FastLinearAttention(), hasten.Wina(0.5)], [hasten.Wina(0.5), hasten.FastLinearAttention()]):
        model = linear_models.build("falcon_h1")
        report = accelerate(model, plan)
        assert [type(entry.technique) for entry in report.techniques[:2]] == [type(technique) for technique in plan]
        logits.append(decode_logits(model, token_ids(1, 24), 16))
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_sparse_neurons_and_sparse_attention(name):
    model = build(name)
    before, logits = snapshot(model), decode_logits(model, token_ids(1, 24), 16)
    plan = [hasten.Cats(0.5), hasten.Wina({"*self_attn*": 0.4}), DENSE]
    report = accelerate(model, plan)
    parts = changed(report)
    assert parts["Cats"] == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert all(".self_attn." in product for product in parts["Wina"])
    gates = {f"model.layers.{i}.mlp.gate_proj" for i in range(2)} if name == "llama" else set()
    assert parts["DenseDecode"] == {"lm_head"} | gates, "it takes what the others leave"
    assert [0.4 < entry.active_share < 0.7 for entry in report.techniques[:2]] == [True, True]
    hasten.revert(model)
    assert_unchanged(model, before)
    assert torch.equal(decode_logits(model, token_ids(1, 24), 16), logits)


def test_a_gate_that_is_stored_anew_after_its_neurons_were_made_sparse():
    """Cats has run by then, with the gate as it was."""
    model = build("llama")
    before, logits = snapshot(model), decode_logits(model, token_ids(1, 24), 16)
    report = accelerate(model, [hasten.Cats(0.5), hasten.Wina({"gate_proj": 0.5})])
    assert changed(report)["Wina"] == {f"model.layers.{i}.mlp.gate_proj" for i in range(2)}
    assert report.techniques[1].drift.kl > report.techniques[0].drift.kl > 0
    assert distance(decode_logits(model, token_ids(1, 24), 16)[:, :16], logits[:, :16]) < 1e-5
    hasten.revert(model)
    assert_unchanged(model, before)


def test_dense_decode_takes_what_sparsity_leaves():
    model = build("llama")
    report = accelerate(model, [hasten.Wina({"down_proj": 0.5, "model.layers.0.*": 0.3}), DENSE])
    parts = changed(report)
    everything = changed(accelerate(build("llama"), DENSE))["DenseDecode"]
    assert parts["Wina"] | parts["DenseDecode"] == everything and not parts["Wina"] & parts["DenseDecode"]
    assert len(parts["Wina"]) == 8
    assert [entry.implied for entry in report.techniques] == [False, False]
    assert [entry.implied for entry in accelerate(build("llama"), hasten.Wina(0.5)).techniques] == [False, True]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ([hasten.Wina(0.5), hasten.Teal(0.5)], r"Wina and Teal would both change model\.layers\.0\."),
        ([hasten.Teal({"down_proj": 0.1}), hasten.Cats(0.5)], r"Teal and Cats would both change .*mlp\.down_proj"),
    ],
    ids=["projections", "neurons"],
)
def test_overlap_is_refused(plan, words):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        accelerate(model, plan)
    assert_unchanged(model, before)


def test_a_technique_that_changes_nothing():
    """A sparsity of nought leaves all to DenseDecode."""
    model, ids = build("llama"), token_ids(1, 24)
    logits = decode_logits(model, ids, 16)
    report = accelerate(model, [hasten.Wina(0.0), hasten.Cats({"*.0.mlp": 0.0}), DENSE])
    assert changed(report)["Wina"] == changed(report)["Cats"] == set() and len(changed(report)["DenseDecode"]) == 15
    assert distance(decode_logits(model, ids, 16), logits) < 1e-5
    assert "Wina(sparsity=0.0" in str(report)
    hasten.revert(model)
