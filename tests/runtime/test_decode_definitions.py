"""What decode computes with each technique, against a dense model whose inputs are masked in plain torch."""

import pytest
import torch
from tiny_models import CONFIGS, WITHOUT_GATE, build, token_ids

import hasten
from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.inference import Inference
from hasten.acceleration.techniques.cats import CatsMLP
from hasten.acceleration.techniques.dense_decode import DecodeLinear
from hasten.acceleration.techniques.input_sparsity import SparseLinear


def decode_logits(model, ids, prefix):
    """Logits [T - prefix + 1, V] of a prefill of `prefix` tokens and single steps."""
    return Inference(model).decode(ids, prefix)[0]


def installed(model, kind):
    """What of a class stands in for forwards, by the paths of its modules."""
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    return {name: forward for name, forward in forwards.items() if isinstance(forward, kind)}


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_decode_is_exact(name):
    model, ids = build(name), token_ids(length=48)[0]
    expected, anatomy = decode_logits(model, ids, 8), Anatomy(model)
    everything = {projection.name for projection in (*anatomy.projections, anatomy.head)}
    hasten.accelerate(model, hasten.DenseDecode(always=True), measure_speed=False)
    assert installed(model, DecodeLinear).keys() == everything
    torch.testing.assert_close(decode_logits(model, ids, 8), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("technique", [hasten.Wina(0.4), hasten.Teal(0.4)], ids=["wina", "teal"])
def test_sparse_decode_computes_what_the_masks_say(name, technique):
    """One token after the other through the kernels equals one parallel pass of the dense model with masked inputs."""
    model, ids = build(name), token_ids(length=48)[0]
    dense = decode_logits(model, ids, 1)
    hasten.accelerate(model, technique, calibration=token_ids(seed=1), measure_speed=False)
    fast = decode_logits(model, ids, 1)
    cutoffs = {path: forward.cutoff for path, forward in installed(model, SparseLinear).items()}
    hasten.revert(model)
    assert len(cutoffs) == len(Anatomy(model).projections)
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
    model, ids = build(name), token_ids(length=48)[0]
    hasten.accelerate(model, hasten.Cats(0.5), calibration=token_ids(seed=1), measure_speed=False)
    fast = decode_logits(model, ids, 4)
    mlps = {
        path: (f"{path}.{forward.activation}", float(forward.threshold))
        for path, forward in installed(model, CatsMLP).items()
    }
    assert len(mlps) == 2
    hasten.revert(model)
    for path, threshold in mlps.values():
        # Decode steps have one position; the prefill of four stays dense.
        model.get_submodule(path).register_forward_hook(
            lambda module, arguments, gate, t=threshold: gate * (gate.abs() > t) if gate.shape[1] == 1 else gate
        )
    torch.testing.assert_close(fast, decode_logits(model, ids, 4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WITHOUT_GATE)
def test_cats_needs_a_gate(name):
    with pytest.raises(hasten.UnsupportedModelError, match="no gate"):
        hasten.accelerate(build(name), hasten.Cats(0.5), calibration=token_ids())
