"""Edits by themselves, and how what they installed notices that a weight changed."""

import pytest
import torch
from torch import nn

from hasten.acceleration.edits import StoreColumnMajor, apply_all, undo_all
from hasten.acceleration.forwards import Watch
from hasten.errors import StateError
from hasten.kernels.storage import is_column_major


class Weights(nn.Module):
    """Of every shape in which a dimension can have one element."""

    def __init__(self):
        super().__init__()
        shapes = ((3, 5), (1, 5), (3, 1), (1, 1), (2, 3, 5), (2, 1, 5), (2, 3, 1), (1, 3, 5))
        self.all = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.all.append(nn.Parameter(torch.empty_strided((1, 3, 5), (99, 5, 1)).normal_()))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_weight_comes_back_with_its_strides(layout):
    model = Weights()
    if layout == "columns":
        for weight in model.all:
            weight.data = weight.data.mT.contiguous().mT
    before = [(weight, weight.stride(), weight.detach().clone()) for weight in model.all]
    apply_all(model, [StoreColumnMajor(name) for name, _ in model.named_parameters()], done := [])
    assert all(is_column_major(weight) and torch.equal(weight, values) for weight, _, values in before)
    undo_all(model, done)
    for now, (weight, strides, values) in zip(model.all, before, strict=True):
        assert now is weight and now.stride() == strides and torch.equal(now, values)


CHANGES = {
    "in place": lambda weight: weight.mul_(2),
    "data in place": lambda weight: weight.data.mul_(2),
    "other data": lambda weight: setattr(weight, "data", weight.data * 2),
    "the same values elsewhere": lambda weight: setattr(weight, "data", weight.data.clone()),
}


@pytest.mark.parametrize("thorough", [False, True], ids=["decode", "prefill"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_weight_is_noticed_and_named(change, thorough):
    """In decode too, but for writes through `.data`, which leave no mark."""
    weights, watch = {"first": nn.Parameter(torch.randn(70, 9)), "second": nn.Parameter(torch.randn(9, 70))}, Watch()
    for _ in range(3):
        watch.check(weights, thorough)
    CHANGES[change](weights["second"])
    if change == "data in place" and not thorough:
        watch.check(weights, thorough)
        return
    with pytest.raises(StateError, match=r"^second was changed after hasten\.accelerate"):
        watch.check(weights, thorough)
    watch.restart()
    watch.check(weights, thorough)
