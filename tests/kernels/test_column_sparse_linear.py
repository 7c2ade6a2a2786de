"""column_sparse_linear on CPUs: every instruction set against the float64 definition, laws, errors, torch.compile."""

import pytest
import torch
from harness import assert_close

from hasten.kernels import backend, storage
from hasten.kernels.column_sparse_linear import column_sparse_linear, reference
from hasten.kernels.linear import linear

SIZES = [(1, 1, 1), (1, 37, 53), (2, 129, 1000), (3, 31, 4), (4, 300, 257), (5, 64, 65), (8, 2049, 7), (1, 33000, 9)]


def inputs(B, N, K, dtype=torch.float32):
    weight = storage.to_column_major(torch.randn(N, K, dtype=dtype))
    return torch.randn(B, K, dtype=dtype), weight, torch.rand(K), torch.randn(N, dtype=dtype)


def double(x, weight, cutoff, bias):
    return x.double(), weight.double(), cutoff, bias.double()


@pytest.mark.parametrize(("B", "N", "K"), SIZES)
def test_is_the_reference(isa, dtype, B, N, K, poisoned):
    arguments = inputs(B, N, K, dtype)
    arguments[2][0] = -1  # at least one column is active
    assert_close(column_sparse_linear(*arguments), reference.column_sparse_linear(*double(*arguments)))


@pytest.mark.parametrize("B", [1, 3, 8])
def test_without_a_cutoff_it_is_dense(isa, dtype, B):
    x, weight, _, bias = inputs(B, 129, 515, dtype)
    expected = linear(x.double(), weight.double().contiguous(), bias.double())
    assert_close(column_sparse_linear(x, weight, bias=bias), expected)


def test_a_cutoff_of_zero_skips_zeros_only(isa, dtype):
    x, weight, _, bias = inputs(1, 129, 515, dtype)
    x[:, torch.rand(515) < 0.5] = 0
    dense = column_sparse_linear(x, weight, None, bias)
    assert_close(column_sparse_linear(x, weight, torch.zeros(515), bias), dense.double())
    weight[:, x[0] == 0] = torch.nan  # what is skipped is not read
    assert_close(column_sparse_linear(x, weight, torch.zeros(515), bias), dense.double())


def test_rows_share_the_union_of_their_columns(isa, dtype):
    x, weight, cutoff, bias = inputs(4, 129, 515, dtype)
    union = (x.abs() > cutoff).any(0)
    assert union.sum() > (x[0].abs() > cutoff).sum()
    open_cutoff = torch.where(union, -1.0, torch.inf)
    together = column_sparse_linear(x, weight, cutoff, bias)
    for b in range(4):
        assert_close(together[b], column_sparse_linear(x[b], weight, open_cutoff, bias).double())


def test_nothing_active_leaves_the_bias(isa, dtype, poisoned):
    x, weight, cutoff, bias = inputs(2, 129, 515, dtype)
    never = torch.full_like(cutoff, torch.inf)
    assert torch.equal(column_sparse_linear(x, weight, never, bias), bias.expand(2, -1))
    assert torch.equal(column_sparse_linear(x, weight, never), torch.zeros(2, 129, dtype=dtype))


def test_the_cutoff_itself_is_inactive_and_a_nan_is_active(isa, dtype):
    x = torch.tensor([[0.5, -0.5, 0.25, 1.0]], dtype=dtype)
    weight = storage.to_column_major(torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=dtype))
    cutoff = torch.tensor([0.5, 0.5, 0.0, torch.inf])
    assert column_sparse_linear(x, weight, cutoff).item() == 1.0
    x[0, 3] = torch.nan
    assert column_sparse_linear(x, weight, cutoff).isnan().all()
    assert column_sparse_linear(x[:, :3], weight[:, :3], torch.full((3,), torch.nan)).item() == 0.5


@pytest.mark.parametrize("B", [1, 8])
def test_bits_do_not_depend_on_threads_or_calls(isa, dtype, B, threads):
    arguments = inputs(B, 999, 515, dtype)
    torch.set_num_threads(1)
    first = column_sparse_linear(*arguments)
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(column_sparse_linear(*arguments), first)


def test_leading_dimensions_and_strides(isa):
    x, weight, cutoff, bias = inputs(6, 40, 30)
    expected = column_sparse_linear(x, weight, cutoff, bias)
    assert torch.equal(column_sparse_linear(x.view(2, 3, 30), weight, cutoff, bias), expected.view(2, 3, 40))
    assert torch.equal(column_sparse_linear(x.t().contiguous().t(), weight, cutoff, bias), expected)
    assert torch.equal(column_sparse_linear(x, weight, torch.stack([cutoff, cutoff], 1)[:, 0], bias), expected)
    assert column_sparse_linear(x[0], weight, cutoff, bias).shape == (40,)
    assert column_sparse_linear(x[:0], weight, cutoff, bias).shape == (0, 40)


def test_more_rows_than_the_kernel_takes_and_float64_are_the_reference():
    for arguments in (inputs(storage.MAX_BATCH + 1, 40, 30), inputs(2, 40, 30, torch.float64)):
        assert torch.equal(column_sparse_linear(*arguments), reference.column_sparse_linear(*arguments))


def test_gradients_of_the_definition():
    x, weight, cutoff, bias = inputs(2, 4, 3, torch.float64)
    arguments = [a.requires_grad_() for a in (x, weight, bias)]
    with backend.use("reference"):
        assert torch.autograd.gradcheck(
            lambda x, weight, bias: column_sparse_linear(x, weight, cutoff, bias), arguments
        )


def test_column_major():
    weight = torch.randn(3000, 1000)
    columns = storage.to_column_major(weight)
    assert torch.equal(columns, weight) and columns.data_ptr() != weight.data_ptr()
    assert storage.is_column_major(columns) and not storage.is_row_major(columns)
    assert storage.is_row_major(weight) and not storage.is_column_major(weight)
    assert storage.is_column_major(weight[:1]) and storage.is_column_major(weight[:, :1].contiguous())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, w, c, b: (x, w.contiguous(), c, b), ValueError, "expected column-major.* call .*to_column_major"),
        (lambda x, w, c, b: (x, w, c[1:], b), ValueError, r"cutoff: expected shape \[30\], got shape \[29\]"),
        (lambda x, w, c, b: (x, w, c.double(), b), TypeError, "cutoff: expected torch.float32, got torch.float64"),
        (lambda x, w, c, b: (x, w, c.to("meta"), b), ValueError, "cutoff: expected on cpu.* got meta"),
        (lambda x, w, c, b: (x[:, 1:], w, c, b), ValueError, r"x: expected shape \[..., 30\]"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        column_sparse_linear(*change(*inputs(2, 40, 30)))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles(compiler, can_compile):
    arguments = inputs(2, 40, 30)
    compiled = torch.compile(lambda *args: column_sparse_linear(*args).relu(), fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(*arguments), column_sparse_linear(*arguments).relu())


@pytest.mark.parametrize("with_cutoff", [False, True], ids=["dense", "cutoff"])
def test_is_a_well_made_torch_operator(with_cutoff):
    x, weight, cutoff, bias = inputs(2, 40, 30)
    arguments = (x, weight, cutoff if with_cutoff else None, bias)
    torch.library.opcheck(torch.ops.hasten.column_sparse_linear.default, arguments)
