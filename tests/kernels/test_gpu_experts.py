"""expert_linear in Triton, run: on a GPU (`pytest -m gpu`), or by Triton's interpreter (test_triton_interpreted.py)."""

import pytest
import torch
from harness import DEVICE, INTERPRETED, TOLERANCES, TRITON_RUNS, assert_close, on_gpu, poisoned, short

pytest.importorskip("triton")
pytestmark = TRITON_RUNS

from hasten.kernels import backend, storage  # noqa: E402 (after the skips)
from hasten.kernels.expert_linear import expert_linear, reference, triton  # noqa: E402

# T, P, E, N, K
SIZES = [(1, 1, 1, 1, 1), (1, 6, 9, 5, 130), (2, 3, 4, 33, 37), (3, 2, 5, 9, 300), (8, 2, 3, 11, 70)]
GPU_SIZES = [(1, 2, 8, 28672, 4096), (1, 8, 128, 1536, 2048), (4, 8, 128, 2048, 768), (7, 4, 32, 2880, 2881)]
FORMS = ["rows", "columns", "cutoff"]
each_form = pytest.mark.parametrize("form", FORMS)


def make(form, T, P, E, N, K, dtype=torch.float32, bias=True, per_pick=False):
    """Arguments of the launcher; about half of the columns active for one row of x, some ids of no expert."""
    torch.manual_seed(T * 1000003 + N * 1009 + K)
    x = torch.randn(T, P, K) if per_pick else torch.randn(T, K)
    weight = torch.randn(E, N, K, dtype=dtype, device=DEVICE)
    ids = torch.stack([torch.randperm(E + 2)[:P] - 1 for _ in range(T)])  # different in a row
    ids[0] = (ids[0] - ids[0, 0]) % (E + 2)  # one of them at least is an expert's
    return {
        "x": x.to(DEVICE, dtype),
        "weight": weight if form == "rows" else storage.to_column_major(weight),
        "ids": ids.to(DEVICE),
        "bias": torch.randn(E, N, dtype=dtype, device=DEVICE) if bias else None,
        "cutoff": torch.rand(E, K, device=DEVICE) * 1.4 if form == "cutoff" else None,
        "column_major": form != "rows",
    }


def launch(arguments):
    """The launcher's result, where all that was allocated was full of NaN before."""
    with poisoned():
        y = triton.launch(**arguments)
    assert y.dtype == arguments["x"].dtype
    return y


def expect(arguments):
    """The reference in float64 (the cutoff as it is)."""
    bias = arguments["bias"]
    return reference.expert_linear(
        arguments["x"].double(),
        arguments["weight"].double(),
        arguments["ids"],
        bias=None if bias is None else bias.double(),
        cutoff=arguments["cutoff"],
    )


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch):
    """The interpreter runs one program after the other: few of them."""
    if INTERPRETED:
        monkeypatch.setattr(triton, "multiprocessors", lambda device: 4)


@pytest.mark.parametrize(
    ("dtype", "multiprocessors"),
    [(torch.float32, 1), (torch.float32, 4), (torch.float16, 4), (torch.bfloat16, 1)],
    ids=short,
)
@pytest.mark.parametrize("size", SIZES, ids=short)
@each_form
def test_matches_reference(form, size, dtype, multiprocessors, monkeypatch):
    """With every tile that the launcher can pick, and splits."""
    monkeypatch.setattr(triton, "multiprocessors", lambda device: multiprocessors)
    arguments = make(form, *size, dtype)
    assert_close(launch(arguments), expect(arguments))


@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=short)
@pytest.mark.parametrize("size", GPU_SIZES, ids=short)
@each_form
def test_matches_reference_at_full_size(form, size, dtype):
    arguments = make(form, *size, dtype)
    assert_close(launch(arguments), expect(arguments))


@pytest.mark.parametrize("tokens", range(1, 9))
@each_form
def test_every_batch_with_a_row_per_pick_and_no_bias(form, tokens):
    arguments = make(form, tokens, 2, 3, 9, 70, bias=False, per_pick=True)
    assert_close(launch(arguments), expect(arguments))


@pytest.mark.parametrize("form", ["rows", "columns"])
def test_more_pairs_of_one_expert_than_one_program_takes(form):
    arguments = make(form, 2, 4, 5, 19, 70, per_pick=True, bias=False)
    arguments["ids"].fill_(1)
    assert_close(launch(arguments), expect(arguments))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=short)
@each_form
def test_same_bits_every_time(form, dtype):
    arguments = make(form, 3, 2, 4, 9, 130, dtype)
    first = launch(arguments)
    assert all(torch.equal(launch(arguments), first) for _ in range(2 if INTERPRETED else 50))


@each_form
def test_what_nobody_picked_or_is_skipped_is_not_read(form):
    arguments = make(form, 2, 2, 6, 17, 200)
    arguments["ids"] = torch.tensor([[1, 4], [2, 1 << 40]], device=DEVICE)
    expected = launch(arguments)
    arguments["weight"][[0, 3, 5]] = torch.nan
    if form == "cutoff":
        for token, e in ((0, 1), (0, 4), (1, 2)):
            inactive = arguments["x"][token].abs() <= arguments["cutoff"][e]
            assert 50 < inactive.sum() < 150
            arguments["weight"][e][:, inactive] = torch.nan
    assert torch.equal(launch(arguments), expected)
    assert not expected[1, 1].any()


def test_rows_of_one_expert_take_the_union_of_their_columns():
    x = torch.tensor([[1.0, 0.1, 0.1, torch.inf], [0.1, 2.0, 0.1, 1.0]], device=DEVICE)
    weight = torch.tensor([[[1.0, 10.0, 100.0, 1000.0]]] * 2, device=DEVICE)
    y = launch(
        {
            "x": x,
            "weight": storage.to_column_major(weight),
            "ids": torch.tensor([[0, 1], [0, -1]], device=DEVICE),
            "bias": None,
            "cutoff": torch.tensor([[0.5, 0.5, 0.5, torch.inf]] * 2, device=DEVICE),
            "column_major": True,
        }
    )
    torch.testing.assert_close(y, torch.tensor([[[2.0], [1.0]], [[20.1], [0.0]]], device=DEVICE))


@each_form
def test_public_operator(form):
    arguments = make(form, 3, 2, 5, 33, 70, torch.float16)
    with backend.use("triton"):
        y = expert_linear(**{name: value for name, value in arguments.items() if name != "column_major"})
    assert torch.equal(y, launch(arguments))


@on_gpu
@each_form
def test_cuda_graph(form):
    arguments = make(form, 4, 2, 8, 1000, 1040, torch.bfloat16)
    launch(arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = triton.launch(**arguments)
    for _ in range(3):
        arguments["x"].copy_(torch.randn_like(arguments["x"]))
        arguments["ids"].copy_(torch.rand(4, 8, device=DEVICE).topk(2).indices)
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, launch(arguments))
