"""expert_linear on CPUs: every instruction set against the float64 definition, laws, errors, torch.compile."""

import pytest
import torch
from harness import assert_close, short

from hasten.kernels import backend, storage
from hasten.kernels.expert_linear import expert_linear, reference

# T, P, E, N, K
SIZES = [
    (1, 1, 1, 1, 1),
    (1, 4, 6, 37, 53),
    (2, 3, 4, 129, 1000),
    (3, 2, 40, 31, 4),
    (5, 16, 7, 2049, 7),
    (8, 2, 3, 300, 257),
    (8, 8, 2, 33, 70),
    (1, 2, 3, 33000, 9),
]
LAYOUTS = {"row-major": torch.Tensor.contiguous, "column-major": storage.to_column_major}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def inputs(T, P, E, N, K, dtype=torch.float32, layout=torch.Tensor.contiguous, per_pick=False):
    """x, weight, ids with some outside [0, E), bias."""
    x = torch.randn(T, P, K, dtype=dtype) if per_pick else torch.randn(T, K, dtype=dtype)
    ids = torch.randint(-1, E + 1, (T, P))
    ids[0, 0] = E - 1
    return x, layout(torch.randn(E, N, K, dtype=dtype)), ids, torch.randn(E, N, dtype=dtype)


def cutoffs(E, K):
    cutoff = torch.rand(E, K)
    cutoff[:, 0] = -1  # at least one column is active
    return cutoff


def double(x, weight, ids, bias, cutoff=None):
    return reference.expert_linear(x.double(), weight.double(), ids, bias=bias.double(), cutoff=cutoff)


def test_the_definition_is_one_linear_layer_per_pick():
    x, weight, ids, bias = inputs(3, 4, 5, 7, 6, torch.float64)
    cutoff = torch.rand(5, 6)
    dense = reference.expert_linear(x, weight, ids, bias=bias)
    sparse = reference.expert_linear(x, weight, ids, bias=bias, cutoff=cutoff)
    for t in range(3):
        for p in range(4):
            e = int(ids[t, p])
            if not 0 <= e < 5:
                assert not dense[t, p].any() and not sparse[t, p].any()
                continue
            tokens = x[(ids == e).any(1)]
            active = (tokens.abs() > cutoff[e]).any(0)
            torch.testing.assert_close(dense[t, p], weight[e] @ x[t] + bias[e])
            torch.testing.assert_close(sparse[t, p], weight[e] @ (x[t] * active) + bias[e])


@pytest.mark.parametrize("per_pick", [False, True], ids=["token", "pick"])
@pytest.mark.parametrize("size", SIZES, ids=short)
def test_is_the_reference(isa, dtype, size, layout, per_pick, poisoned):
    x, weight, ids, bias = inputs(*size, dtype, layout, per_pick)
    assert_close(expert_linear(x, weight, ids, bias=bias), double(x, weight, ids, bias))


@pytest.mark.parametrize("size", SIZES, ids=short)
def test_with_a_cutoff_it_is_the_reference(isa, dtype, size, poisoned):
    x, weight, ids, bias = inputs(*size, dtype, storage.to_column_major)
    cutoff = cutoffs(size[2], size[4])
    assert_close(expert_linear(x, weight, ids, bias=bias, cutoff=cutoff), double(x, weight, ids, bias, cutoff))


def test_without_a_bias(isa, layout):
    x, weight, ids, bias = inputs(3, 2, 4, 65, 70, layout=layout)
    expected = expert_linear(x, weight, ids, bias=torch.zeros_like(bias))
    assert torch.equal(expert_linear(x, weight, ids), expected)


def test_ids_of_no_expert_give_zeros(isa, layout, poisoned):
    x, weight, _, bias = inputs(2, 3, 4, 65, 70, layout=layout)
    x[1] = torch.nan
    ids = torch.tensor([[4, 0, -1], [1 << 40, -(1 << 40), 5]])
    y = expert_linear(x, weight, ids, bias=bias)
    assert y[0, 1].all() and not y[0, [0, 2]].any() and not y[1].any()
    assert not expert_linear(x, weight, torch.full((2, 3), -1), bias=bias).any()


def test_experts_that_nobody_picked_are_not_read(isa, layout):
    x, weight, _, bias = inputs(2, 2, 6, 65, 70, layout=layout)
    ids = torch.tensor([[1, 4], [4, 2]])
    expected = expert_linear(x, weight, ids, bias=bias)
    weight[[0, 3, 5]] = torch.nan
    bias[[0, 3, 5]] = torch.nan
    assert torch.equal(expert_linear(x, weight, ids, bias=bias), expected)


