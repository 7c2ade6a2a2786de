"""How modules and weights are used: what is counted, and what is refused for it."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CONFIGS, build, token_ids
from torch import nn

from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.uses import Use, uses, watched
from hasten.bench.runtime import tiny_zoo


def run(model):
    return uses(model, {"input_ids": token_ids(2, 8)})


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_projection_is_called_once_and_never_passed_by(name):
    model = build(name)
    before, logits = hooks(model), model(token_ids(2, 8)).logits
    found = run(model)
    anatomy = Anatomy(model, found)
    for projection in (*anatomy.projections, anatomy.head):
        assert found[projection.name] == Use(1, 0)
    assert anatomy.called_once == anatomy.projections and not anatomy.refusals
    assert hooks(model) == before
    assert torch.equal(model(token_ids(2, 8)).logits, logits)


def _reads_weight(self, x):
    return F.linear(x, self.up_proj.weight.t().contiguous().t()) @ self.down_proj.weight.T


def _reads_a_part(self, x):
    return self.down_proj(
        self.act_fn(self.gate_proj(x)) * (x @ self.up_proj.weight[:, :].unflatten(0, (11, 16)).flatten(0, 1).T)
    )


@pytest.mark.parametrize(
    ("forward", "passed_by"),
    [(_reads_weight, {"up_proj", "down_proj"}), (_reads_a_part, {"up_proj"})],
    ids=["whole", "views"],
)
def test_weights_that_are_read_past_their_module(forward, passed_by):
    model = build("llama")
    mlp = model.model.layers[1].mlp
    mlp.__class__ = type("AbsorbedMLP", (type(mlp),), {"forward": forward})
    found = run(model)
    assert {name for name, use in found.items() if use.bypasses} == {f"model.layers.1.mlp.{name}" for name in passed_by}
    anatomy = Anatomy(model, found)
    assert len(anatomy.with_shared) == len(anatomy.projections) == 14 - len(passed_by)
    assert {refusal.name.rpartition(".")[2] for refusal in anatomy.refusals} == passed_by
    assert all("without calling it" in refusal.reason for refusal in anatomy.refusals)


def test_a_module_that_is_called_and_read_is_taken():
    """What is read beside a call (a row of an embedding, tied to the head) is what the weight holds, whatever runs the
    call."""
    model = build("llama-tied")
    stock = type(model.model)
    reading = lambda self, *a, **k: (self.embed_tokens.weight[0].sum(), stock.forward(self, *a, **k))[1]  # noqa: E731
    model.model.__class__ = type("ReadingModel", (stock,), {"forward": reading})
    found = run(model)
    assert found["lm_head"] == Use(1, 0) and found["model.embed_tokens"] == Use(1, 0)


def test_a_module_that_is_called_twice():
    model = build("llama")
    mlp = model.model.layers[1].mlp
    stock = type(mlp)
    mlp.__class__ = type("TwiceMLP", (stock,), {"forward": lambda self, x: stock.forward(self, stock.forward(self, x))})
    anatomy = Anatomy(model, run(model))
    assert len(anatomy.projections) == 14 and not anatomy.refusals
    assert len(anatomy.called_once) == 11 and [len(block.projections) for block in anatomy.blocks] == [7, 4]
    assert [refusal.name.rpartition(".")[2] for refusal in anatomy.repeated] == ["gate_proj", "up_proj", "down_proj"]
    assert all("called 2 times" in refusal.reason for refusal in anatomy.repeated) and not anatomy.refusals
    assert [mlp.name for mlp in anatomy.gated_mlps] == ["model.layers.0.mlp"]
    assert [refusal.name for refusal in anatomy.refusals] == ["model.layers.1.mlp.gate_proj"]


def test_calls_are_counted_in_each_pass():
    model, ids = build("llava"), token_ids(1, 8)
    with watched(model) as found, torch.no_grad():
        assert found == {}
        for _ in range(3):
            model(ids)
    inner = model.model.language_model
    with watched(model, inner) as below, torch.no_grad():
        for _ in range(3):
            inner(ids)
    for projection in Anatomy(model).projections:
        assert found[projection.name] == below[projection.name] == Use(1, 0)
    assert found["lm_head"] == Use(1, 0) and below["lm_head"] == Use(0, 0)


def test_a_module_with_two_paths_is_counted_under_both():
    model = build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    found = run(model)
    assert found["model.layers.0.mlp.up_proj"] == found["model.layers.1.mlp.up_proj"] == Use(2, 0)


def test_a_part_that_the_pass_does_not_run_is_no_refusal():
    model = tiny_zoo.build("causal", "bart")
    found = run(model)
    anatomy = Anatomy(model, found)
    uncalled = [p.name for p in anatomy.projections if found[p.name] == Use(0, 0)]
    assert len(uncalled) == 8 and all("encoder_attn" in name for name in uncalled)
    assert anatomy.called_once == anatomy.projections and not anatomy.refusals


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "jamba", "longcat_flash"])
def test_linears_that_are_never_called_are_no_projections(model_type):
    model = tiny_zoo.build("causal", model_type)
    found = run(model)
    anatomy = Anatomy(model, found)
    assert anatomy.projections and not anatomy.refusals
    passed_by = {name.rpartition(".")[2] for name, use in found.items() if use.bypasses}
    assert passed_by & {"dt_proj", "classifier"}


def test_parts_of_one_storage_are_told_apart():
    model = build("llama")
    attention = model.model.layers[0].self_attn
    both = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
    attention.k_proj.weight, attention.v_proj.weight = (
        nn.Parameter(half, requires_grad=False) for half in both.chunk(2)
    )
    assert attention.k_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()
    found = run(model)
    assert found["model.layers.0.self_attn.k_proj"] == found["model.layers.0.self_attn.v_proj"] == Use(1, 0)


def test_an_error_in_the_model_leaves_no_hooks():
    model = build("llama")
    before = hooks(model)
    with pytest.raises(IndexError):
        uses(model, {"input_ids": torch.full((1, 3), 100_000)})
    assert hooks(model) == before
