"""linear on CPUs: every instruction set against the definition in float64, laws, errors, torch.compile."""

import pytest
import torch
from harness import assert_close

from hasten.kernels import backend, storage
from hasten.kernels.linear import linear, reference

SIZES = [(1, 1, 1), (1, 37, 53), (2, 129, 1000), (3, 4, 31), (4, 300, 257), (5, 65, 64), (8, 7, 2049), (1, 1030, 4100)]


def inputs(B, N, K, dtype=torch.float32):
    return torch.randn(B, K, dtype=dtype), torch.randn(N, K, dtype=dtype), torch.randn(N, dtype=dtype)


@pytest.mark.parametrize(("B", "N", "K"), SIZES)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_is_the_reference(isa, dtype, B, N, K, with_bias, poisoned):
    x, weight, bias = inputs(B, N, K, dtype)
    bias = bias if with_bias else None
    expected = reference.linear(x.double(), weight.double(), bias.double() if with_bias else None)
    assert_close(linear(x, weight, bias), expected)


def test_scalars_of_every_size_survive(isa, dtype):
    """Subnormals, the largest value, infinities and NaN go through the conversions of an instruction set."""
    limits = torch.finfo(dtype)
    values = torch.tensor([0.0, -0.0, 1.0, limits.max, limits.min, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    if dtype == torch.float16:  # products of bfloat16 subnormals may be flushed to zero
        values = torch.cat(
            [values, torch.tensor([limits.smallest_normal / 2, limits.smallest_normal / 1024], dtype=dtype)]
        )
    result = linear(torch.ones(1, 1, dtype=dtype), values[:, None])
    torch.testing.assert_close(result[0], values, rtol=0, atol=0, equal_nan=True)


def test_rounds_to_nearest_even(isa, dtype):
    x = torch.randn(8, 1000, dtype=torch.float32)
    sums = x.to(dtype).float() @ torch.ones(1000, 1)
    result = linear(x.to(dtype), torch.ones(1, 1000, dtype=dtype))
    torch.testing.assert_close(result, sums.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("B", [1, 8])
def test_bits_do_not_depend_on_threads_or_calls(isa, dtype, B, threads):
    x, weight, bias = inputs(B, 999, 515, dtype)
    torch.set_num_threads(1)
    first = linear(x, weight, bias)
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(linear(x, weight, bias), first)


def test_a_row_does_not_depend_on_the_batch(isa, dtype):
    x, weight, bias = inputs(8, 130, 257, dtype)
    together = linear(x, weight, bias)
    for b in range(8):
        assert_close(linear(x[b], weight, bias), together[b].double())


def test_leading_dimensions_and_strides(isa):
    x, weight, bias = inputs(6, 40, 30)
    expected = linear(x, weight, bias)
    assert torch.equal(linear(x.view(2, 3, 30), weight, bias), expected.view(2, 3, 40))
    assert torch.equal(linear(x[0], weight, bias), linear(x[:1], weight, bias)[0])
    assert torch.equal(linear(x.t().contiguous().t(), weight, bias), expected)
    assert torch.equal(linear(x, weight, torch.stack([bias, bias], 1)[:, 0]), expected)
    assert linear(x[:0], weight, bias).shape == (0, 40)


def test_more_rows_than_the_kernel_takes():
    x, weight, bias = inputs(storage.MAX_BATCH + 1, 40, 30)
    torch.testing.assert_close(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("B", [1, 3, 8, 9])
def test_a_column_major_weight_is_read_as_it_lies(isa, dtype, B, poisoned):
    x, weight, bias = inputs(B, 129, 515, dtype)
    stored = weight.t().contiguous()  # [K, N], as Conv1D of transformers keeps it
    assert_close(linear(x, stored.t(), bias), reference.linear(x.double(), weight.double(), bias.double()))


def test_a_column_major_weight_is_not_copied(monkeypatch):
    addresses = []
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda tensor: addresses.append(tensor.data_ptr()) or tensor)
    x, weight, bias = inputs(2, 40, 30)
    stored = weight.t().clone(memory_format=torch.contiguous_format)
    torch.testing.assert_close(linear(x, stored.t(), bias), torch.nn.functional.linear(x, weight, bias))
    assert stored.data_ptr() not in addresses


@pytest.mark.parametrize(("N", "K"), [(0, 3), (3, 0)])
def test_nothing_to_multiply(N, K):
    x, weight, bias = inputs(2, N, K)
    assert torch.equal(linear(x, weight, bias), bias.expand(2, N))
    assert torch.equal(linear(x, weight.t().contiguous().t(), bias), bias.expand(2, N))


def test_float64_is_the_reference():
    x, weight, bias = inputs(2, 40, 30, torch.float64)
    assert torch.equal(linear(x, weight, bias), reference.linear(x, weight, bias))


def test_gradients_of_the_definition():
    arguments = [a.requires_grad_() for a in inputs(2, 4, 3, torch.float64)]
    with backend.use("reference"):
        assert torch.autograd.gradcheck(linear, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, w, b: (x[:, 1:], w, b), ValueError, r"x: expected shape \[..., 30\] .* got shape \[2, 29\]"),
        (lambda x, w, b: (x, w[0], b), ValueError, r"weight: expected shape \[N, K\], got shape \[30\]"),
        (lambda x, w, b: (x, w, b[1:]), ValueError, r"bias: expected shape \[40\], got shape \[39\]"),
        (lambda x, w, b: (x.int(), w, b), TypeError, "x: expected a floating dtype of .* got torch.int32"),
        (lambda x, w, b: (x, w.half(), b), TypeError, "weight: expected torch.float32.* got torch.float16"),
        (lambda x, w, b: (x, w, b.half()), TypeError, "bias: expected torch.float32.* got torch.float16"),
        (lambda x, w, b: (x, w.to("meta"), b), ValueError, "weight: expected on cpu.* got meta"),
        (lambda x, w, b: (x, w.repeat(1, 2)[:, ::2], b), ValueError, r"expected row-major.* call .contiguous\(\)"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        linear(*change(*inputs(2, 40, 30)))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles(compiler, can_compile):
    arguments = inputs(2, 40, 30)
    compiled = torch.compile(lambda *args: linear(*args).relu(), fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(*arguments), linear(*arguments).relu())


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_is_a_well_made_torch_operator(name):
    with backend.use(name):
        torch.library.opcheck(torch.ops.hasten.linear.default, inputs(2, 40, 30))