def test_a_row_does_not_depend_on_its_neighbours(isa, dtype):
    x, weight, ids, bias = inputs(8, 3, 4, 65, 70, dtype)
    together = expert_linear(x, weight, ids, bias=bias)
    for t in range(8):
        assert torch.equal(together[t : t + 1], expert_linear(x[t : t + 1], weight, ids[t : t + 1], bias=bias))


def test_what_is_skipped_is_not_read(isa, dtype):
    x, weight, ids, bias = inputs(1, 3, 5, 129, 515, dtype, storage.to_column_major)
    ids[:] = torch.tensor([3, 0, 4])
    cutoff = cutoffs(5, 515)
    expected = expert_linear(x, weight, ids, bias=bias, cutoff=cutoff)
    weight[(x[0].float().abs() <= cutoff)[:, None].expand(5, 129, 515)] = torch.nan
    assert torch.equal(expert_linear(x, weight, ids, bias=bias, cutoff=cutoff), expected)


def test_rows_of_one_expert_share_the_union_of_their_columns(isa, dtype):
    x, weight, _, bias = inputs(4, 2, 3, 129, 515, dtype, storage.to_column_major)
    ids, cutoff = torch.tensor([[0, 1], [1, 2], [2, 1], [0, 2]]), cutoffs(3, 515)
    together = expert_linear(x, weight, ids, bias=bias, cutoff=cutoff)
    for e in range(3):
        union = (x[(ids == e).any(1)].abs() > cutoff[e]).any(0)
        cutoff[e] = torch.where(union, -1.0, torch.inf)
    for t in range(4):
        alone = expert_linear(x[t : t + 1], weight, ids[t : t + 1], bias=bias, cutoff=cutoff)
        assert_close(together[t : t + 1], alone.double())


def test_more_rows_on_one_expert_than_one_pass_takes(isa, dtype, layout):
    x, weight, ids, bias = inputs(5, 5, 3, 65, 70, dtype, layout, per_pick=True)
    ids[:] = 1
    ids[2, 2] = 0
    assert_close(expert_linear(x, weight, ids, bias=bias), double(x, weight, ids, bias))
    weight, cutoff = storage.to_column_major(weight), cutoffs(3, 70) * 3
    assert_close(expert_linear(x, weight, ids, bias=bias, cutoff=cutoff), double(x, weight, ids, bias, cutoff))


def test_nothing_active_leaves_the_bias(isa, dtype, poisoned):
    x, weight, ids, bias = inputs(2, 2, 3, 129, 515, dtype, storage.to_column_major)
    ids[:] = torch.tensor([[0, 2], [2, 1]])
    never = torch.full((3, 515), torch.inf)
    assert torch.equal(expert_linear(x, weight, ids, bias=bias, cutoff=never), bias[ids])
    assert not expert_linear(x, weight, ids, cutoff=never).any()


def test_the_cutoff_itself_is_inactive_and_a_nan_is_active(isa, dtype):
    x = torch.tensor([[0.5, -0.5, 0.25, 1.0]], dtype=dtype)
    weight = storage.to_column_major(torch.tensor([[[1.0, 2.0, 4.0, 8.0]]], dtype=dtype))
    cutoff, ids = torch.tensor([[0.5, 0.5, 0.0, torch.inf]]), torch.zeros(1, 1, dtype=torch.int64)
    assert expert_linear(x, weight, ids, cutoff=cutoff).item() == 1.0
    x[0, 3] = torch.nan
    assert expert_linear(x, weight, ids, cutoff=cutoff).isnan().all()


@pytest.mark.parametrize("T", [1, 8])
def test_bits_do_not_depend_on_threads_or_calls(isa, dtype, T, layout, threads):
    x, weight, ids, bias = inputs(T, 3, 4, 999, 515, dtype, layout)
    torch.set_num_threads(1)
    first = expert_linear(x, weight, ids, bias=bias)
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(expert_linear(x, weight, ids, bias=bias), first)


def test_strides(isa):
    x, weight, ids, bias = inputs(6, 2, 5, 40, 30, layout=storage.to_column_major)
    cutoff = cutoffs(5, 30)
    expected = expert_linear(x, weight, ids, bias=bias, cutoff=cutoff)
    strided = [tensor.t().contiguous().t() for tensor in (x, ids, bias, cutoff)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    x, ids, bias, cutoff = strided
    assert torch.equal(expert_linear(x, weight, ids, bias=bias, cutoff=cutoff), expected)
    per_pick = x[:, None].expand(6, 2, 30)
    assert torch.equal(expert_linear(per_pick, weight, ids, bias=bias, cutoff=cutoff), expected)


@pytest.mark.parametrize("size", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0)])
def test_empty(size):
    T, P, E, N, K = size
    x, weight, ids = torch.randn(T, K), torch.randn(E, N, K), torch.zeros(T, P, dtype=torch.int64)
    y = expert_linear(x, weight, ids)
    assert y.shape == (T, P, N) and not y.any()


