"""token_scores and gather_tokens in Triton, run: on a GPU (`pytest -m gpu`), or by Triton's interpreter
(test_triton_interpreted.py)."""

import pytest
import torch
from harness import DEVICE, INTERPRETED, TOLERANCES, TRITON_RUNS, assert_close, on_gpu, poisoned, short

pytest.importorskip("triton")
pytestmark = TRITON_RUNS

from hasten.kernels import backend  # noqa: E402 (after the skips)
from hasten.kernels.token_scores import gather_tokens, reference, token_scores, triton  # noqa: E402

# B, Q, H, G, T, D
SIZES = [(1, 1, 1, 1, 1, 1), (2, 1, 4, 4, 70, 64), (1, 1, 7, 1, 300, 72), (2, 3, 4, 2, 129, 20), (1, 2, 2, 2, 37, 128)]
GPU_SIZES = [(1, 1, 32, 32, 3001, 128), (4, 1, 28, 4, 5000, 128), (2, 33, 16, 16, 700, 80), (1, 40, 32, 4, 2881, 64)]
MASKS = {
    "none": lambda B, Q, T: None,
    "of keys": lambda B, Q, T: torch.rand(B, T) > 0.3,
    "of queries": lambda B, Q, T: torch.rand(B, Q, T) > 0.6,
}
each_mask = pytest.mark.parametrize("mask", MASKS)


def make(B, Q, H, G, T, D, dtype=torch.float32, mask="none"):
    """query, key as a view of a longer cache, mask."""
    torch.manual_seed(B * 1000003 + Q * 1009 + T * 11 + D)
    query, cache = torch.randn(B, Q, H, D), torch.randn(B, G, T + 5, D)
    allowed = MASKS[mask](B, Q, T)
    key = cache.to(DEVICE, dtype)[:, :, 3 : T + 3]
    return query.to(DEVICE, dtype), key, None if allowed is None else allowed.to(DEVICE)


def run(query, key, mask, **settings):
    """The operator's result, where all that was allocated was full of NaN before."""
    with backend.use("triton"), poisoned():
        scores = token_scores(query, key, mask, **settings)
    assert scores.dtype == torch.float32
    return scores


