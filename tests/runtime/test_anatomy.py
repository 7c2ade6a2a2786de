import pytest
import torch
from tiny_models import CONFIGS, MIXTURES, WITHOUT_GATE, build, token_ids
from torch import nn

import hasten
from hasten.acceleration.anatomy import FAMILIES, dissect
from hasten.acceleration.measure import decode_logits
from hasten.acceleration.modules import CatsMLP, DecodeLinear, SparseLinear


@pytest.mark.parametrize("name", CONFIGS)
def test_finds_every_projection(name):
    model = build(name)
    anatomy = dissect(model)
    assert len(anatomy.blocks) == 2
    found = {projection.name for projection in anatomy.projections()}
    in_layers = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in path and "vision" not in path
    }
    assert found == in_layers
    assert all(model.get_submodule(projection.name) is projection.module for projection in anatomy.projections())
    assert anatomy.head.module is model.get_output_embeddings()
    roles = [projection.role for projection in anatomy.blocks[0].projections]
    assert len(set(roles)) == len(roles)


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_decode_is_exact(name):
    model, ids = build(name), token_ids()[0]
    expected = decode_logits(model, ids, 8)
    hasten.accelerate(model, hasten.DenseDecode(always=True), measure_speed=False)
    assert sum(isinstance(module, DecodeLinear) for module in model.modules()) == len([*dissect_names(model)])
    torch.testing.assert_close(decode_logits(model, ids, 8), expected, rtol=1e-4, atol=1e-4)


def dissect_names(model):
    """The linears that decode should go through: all of the text model and the head, none of a vision tower."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "vision" not in name and "multi_modal" not in name:
            yield name


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("technique", [hasten.Wina(0.4), hasten.Teal(0.4)], ids=["wina", "teal"])
def test_sparse_decode_computes_what_the_masks_say(name, technique):
    """One token after the other through the kernels equals one parallel pass of the dense model with masked inputs."""
    model, ids = build(name), token_ids()[0]
    dense = decode_logits(model, ids, 1)
    hasten.accelerate(model, technique, calibration=token_ids(seed=1), measure_speed=False)
    fast = decode_logits(model, ids, 1)
    cutoffs = {path: module.cutoff for path, module in model.named_modules() if isinstance(module, SparseLinear)}
    hasten.revert(model)
    assert len(cutoffs) == len([*dissect(model).projections()])
    for path, cutoff in cutoffs.items():
        model.get_submodule(path).register_forward_pre_hook(lambda module, x, c=cutoff: (x[0] * (x[0].abs() > c),))
    with torch.no_grad():
        masked = model(input_ids=ids[None]).logits[0].float()
    # Rounding can tip an input that lies on its cutoff, and then changes that position alone.
    distance = (fast - masked).norm(dim=-1) / masked.norm(dim=-1)
    assert (distance < 1e-4).float().mean() >= 0.95
    assert (fast - dense).norm() > 1e-2 * dense.norm()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in WITHOUT_GATE])
def test_cats_computes_what_the_threshold_says(name):
    model, ids = build(name), token_ids()[0]
    hasten.accelerate(model, hasten.Cats(0.5), calibration=token_ids(seed=1), measure_speed=False)
    fast = decode_logits(model, ids, 4)
    mlps = {
        path: (module, float(module.threshold)) for path, module in model.named_modules() if isinstance(module, CatsMLP)
    }
    assert len(mlps) == 2
    activations = {path: (f"{path}.{module.activation}", threshold) for path, (module, threshold) in mlps.items()}
    hasten.revert(model)
    for path, threshold in activations.values():
        # Decode steps have one position; the prefill of four stays dense.
        model.get_submodule(path).register_forward_hook(
            lambda module, arguments, gate, t=threshold: gate * (gate.abs() > t) if gate.shape[1] == 1 else gate
        )
    torch.testing.assert_close(fast, decode_logits(model, ids, 4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WITHOUT_GATE)
def test_cats_needs_a_gate(name):
    with pytest.raises(hasten.UnsupportedModelError, match="no gate"):
        hasten.accelerate(build(name), hasten.Cats(0.5), calibration=token_ids())


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts_are_refused_by_name(name):
    with pytest.raises(hasten.UnsupportedModelError, match=r"layers\.0\.mlp.*mixture of experts"):
        dissect(build(name))


def test_unknown_family_names_the_known_ones():
    with pytest.raises(hasten.UnsupportedModelError, match="llama") as error:
        dissect(nn.Sequential(nn.Linear(3, 3)))
    assert all(name in str(error.value) for name in FAMILIES)


def test_meta_weights_are_refused():
    model = build("llama")
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(hasten.UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj.*meta"):
        dissect(model)


def test_offloaded_weights_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(build("llama"), execution_device="cpu")
    with pytest.raises(hasten.UnsupportedModelError, match="offloaded"):
        dissect(model)


class QuantisedLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", linear.weight.to(torch.int8))


@pytest.mark.parametrize("strict", [True, False])
def test_quantised_projections_are_refused_or_reported(strict):
    model = build("llama")
    mlp = model.model.layers[1].mlp
    mlp.down_proj = QuantisedLinear(mlp.down_proj)
    if strict:
        with pytest.raises(
            hasten.UnsupportedModelError, match=r"layers\.1\.mlp\.down_proj.*QuantisedLinear.*quantised"
        ):
            dissect(model)
    else:
        anatomy = dissect(model, strict=False)
        assert [error.name for error in anatomy.skipped] == ["model.layers.1.mlp.down_proj"]
        assert "model.layers.1.mlp.down_proj" not in [projection.name for projection in anatomy.projections()]


def test_replaced_forward_is_refused():
    model = build("llama")
    projection = model.model.layers[0].self_attn.q_proj
    projection.forward = projection.forward
    with pytest.raises(hasten.UnsupportedModelError, match=r"q_proj.*forward was replaced"):
        dissect(model)


def test_subclass_of_linear_is_refused():
    model = build("llama")

    class Adapter(nn.Linear):
        pass

    model.model.layers[0].self_attn.q_proj = Adapter(64, 64)
    with pytest.raises(hasten.UnsupportedModelError, match=r"q_proj.*Adapter.*merge"):
        dissect(model)