def test_more_tokens_than_the_kernel_takes_and_float64_are_the_reference():
    for x, weight, ids, bias in (inputs(storage.MAX_BATCH + 1, 2, 3, 40, 30), inputs(2, 2, 3, 40, 30, torch.float64)):
        expected = reference.expert_linear(x, weight, ids, bias=bias)
        assert torch.equal(expert_linear(x, weight, ids, bias=bias), expected)


def test_gradients():
    x, weight, ids, bias = inputs(3, 2, 4, 4, 3, torch.float64, storage.to_column_major)
    cutoff = torch.rand(4, 3)

    def call(x, weight, bias):
        return expert_linear(x, weight, ids, bias=bias, cutoff=cutoff)

    with backend.use("reference"):
        assert torch.autograd.gradcheck(call, [a.requires_grad_() for a in (x, weight, bias)])


def test_column_major_experts():
    weight = torch.randn(3, 40, 30)
    columns = storage.to_column_major(weight)
    assert torch.equal(columns, weight) and columns.data_ptr() != weight.data_ptr()
    assert storage.is_column_major(columns) and not storage.is_row_major(columns)
    assert storage.is_row_major(weight) and not storage.is_column_major(weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: {"weight": a["weight"][0]}, ValueError, r"weight: expected shape \[E, N, K\], got shape \[40, 30\]"),
        (lambda a: {"weight": a["weight"].half()}, TypeError, "weight: expected torch.float32.* got torch.float16"),
        (lambda a: {"weight": a["weight"].contiguous()}, ValueError, "weight: expected column-major"),
        (
            lambda a: {"weight": torch.zeros(3, 30, 80).mT[:, ::2], "cutoff": None},
            ValueError,
            "weight: expected row-major or column-major experts, got strides",
        ),
        (lambda a: {"ids": a["ids"][0]}, ValueError, r"ids: expected shape \[T, P\], got shape \[2\]"),
        (lambda a: {"ids": a["ids"].int()}, TypeError, "ids: expected torch.int64, got torch.int32"),
        (lambda a: {"ids": a["ids"].to("meta")}, ValueError, "ids: expected on cpu.* got meta"),
        (lambda a: {"ids": a["ids"][1:]}, ValueError, r"x: expected shape \[1, 30\] or \[1, 2, 30\], got shape \[2, 30\]"),
        (lambda a: {"x": a["x"][:, 1:]}, ValueError, r"x: expected shape \[2, 30\] or \[2, 2, 30\], got shape \[2, 29\]"),
        (lambda a: {"x": a["x"].long()}, TypeError, "x: expected a floating dtype of at least 16 bits, got torch.int64"),
        (lambda a: {"bias": a["bias"][1:]}, ValueError, r"bias: expected shape \[3, 40\], got shape \[2, 40\]"),
        (lambda a: {"bias": a["bias"].double()}, TypeError, "bias: expected torch.float32"),
        (lambda a: {"cutoff": a["cutoff"][:, 1:]}, ValueError, r"cutoff: expected shape \[3, 30\], got shape \[3, 29\]"),
        (lambda a: {"cutoff": a["cutoff"].double()}, TypeError, "cutoff: expected torch.float32, got torch.float64"),
    ],
)  # fmt: skip
def test_errors(change, error, message):
    x, weight, ids, bias = inputs(2, 2, 3, 40, 30, layout=storage.to_column_major)
    arguments = {"x": x, "weight": weight, "ids": ids, "bias": bias, "cutoff": cutoffs(3, 30)}
    with pytest.raises(error, match=message):
        expert_linear(**arguments | change(arguments))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles(compiler, can_compile):
    x, weight, ids, bias = inputs(2, 2, 3, 40, 30)
    compiled = torch.compile(lambda *args: expert_linear(*args, bias=bias).relu(), fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(x, weight, ids), expert_linear(x, weight, ids, bias=bias).relu())


@pytest.mark.parametrize("with_cutoff", [False, True], ids=["dense", "cutoff"])
def test_is_a_well_made_torch_operator(with_cutoff):
    x, weight, ids, bias = inputs(2, 2, 3, 40, 30, layout=storage.to_column_major)
    settings = {"bias": bias, "cutoff": cutoffs(3, 30) if with_cutoff else None}
    torch.library.opcheck(torch.ops.hasten.expert_linear.default, (x, weight, ids), settings)