def expect(query, key, mask, scale=None, softcap=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return reference.token_scores(query.double(), key.double(), mask, scale, softcap)


def multiplies(dtype, Q, H, G):
    """Whether the interpreter can: its tl.dot of bf16 is wrong in Triton 3.9."""
    return not (INTERPRETED and dtype == torch.bfloat16 and Q * H // G > triton.VECTOR_ROWS)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=short)
@pytest.mark.parametrize("size", SIZES, ids=short)
@each_mask
def test_matches_reference(mask, size, dtype):
    if not multiplies(dtype, *size[1:4]):
        pytest.skip("the interpreter cannot multiply bf16")
    arguments = make(*size, dtype, mask)
    assert_close(run(*arguments), expect(*arguments))


@pytest.mark.parametrize("softcap", [1e-3, 0.3, 50.0, 1e9])
@pytest.mark.parametrize("queries", [1, 3])
def test_softcaps(queries, softcap):
    arguments = make(2, queries, 4, 2, 130, 40, mask="of queries")
    for scale in (1e-4, 0.2, 30.0, 1e30):
        settings = {"scale": scale, "softcap": softcap}
        assert_close(run(*arguments, **settings), expect(*arguments, **settings))


@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=short)
@pytest.mark.parametrize("size", GPU_SIZES, ids=short)
@each_mask
def test_matches_reference_at_full_size(mask, size, dtype):
    arguments = make(*size, dtype, mask)
    assert_close(run(*arguments), expect(*arguments))


@pytest.mark.parametrize("queries", [1, 3, 20])
def test_more_rows_than_one_program_takes_and_more_blocks_than_one_step(queries, monkeypatch):
    monkeypatch.setattr(triton, "MEAN_TILE", {"BR": 2, "BT": 16, "BS": 2})
    arguments = make(1, queries, 2, 1, 90, 64, mask="of queries")
    assert_close(run(*arguments), expect(*arguments))


def test_queries_and_rows_without_an_allowed_key():
    query, key, _ = make(3, 2, 4, 2, 50, 16)
    mask = torch.rand(3, 2, 50, device=DEVICE) > 0.5
    mask[0, 0], mask[1] = False, False
    scores = run(query, key, mask)
    assert_close(scores, expect(query, key, mask))
    assert not scores[1].any()
    torch.testing.assert_close(scores.sum(1), torch.tensor([1.0, 0.0, 1.0], device=DEVICE))


def test_what_is_masked_may_be_nan():
    query, key, mask = make(2, 1, 4, 2, 90, 16, mask="of keys")
    expected = run(query, key, mask)
    key.masked_fill_(~mask[:, None, :, None], torch.nan)
    assert torch.equal(run(query, key, mask), expected)


def test_huge_logits():
    query, key, _ = make(1, 1, 2, 2, 40, 8)
    arguments = query * 1e15, key * 1e15, None
    assert_close(run(*arguments, scale=1.0), expect(*arguments, scale=1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
def test_same_bits_every_time(dtype):
    arguments = make(2, 3, 4, 2, 200, 64, dtype, "of queries")
    first = run(*arguments)
    assert all(torch.equal(run(*arguments), first) for _ in range(2 if INTERPRETED else 50))


ROWS = {  # what follows [B or 1, T], and the dtype
    "hidden states": ((2, 19, 1300), torch.float16),
    "a table for all rows": ((1, 19, 6), torch.float32),
    "positions": ((2, 19), torch.int64),
    "flags": ((2, 19, 3), torch.bool),
    "odd halves": ((2, 19, 5), torch.bfloat16),
    "heads": ((2, 19, 3, 4), torch.float32),
}


def rows_of(shape, dtype):
    return (torch.randn(shape) * 100).to(dtype).to(DEVICE)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_gathers_what_the_reference_gathers(count):
    tensors = [rows_of(*kind) for kind in list(ROWS.values())[:count]]
    columns = torch.tensor([[18, 0, 3, 3, 7], [1, 2, 3, 4, 5]], device=DEVICE)
    with backend.use("triton"), poisoned():
        found = gather_tokens(tensors, columns)
    for ours, theirs in zip(found, reference.gather_tokens(tensors, columns), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs) and ours.is_contiguous()


def test_gathers_from_views():
    wide = rows_of((2, 40, 12), torch.float16)
    tensors = [wide[:, 1:20], wide[:, ::2, 1:8], wide[:, :19].mT.contiguous().mT, wide.expand(2, 40, 12)[:, 5:, :3]]
    tensors = [x[:, :19] for x in tensors]
    columns = torch.tensor([[3, 9], [18, 0]], device=DEVICE)
    with backend.use("triton"):
        found = gather_tokens(tensors, columns)
    for ours, theirs in zip(found, reference.gather_tokens(tensors, columns), strict=True):
        assert torch.equal(ours, theirs)


def test_gathers_nothing():
    with backend.use("triton"):
        hidden, empty = gather_tokens(
            [rows_of((2, 5, 4), torch.float32), rows_of((2, 5, 0), torch.float32)],
            torch.zeros(2, 0, dtype=torch.int64, device=DEVICE),
        )
    assert hidden.shape == (2, 0, 4) and empty.shape == (2, 0, 0)


def test_columns_outside_give_zeros():
    x = rows_of((1, 5, 4), torch.float32)
    y = triton.gather_tokens([x], torch.tensor([[2, 5, -1, 1 << 40]], device=DEVICE))[0]
    assert torch.equal(y[0, 0], x[0, 2]) and not y[0, 1:].any()


@on_gpu
def test_cuda_graph():
    query, key, mask = make(1, 1, 28, 4, 1000, 128, torch.bfloat16, "of keys")
    hidden = rows_of((1, 1000, 512), torch.bfloat16)

    def select():
        scores = token_scores(query, key, mask)
        return scores, gather_tokens([hidden], scores.topk(100).indices)[0]

    select()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = select()
    for _ in range(3):
        query.copy_(torch.randn_like(query))
        graph.replay()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, select(), strict=True))


@on_gpu
def test_no_compilation_per_length(monkeypatch):
    from triton import knobs

    def launch(T):
        query, key, mask = make(1, 1, 8, 8, T, 64, torch.bfloat16, "of keys")
        scores = token_scores(query, key.contiguous(), mask)
        gather_tokens([key[:, 0].contiguous()], scores.topk(T // 2).indices)

    launch(64)
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **said: compiled.append(said["repr"]))  # None: go on
    for T in (63, 65, 1000, 1024):
        launch(T)
    assert not compiled
