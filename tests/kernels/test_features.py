"""Feature maps, normalisers and decays of linear attention: identities against independent one-liners in float64,
ranges, edges, errors."""

import math

import pytest
import torch

from hasten.kernels.recurrence.linear_attention import features, linear_attention


@pytest.fixture
def x():
    return torch.randn(2, 7, 3, 6, dtype=torch.float64)


def test_pointwise_maps(x):
    torch.testing.assert_close(features.elu_plus_one(x), torch.where(x > 0, x + 1, x.exp()))
    y = x / (1 + (-x).exp()) + 0.5
    torch.testing.assert_close(features.silu_shifted(x), y / y.square().sum(-1, keepdim=True).sqrt())


def test_ranges(dtype):
    x = (10 * torch.randn(2, 50, 3, 16)).to(dtype)
    assert (features.elu_plus_one(x) >= 0).all() and (features.silu_shifted(x) > 0).all()
    torch.testing.assert_close(features.silu_shifted(x).float().norm(dim=-1), torch.ones(2, 50, 3), atol=1e-2, rtol=0)
    assert features.elu_plus_one(x).dtype == features.silu_shifted(x).dtype == dtype


@pytest.mark.parametrize("nu", [1, 2, 3])
def test_dpfp(x, nu):
    r = torch.cat([x.clamp(min=0), (-x).clamp(min=0)], -1)
    expected = torch.stack([r[..., j] * r[..., (j - i) % 12] for i in range(1, nu + 1) for j in range(12)], -1)
    assert expected.shape[-1] == 2 * 6 * nu
    torch.testing.assert_close(features.dpfp(x, nu), expected)


def test_sum_normalize(x):
    y = features.dpfp(x, 2)
    torch.testing.assert_close(features.sum_normalize(y).sum(-1), torch.ones(2, 7, 3, dtype=torch.float64))
    tiny = torch.tensor([[1e-30, 3e-30]])
    torch.testing.assert_close(features.sum_normalize(tiny), torch.tensor([[0.25, 0.75]]))  # no epsilon drowns it


def test_sum_normalize_of_nothing_is_zero_and_its_gradient_is_finite(dtype):
    y = torch.zeros(1, 4, dtype=dtype, requires_grad=True)
    out = features.sum_normalize(y)
    assert not out.any() and out.dtype == dtype
    out.sum().backward()
    assert y.grad.isfinite().all()
    assert features.sum_normalize(torch.tensor([1.0, torch.nan])).isnan().all()  # a NaN is not hidden


@pytest.mark.parametrize("f", [features.elu_plus_one, features.silu_shifted, lambda x: features.dpfp(x, 2)])
def test_zeros_are_finite(f):
    assert f(torch.zeros(1, 2, 3, 4)).isfinite().all()


def test_cosformer_weighs_by_the_cosine_of_the_distance(x):
    M, i = 9, torch.arange(1, 8)
    q, k = features.cosformer(x, i, M), features.cosformer(x.flip(-1), i, M)
    weights = torch.cos(math.pi / (2 * M) * (i[:, None] - i).double())
    expected = torch.einsum("bihd,bjhd->bhij", x, x.flip(-1)) * weights
    torch.testing.assert_close(torch.einsum("bihd,bjhd->bhij", q, k), expected)
    torch.testing.assert_close(q[0, 2, 1, :6], x[0, 2, 1] * math.sin(math.pi * 3 / 18))  # the sines first


def test_cosformer_takes_positions_per_sequence(x):
    positions = torch.stack([torch.arange(1, 8), torch.arange(3, 10)])
    whole = features.cosformer(x, positions, 16)
    assert all(torch.equal(whole[b : b + 1], features.cosformer(x[b : b + 1], positions[b], 16)) for b in range(2))


