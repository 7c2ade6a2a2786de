"""One error for one kind of mistake, in every operator: wrong kinds and dtypes, devices and shapes, and inputs that
require grad."""

import pytest
import torch

from hasten.kernels import backend, checks, storage
from hasten.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update
from hasten.kernels.column_sparse_linear import column_sparse_linear
from hasten.kernels.expert_linear import expert_linear
from hasten.kernels.linear import linear
from hasten.kernels.recurrence.delta_rule import delta_rule, delta_rule_step
from hasten.kernels.recurrence.linear_attention import (
    bidirectional_linear_attention,
    linear_attention,
    linear_attention_step,
)
from hasten.kernels.recurrence.selective_scan import selective_scan, selective_scan_step
from hasten.kernels.recurrence.wkv import wkv
from hasten.kernels.row_sparse_linear import row_sparse_linear
from hasten.kernels.token_scores import token_scores


def tokens(**more):
    """q, k, v of one row, 5 tokens, 2 heads of 3 and 4."""
    q, k = torch.rand(2, 1, 5, 2, 3)
    return {"q": q, "k": k, "v": torch.rand(1, 5, 2, 4)} | more


def decay():
    return -torch.rand(1, 5, 2)


def scanned(**more):
    """What a selective scan of one row, 5 tokens, 3 channels of 2 components takes."""
    (x, dt, z), (B, C), (D, bias) = torch.rand(3, 1, 5, 3), torch.rand(2, 1, 5, 2), torch.rand(2, 3)
    return {"x": x, "dt": dt, "A": -torch.rand(3, 2), "B": B, "C": C, "D": D, "z": z, "dt_bias": bias} | more


CASES = {  # the operator, and good arguments by name
    "linear": (linear, lambda: {"x": torch.rand(2, 3), "weight": torch.rand(4, 3), "bias": torch.rand(4)}),
    "linear, column-major": (
        linear,
        lambda: {"x": torch.rand(2, 3), "weight": storage.to_column_major(torch.rand(4, 3)), "bias": torch.rand(4)},
    ),
    "linear, many rows": (linear, lambda: {"x": torch.rand(99, 3), "weight": torch.rand(4, 3), "bias": torch.rand(4)}),
    "column_sparse_linear": (
        column_sparse_linear,
        lambda: {
            "x": torch.rand(2, 3),
            "weight": storage.to_column_major(torch.rand(4, 3)),
            "cutoff": torch.rand(3),
            "bias": torch.rand(4),
        },
    ),
    "row_sparse_linear": (
        row_sparse_linear,
        lambda: {
            "x": torch.rand(2, 3),
            "weight": torch.rand(4, 3),
            "gate": torch.rand(2, 4),
            "threshold": torch.tensor(0.5),
            "bias": torch.rand(4),
        },
    ),
    "expert_linear": (
        expert_linear,
        lambda: {
            "x": torch.rand(2, 3),
            "weight": storage.to_column_major(torch.rand(5, 4, 3)),
            "ids": torch.tensor([[0, 4], [2, 0]]),
            "bias": torch.rand(5, 4),
            "cutoff": torch.rand(5, 3),
        },
    ),
    "causal_conv1d": (
        causal_conv1d,
        lambda: {
            "x": torch.rand(1, 3, 5),
            "weight": torch.rand(3, 4),
            "bias": torch.rand(3),
            "initial_state": torch.rand(1, 3, 3),
            "cu_seqlens": torch.tensor([0, 5]),
        },
    ),
    "causal_conv1d_update": (
        causal_conv1d_update,
        lambda: {
            "x": torch.rand(1, 3, 5),
            "state": torch.rand(1, 3, 4),
            "weight": torch.rand(3, 4),
            "bias": torch.rand(3),
        },
    ),
    "linear_attention": (
        linear_attention,
        lambda: tokens(
            decay=decay(), initial_state=torch.rand(2, 2, 3, 4), cu_seqlens=torch.tensor([0, 2, 5]), scale=1.0
        ),
    ),
    "linear_attention_step": (
        linear_attention_step,
        lambda: tokens(state=torch.rand(1, 2, 3, 4), decay=decay()),
    ),
    "bidirectional_linear_attention": (bidirectional_linear_attention, lambda: tokens(decay=decay())),
    "delta_rule": (
        delta_rule,
        lambda: tokens(
            beta=torch.rand(1, 5, 2),
            decay=decay(),
            initial_state=torch.rand(2, 2, 3, 4),
            cu_seqlens=torch.tensor([0, 2, 5]),
        ),
    ),
    "delta_rule_step": (
        delta_rule_step,
        lambda: tokens(beta=torch.rand(1, 5, 2), state=torch.rand(1, 2, 3, 4), decay=decay()),
    ),
    "selective_scan": (
        selective_scan,
        lambda: scanned(initial_state=torch.rand(2, 3, 2), cu_seqlens=torch.tensor([0, 2, 5])),
    ),
    "selective_scan_step": (selective_scan_step, lambda: scanned(state=torch.rand(1, 3, 2))),
    "wkv": (
        wkv,
        lambda: {
            "time_decay": torch.rand(3),
            "time_first": torch.rand(3),
            "key": torch.rand(1, 5, 3),
            "value": torch.rand(1, 5, 3),
        },
    ),
    "token_scores": (
        token_scores,
        lambda: {"query": torch.rand(2, 1, 4, 3), "key": torch.rand(2, 2, 5, 3), "mask": torch.rand(2, 5) > 0.2},
    ),
}
TENSORS = [(case, name) for case, (_, make) in CASES.items() for name, x in make().items() if torch.is_tensor(x)]
each_tensor = pytest.mark.parametrize(("case", "name"), TENSORS)
each_backend = pytest.mark.parametrize("choice", ["auto", "reference"])


