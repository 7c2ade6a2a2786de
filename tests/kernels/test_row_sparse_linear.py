"""row_sparse_linear on CPUs: every instruction set against the definition in float64, laws, errors, torch.compile."""

import pytest
import torch
from harness import assert_close

from hasten.kernels import backend, storage
from hasten.kernels.linear import linear
from hasten.kernels.row_sparse_linear import reference, row_sparse_linear

SIZES = [(1, 1, 1), (1, 37, 53), (2, 129, 1000), (3, 4, 31), (4, 300, 257), (5, 65, 64), (8, 7, 2049), (1, 1030, 4100)]


def inputs(B, N, K, dtype=torch.float32):
    x, weight = torch.randn(B, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
    return x, weight, torch.randn(B, N, dtype=dtype), torch.tensor(0.7), torch.randn(N, dtype=dtype)


def double(x, weight, gate, threshold, bias):
    return x.double(), weight.double(), gate.double(), threshold, bias.double()


@pytest.mark.parametrize(("B", "N", "K"), SIZES)
def test_is_the_reference(isa, dtype, B, N, K, poisoned):
    arguments = inputs(B, N, K, dtype)
    arguments[2][0, 0] = 2  # at least one row is active
    assert_close(row_sparse_linear(*arguments), reference.row_sparse_linear(*double(*arguments)))


def test_a_negative_threshold_is_dense(isa, dtype):
    x, weight, gate, _, bias = inputs(3, 129, 515, dtype)
    dense = gate.double() * linear(x.double(), weight.double(), bias.double())
    assert_close(row_sparse_linear(x, weight, gate, torch.tensor(-1.0), bias), dense)


def test_inactive_outputs_are_zero_and_not_read(isa, dtype):
    x, weight, gate, threshold, bias = inputs(4, 129, 515, dtype)
    active = (gate.abs() > threshold).any(0)
    gate[:, ~active] = 0
    expected = row_sparse_linear(x, weight, gate, threshold, bias)
    assert not expected[:, ~active].any() and expected[:, active].all()
    weight[~active] = torch.nan
    assert torch.equal(row_sparse_linear(x, weight, gate, threshold, bias), expected)


def test_nothing_active(isa, dtype, poisoned):
    x, weight, gate, _, bias = inputs(2, 129, 515, dtype)
    assert not row_sparse_linear(x, weight, gate, torch.tensor(torch.inf), bias).any()


def test_the_threshold_itself_is_inactive_and_a_nan_is_active(isa, dtype):
    x, weight = torch.ones(1, 1, dtype=dtype), torch.ones(4, 1, dtype=dtype)
    gate = torch.tensor([[0.5, -0.5, 0.75, torch.nan]], dtype=dtype)
    result = row_sparse_linear(x, weight, gate, torch.tensor(0.5))
    torch.testing.assert_close(result, gate * torch.tensor([0, 0, 1, 1], dtype=dtype), equal_nan=True)


@pytest.mark.parametrize("B", [1, 8])
def test_bits_do_not_depend_on_threads_or_calls(isa, dtype, B, threads):
    arguments = inputs(B, 999, 515, dtype)
    torch.set_num_threads(1)
    first = row_sparse_linear(*arguments)
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(row_sparse_linear(*arguments), first)


def test_leading_dimensions_and_strides(isa):
    x, weight, gate, threshold, bias = inputs(6, 40, 30)
    expected = row_sparse_linear(x, weight, gate, threshold, bias)
    result = row_sparse_linear(x.view(2, 3, 30), weight, gate.view(2, 3, 40), threshold, bias)
    assert torch.equal(result, expected.view(2, 3, 40))
    result = row_sparse_linear(x.t().contiguous().t(), weight, gate.t().contiguous().t(), threshold, bias)
    assert torch.equal(result, expected) and result.is_contiguous()
    assert row_sparse_linear(x[0], weight, gate[0], threshold, bias).shape == (40,)
    assert row_sparse_linear(x[:0], weight, gate[:0], threshold, bias).shape == (0, 40)


def test_more_rows_than_the_kernel_takes_and_float64_are_the_reference():
    for arguments in (inputs(storage.MAX_BATCH + 1, 40, 30), inputs(2, 40, 30, torch.float64)):
        assert torch.equal(row_sparse_linear(*arguments), reference.row_sparse_linear(*arguments))


def test_gradients_of_the_definition():
    x, weight, gate, threshold, bias = inputs(2, 4, 3, torch.float64)
    arguments = [a.requires_grad_() for a in (x, weight, gate, bias)]
    call = lambda x, weight, gate, bias: row_sparse_linear(x, weight, gate, threshold, bias)  # noqa: E731 (gradcheck's)
    with backend.use("reference"):
        assert torch.autograd.gradcheck(call, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, w, g, t, b: (x, w, g[:1], t, b), ValueError, r"gate: expected shape \[2, 40\], got shape \[1, 40\]"),
        (lambda x, w, g, t, b: (x, w, g.half(), t, b), TypeError, "gate: expected torch.float32.* got torch.float16"),
        (lambda x, w, g, t, b: (x, w, g, t.double(), b), TypeError, "threshold: expected torch.float32, got"),
        (lambda x, w, g, t, b: (x, w, g, t[None], b), ValueError, r"threshold: expected shape \[\], got shape \[1\]"),
        (lambda x, w, g, t, b: (x, w, g, t.to("meta"), b), ValueError, "threshold: expected on cpu.* got meta"),
        (lambda x, w, g, t, b: (x, w.t().contiguous().t(), g, t, b), ValueError, "expected row-major"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        row_sparse_linear(*change(*inputs(2, 40, 30)))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles(compiler, can_compile):
    arguments = inputs(2, 40, 30)
    compiled = torch.compile(lambda *args: row_sparse_linear(*args).relu(), fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(*arguments), row_sparse_linear(*arguments).relu())


def test_is_a_well_made_torch_operator():
    torch.library.opcheck(torch.ops.hasten.row_sparse_linear.default, inputs(2, 40, 30))