def test_lrpe_is_the_rotation_of_the_difference(x):
    theta, i = torch.rand(3, 6, dtype=torch.float64), torch.tensor([[0, 1, 2, 3, 4, 5, 6], [4, 7, 9, 10, 30, 31, 99]])
    q, k = features.lrpe(x, theta, i), features.lrpe(x.flip(1), theta, i)
    difference = (i[:, :, None] - i[:, None, :]).double()
    cosine = torch.cos(difference[..., None, None] * theta)
    expected = torch.einsum("bihd,bjhd,bijhd->bhij", x, x.flip(1), cosine)
    torch.testing.assert_close(torch.einsum("bihd,bjhd->bhij", q, k), expected)
    torch.testing.assert_close(q[0, 1, :, :6], x[0, 1] * theta.cos())  # the cosines first


def test_lrpe_knows_no_absolute_position(x):
    theta, i = features.lrpe_theta(3, 6), torch.arange(7)
    scores = [
        torch.einsum("bihd,bjhd->bhij", *[features.lrpe(y, theta, i + o) for y in (x, x.flip(-1))]) for o in (0, 1000)
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-9, atol=1e-9)


def test_lrpe_in_half_precision_computes_its_angles_in_single(dtype):
    x, theta, i = torch.ones(1, 3, 2, 4, dtype=dtype), features.lrpe_theta(2, 4), torch.tensor([1000, 3001, 50003])
    expected = torch.cos(i.double()[:, None, None] * theta.double())
    found = features.lrpe(x, theta, i)
    assert found.dtype == dtype
    torch.testing.assert_close(found[0, ..., :4].double(), expected, atol=5e-3, rtol=0)


