"""The Triton kernels, run: on a GPU (`pytest -m gpu`), or by Triton's interpreter (test_triton_interpreted.py).

Every launcher against the reference in float64, outputs and workspace poisoned by NaN before the call; then the laws.
"""

import pytest
import torch
from harness import DEVICE, INTERPRETED, TOLERANCES, TRITON_RUNS, assert_close, on_gpu, poisoned, short

pytest.importorskip("triton")
pytestmark = TRITON_RUNS

from hasten.kernels import backend, storage  # noqa: E402 (after the skips)
from hasten.kernels.column_sparse_linear import op as column_sparse_op  # noqa: E402
from hasten.kernels.column_sparse_linear import reference as column_sparse_reference  # noqa: E402
from hasten.kernels.column_sparse_linear import triton as column_sparse  # noqa: E402
from hasten.kernels.linear import op as linear_op  # noqa: E402
from hasten.kernels.linear import reference as linear_reference  # noqa: E402
from hasten.kernels.linear import triton as dense  # noqa: E402
from hasten.kernels.row_sparse_linear import op as row_sparse_op  # noqa: E402
from hasten.kernels.row_sparse_linear import reference as row_sparse_reference  # noqa: E402
from hasten.kernels.row_sparse_linear import triton as row_sparse  # noqa: E402

SIZES = [(1, 1, 1), (1, 257, 37), (1, 33, 130), (1, 64, 2100), (2, 257, 130), (3, 1, 1030), (8, 80, 160)]
GPU_SIZES = [(1, 4096, 4096), (1, 14336, 4096), (2, 4096, 14336), (4, 1024, 4096), (7, 4111, 4099), (8, 11008, 2048)]
OPERATORS = ["linear", "column_sparse_linear", "row_sparse_linear"]


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def make(operator, B, N, K, dtype, bias=True):
    """Arguments of the operator; about half of the columns or rows active for one row of x."""
    torch.manual_seed(B * 1000003 + N * 1009 + K)
    x, weight = draw(B, K, dtype=dtype), draw(N, K, dtype=dtype)
    bias = draw(N, dtype=dtype) if bias else None
    if operator == "linear":
        return [x, weight, bias]
    if operator == "column_sparse_linear":
        cutoff = torch.rand(K).to(DEVICE) * 1.4
        return [x, storage.to_column_major(weight), cutoff, bias]
    return [x, weight, draw(B, N, dtype=dtype), torch.tensor(0.67, device=DEVICE), bias]


def launch(operator, args):
    """The launcher's result, where all that was allocated was full of NaN before."""
    module = {"linear": dense, "column_sparse_linear": column_sparse, "row_sparse_linear": row_sparse}[operator]
    with poisoned():
        y = module.launch(*args)
    assert y.dtype == args[0].dtype
    return y


def expect(operator, args):
    """The reference in float64 (the thresholds as they are)."""
    double = [a.double() if a is not None and a.dtype == args[0].dtype else a for a in args]
    if operator == "linear":
        return linear_reference.linear(*double)
    if operator == "column_sparse_linear":
        return column_sparse_reference.column_sparse_linear(*double)
    return row_sparse_reference.row_sparse_linear(*double)


def public(operator):
    return {
        "linear": linear_op.linear,
        "column_sparse_linear": column_sparse_op.column_sparse_linear,
        "row_sparse_linear": row_sparse_op.row_sparse_linear,
    }[operator]


@pytest.mark.parametrize(
    ("dtype", "multiprocessors"),
    [(torch.float32, 1), (torch.float32, 132), (torch.float16, 132), (torch.bfloat16, 1)],
    ids=short,
)
@pytest.mark.parametrize("size", SIZES, ids=short)
@pytest.mark.parametrize("operator", OPERATORS)
def test_matches_reference(operator, size, dtype, multiprocessors, monkeypatch):
    """With every tile that config can pick, and splits, on small sizes too."""
    for module in (dense, column_sparse, row_sparse):
        monkeypatch.setattr(module, "multiprocessors", lambda device: multiprocessors)
    args = make(operator, *size, dtype)
    assert_close(launch(operator, args), expect(operator, args))


@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=short)
@pytest.mark.parametrize("size", GPU_SIZES, ids=short)
@pytest.mark.parametrize("operator", OPERATORS)
def test_matches_reference_at_full_size(operator, size, dtype):
    args = make(operator, *size, dtype)
    assert_close(launch(operator, args), expect(operator, args))


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_batch_without_bias(operator, rows):
    args = make(operator, rows, 19, 70, torch.float32, bias=False)
    assert_close(launch(operator, args), expect(operator, args))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=short)
@pytest.mark.parametrize("operator", OPERATORS)
def test_same_bits_every_time(operator, dtype):
    args = make(operator, 3, 65, 1030, dtype)
    first = launch(operator, args)
    assert all(torch.equal(launch(operator, args), first) for _ in range(2 if INTERPRETED else 50))


@pytest.mark.parametrize("operator", OPERATORS)
def test_view_with_unaligned_start(operator):
    args = make(operator, 2, 33, 130, torch.float16)
    x = torch.zeros(2 * 130 + 1, dtype=torch.float16, device=DEVICE)[1:].view(2, 130).copy_(args[0])
    assert torch.equal(launch(operator, [x, *args[1:]]), launch(operator, args))