def call(case, **changes):
    operator, make = CASES[case]
    return operator(**make() | changes)


@each_backend
@pytest.mark.parametrize("case", CASES)
def test_the_arguments_of_the_cases_are_good(case, choice):
    with backend.use(choice):
        assert call(case).isfinite().all()


@each_backend
@each_tensor
def test_no_tensor(case, name, choice):
    wrong = [3] if name in checks.OPTIONAL else None
    with backend.use(choice), pytest.raises(TypeError, match=rf"^{name}: expected a tensor, got "):
        call(case, **{name: wrong})


@each_backend
@each_tensor
@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_a_wrong_dtype(case, name, dtype, choice):
    right = CASES[case][1]()[name]
    if right.dtype == dtype:
        pytest.skip("is its dtype")
    wrong = right.to(dtype)
    with backend.use(choice), pytest.raises(TypeError, match=rf"^({name}|weight|k|key): expected .*torch\.\w+"):
        call(case, **{name: wrong})


@each_backend
@each_tensor
def test_a_wrong_device(case, name, choice):
    if name == "cu_seqlens":
        pytest.skip("may be anywhere")
    wrong = CASES[case][1]()[name].to("meta")
    with (
        backend.use(choice),
        pytest.raises(ValueError, match=r"expected on (cpu|meta), the device of \w+, got (cpu|meta)"),
    ):
        call(case, **{name: wrong})


@each_backend
@each_tensor
def test_a_wrong_shape(case, name, choice):
    right = CASES[case][1]()[name]
    wrong = right[..., :0] if name == "x" else right[None]  # x may have any leading dimensions
    with backend.use(choice), pytest.raises(ValueError, match=r"^\w+: expected .*shape"):
        call(case, **{name: wrong})


@each_tensor
def test_an_input_that_requires_grad(case, name):
    x = CASES[case][1]()[name]
    if not x.is_floating_point():
        pytest.skip("has no gradient")
    with pytest.raises(
        NotImplementedError, match=rf"^{name} requires grad, and the kernel has no .* torch\.no_grad\(\)"
    ):
        call(case, **{name: x.requires_grad_()})
    with torch.no_grad():
        assert call(case, **{name: x}).isfinite().all()


@each_tensor
def test_the_definition_has_gradients_unless_a_state_changes_in_place(case, name):
    x = CASES[case][1]()[name]
    if not x.is_floating_point():
        pytest.skip("has no gradient")
    x = x.requires_grad_()
    with backend.use("reference"):
        if case.endswith(("_step", "_update")):
            with pytest.raises(NotImplementedError, match="the operator for whole sequences has gradients"):
                call(case, **{name: x})
            return
        if name in ("cutoff", "threshold"):  # what is compared has no gradient
            return
        call(case, **{name: x}).sum().backward()
    assert x.grad.isfinite().all()