def test_lrpe_theta():
    theta = features.lrpe_theta(4, 8).double().flatten()
    assert theta[0] == 1 and features.lrpe_theta(4, 8).shape == (4, 8)
    torch.testing.assert_close(
        theta, torch.tensor([10000 ** (-2 * j / 32) for j in range(32)], dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("bound", [0.0, 0.25, 0.9, 1 - 1e-12])
def test_hgrn2_gates(x, bound):
    decay, k = features.hgrn2_gates(x, bound)
    gate = bound + (1 - bound) / (1 + (-x).exp())
    torch.testing.assert_close(decay, gate.log(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(decay.exp() + k, torch.ones_like(k))
    assert (decay <= 0).all() and (k >= 0).all() and (k <= 1 - bound + 1e-15).all()


@pytest.mark.parametrize("bound", [0.0, 0.5])
def test_hgrn2_gates_of_extremes(bound):
    f = torch.tensor([-1e4, -200.0, -30.0, 30.0, 80.0], requires_grad=True)
    decay, k = features.hgrn2_gates(f, bound)
    wide = [features.hgrn2_gates(f.double(), bound)[i] for i in range(2)]
    torch.testing.assert_close(decay.double(), wide[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(k.double(), wide[1], rtol=1e-6, atol=1e-45)
    assert k[4] > 0 and decay[4] < 0  # 1 - e^g would have been 0
    torch.testing.assert_close(decay[0].detach(), torch.tensor(-1e4 if bound == 0 else math.log(0.5)))
    (decay.sum() + k.sum()).backward()
    assert f.grad.isfinite().all()


def test_hgrn2_gates_that_never_close():
    decay, k = features.hgrn2_gates(torch.randn(5), 1.0)
    assert not decay.any() and not k.any()


def test_hgrn2_gates_take_a_bound_per_component_and_go_into_linear_attention(dtype):
    f = torch.randn(1, 9, 2, 4).to(dtype)
    decay, k = features.hgrn2_gates(f, torch.tensor([0.0, 0.1, 0.5, 1.0]))
    assert decay.dtype == torch.float32 and k.dtype == dtype
    assert linear_attention(f, k, f, decay=decay).isfinite().all()


def test_bounded_linear_attention():
    q, k, v = (torch.rand(2, 50, 3, 8, dtype=torch.float64) for _ in range(3))
    tau = torch.rand(3, dtype=torch.float64)
    A = torch.einsum("bihk,bjhk->bhij", q, k)
    for bound in (1e-3, 100.0, 1e4):
        normaliser = A.sum(-1, keepdim=True).clamp(min=bound)
        expected = torch.einsum("bhij,bjhv->bihv", A / normaliser, v) * tau[:, None]
        torch.testing.assert_close(features.bounded_linear_attention(q, k, v, tau, bound), expected)
    zero = features.bounded_linear_attention(0 * q, k, v, 8**-0.5)
    assert not zero.any()


@pytest.mark.parametrize("heads", [1, 2, 8, 16, 32])
def test_slopes_of_a_power_of_two(heads):
    expected = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)])
    torch.testing.assert_close(features.alibi_slopes(heads), expected)
    torch.testing.assert_close(features.plain_slopes(heads), expected)


def test_slopes_between_powers_of_two():
    eight = [2.0**-i for i in range(1, 9)]
    torch.testing.assert_close(features.alibi_slopes(12), torch.tensor([*eight, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]))
    torch.testing.assert_close(features.alibi_slopes(3), torch.tensor([2**-4, 2**-8, 2**-2]))
    torch.testing.assert_close(features.plain_slopes(3), torch.tensor([2 ** (-8 / 3), 2 ** (-16 / 3), 2**-8]))
    assert all(features.alibi_slopes(heads).shape == (heads,) for heads in range(1, 70))


def test_lightning_decay():
    slopes = features.alibi_slopes(8)
    torch.testing.assert_close(features.lightning_decay(8, 0, 24), -slopes * (1 + 1e-5))
    torch.testing.assert_close(features.lightning_decay(8, 23, 24), -slopes * 1e-5, rtol=1e-4, atol=0)
    torch.testing.assert_close(features.lightning_decay(8, 10, 21), -slopes * (0.5 + 1e-5))
    torch.testing.assert_close(features.lightning_decay(8, 0, 1), -slopes * (1 + 1e-5))


def test_retnet_decay():
    expected = torch.tensor([math.log(1 - 2.0 ** (-5 - h)) for h in range(16)])
    torch.testing.assert_close(features.retnet_decay(16), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: features.dpfp(x, 0), "nu: expected at least 1, got 0"),
        (lambda x: features.cosformer(x, torch.arange(7), 0), "longest: expected above 0, got 0"),
        (lambda x: features.cosformer(x, torch.arange(5), 9), r"positions: expected shape \[7\] or \[2, 7\], got shape \[5\]"),
        (lambda x: features.cosformer(x[0], torch.arange(7), 9), r"x: expected shape \[B, T, H, D\], got shape \[7, 3, 6\]"),
        (lambda x: features.lrpe(x, torch.ones(6), torch.arange(7)), r"theta: expected shape \[3, 6\], got shape \[6\]"),
        (lambda x: features.lrpe_theta(0, 4), "heads: expected at least 1, got 0"),
        (lambda x: features.lrpe_theta(4, -1), "dim: expected at least 1, got -1"),
        (lambda x: features.hgrn2_gates(x, 1.5), "lower_bound: expected from 0 to 1, got 1.5"),
        (lambda x: features.hgrn2_gates(x, math.nan), "lower_bound: expected from 0 to 1, got nan"),
        (lambda x: features.bounded_linear_attention(x, x, x, torch.ones(2)), r"tau: expected a number or shape \[3\], got shape \[2\]"),
        (lambda x: features.bounded_linear_attention(x, x[:1], x, 1.0), r"got shapes \[2, 7, 3, 6\], \[1, 7, 3, 6\] and"),
        (lambda x: features.bounded_linear_attention(x, x, x, 1.0, 0.0), "bound: expected above 0, got 0.0"),
        (lambda x: features.alibi_slopes(0), "heads: expected at least 1, got 0"),
        (lambda x: features.plain_slopes(-1), "heads: expected at least 1, got -1"),
        (lambda x: features.retnet_decay(0), "heads: expected at least 1, got 0"),
        (lambda x: features.lightning_decay(8, 24, 24), "layer: expected from 0 to 23, for 24 layers, got 24"),
    ],
)  # fmt: skip
def test_errors(call, message, x):
    with pytest.raises(ValueError, match=message):
        call(x)