@pytest.mark.parametrize("operator", OPERATORS)
def test_nan_reaches_its_row_and_no_other(operator):
    args = make(operator, 3, 33, 70, torch.float32)
    if operator == "column_sparse_linear":
        args[2].fill_(float("inf"))  # even where no number would be active
    if operator == "row_sparse_linear":
        args[3] = torch.tensor(-1.0, device=DEVICE)
    args[0][1, 5] = float("nan")
    y = launch(operator, args)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_column_sparse_without_cutoff_is_dense():
    x, weight, cutoff, bias = make("column_sparse_linear", 2, 65, 200, torch.float32)
    y = launch("column_sparse_linear", [x, weight, None, bias])
    assert torch.equal(y, launch("column_sparse_linear", [x, weight, torch.full_like(cutoff, -1.0), bias]))
    assert_close(y, linear_reference.linear(x.double(), weight.double(), bias.double()))


def test_column_sparse_reads_no_inactive_column():
    x, weight, cutoff, bias = make("column_sparse_linear", 1, 65, 200, torch.float32)
    inactive = x[0].abs() <= cutoff
    y = launch("column_sparse_linear", [x, weight, cutoff, bias])
    weight[:, inactive] = float("nan")
    assert 50 < inactive.sum() < 150
    assert torch.equal(launch("column_sparse_linear", [x, weight, cutoff, bias]), y)


def test_column_sparse_takes_the_union_of_rows():
    x = torch.tensor([[1.0, 0.1, 0.1, float("inf")], [0.1, 2.0, 0.1, 1.0]], device=DEVICE)
    cutoff = torch.tensor([0.5, 0.5, 0.5, float("inf")], device=DEVICE)
    weight = storage.to_column_major(torch.tensor([[1.0, 10.0, 100.0, 1000.0]], device=DEVICE))
    y = launch("column_sparse_linear", [x, weight, cutoff, None])
    torch.testing.assert_close(y, torch.tensor([[2.0], [20.1]], device=DEVICE))


def test_column_sparse_with_nothing_active_is_the_bias():
    x, weight, cutoff, bias = make("column_sparse_linear", 2, 65, 200, torch.float32)
    y = launch("column_sparse_linear", [x, weight, torch.full_like(cutoff, float("inf")), bias])
    assert torch.equal(y, bias.expand(2, -1))


def test_row_sparse_reads_no_inactive_row_and_writes_zero():
    x, weight, gate, threshold, bias = make("row_sparse_linear", 1, 65, 200, torch.float32)
    inactive = gate[0].abs() <= threshold
    y = launch("row_sparse_linear", [x, weight, gate, threshold, bias])
    weight[inactive], bias[inactive] = float("nan"), float("nan")
    assert 10 < inactive.sum() < 55
    assert torch.equal(launch("row_sparse_linear", [x, weight, gate, threshold, bias]), y)
    x[0, 3] = float("inf")
    assert (launch("row_sparse_linear", [x, weight, gate, threshold, bias])[0, inactive] == 0).all()


def test_row_sparse_takes_the_union_of_rows():
    x, weight = torch.ones(2, 3, device=DEVICE), torch.ones(3, 3, device=DEVICE)
    gate = torch.tensor([[1.0, 0.1, 0.2], [0.1, float("nan"), 0.3]], device=DEVICE)
    y = launch("row_sparse_linear", [x, weight, gate, torch.tensor(0.5, device=DEVICE), None])
    expected = torch.tensor([[3.0, 0.3, 0.0], [0.3, float("nan"), 0.0]], device=DEVICE)
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("operator", OPERATORS)
def test_public_operator(operator):
    x, weight, *rest = make(operator, 6, 33, 70, torch.float16)
    if operator == "row_sparse_linear":
        rest[0] = rest[0].view(2, 3, 33)
    with backend.use("triton"):
        y = public(operator)(x.view(2, 3, 70), weight, *rest)
    if operator == "row_sparse_linear":
        rest[0] = rest[0].view(6, 33)
    assert y.shape == (2, 3, 33)
    assert torch.equal(y.view(6, 33), launch(operator, [x, weight, *rest]))


@pytest.mark.parametrize("operator", OPERATORS)
def test_strided_vectors(operator):
    *args, bias = make(operator, 2, 33, 70, torch.float32)
    strided = [*args, torch.stack([bias, bias], 1)[:, 0]]
    if operator == "column_sparse_linear":
        strided[2] = torch.stack([args[2], args[2]], 1)[:, 0]
    with backend.use("triton"):
        assert torch.equal(public(operator)(*strided), launch(operator, [*args, bias]))


@on_gpu
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("operator", OPERATORS)
def test_cuda_graph(operator, rows):
    args = make(operator, rows, 1000, 1040, torch.bfloat16)
    launch(operator, args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = launch(operator, args)
    for _ in range(3):
        args[0].copy_(torch.randn_like(args[0]))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, launch(operator, args))


@on_gpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_compile(operator):
    args = make(operator, 1, 1000, 1040, torch.bfloat16)
    compiled = torch.compile(lambda *args: public(operator)(*args) * 2, fullgraph=True)
    assert torch.equal(compiled(*args), launch(operator, args) * 2)


@on_gpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_no_compilation_per_length(operator, monkeypatch):
    from triton import knobs

    launch(operator, make(operator, 1, 4096, 4096, torch.bfloat16))
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **said: compiled.append(said["repr"]))  # None: go on
    for N, K in ((4096, 4112), (8192, 2048), (14336, 4096)):
        launch(operator, make(operator, 1, N, K, torch.bfloat16))
    assert not compiled


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("operator", OPERATORS)
def test_device_that_is_not_the_current_one(operator):
    args = make(operator, 1, 64, 130, torch.float32)
    there = [a if a is None else a.to("cuda:1") for a in args]
    if operator == "column_sparse_linear":
        there[1] = storage.to_column_major(there[1])
    assert torch.equal(launch(operator, there).cpu(), launch(operator, args).cpu())
