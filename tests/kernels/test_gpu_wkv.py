"""The Triton kernel of wkv, run: on a GPU (`pytest -m gpu`), or by Triton's interpreter (test_triton_interpreted.py).

Against the definition in float64, outputs poisoned by NaN before the call.
"""

import pytest
import torch
from harness import DEVICE, INTERPRETED, TOLERANCES, TRITON_RUNS, assert_close, on_gpu, poisoned, short
from wkv_cases import LAYOUTS, definition, inputs, run, some_state

pytest.importorskip("triton")
pytestmark = TRITON_RUNS

from hasten.kernels import backend  # noqa: E402 (after the skips)


def here(tensors):
    return [x.to(DEVICE) for x in tensors]


def poisoned_run(*arguments):
    """The result of Triton's kernel, where all that was allocated was full of NaN before."""
    with poisoned(), backend.use("triton"):
        return run(*arguments)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=short)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("T", "D"), [(1, 33), (9, 70)] + ([] if INTERPRETED else [(1000, 4096)]))
def test_is_the_definition(T, D, layout, dtype):
    tensors, state = here(inputs(T, D, dtype)), here(some_state(D))
    laid = [*tensors[:2], *map(LAYOUTS[layout], tensors[2:])]
    for before in (None, state):
        for found, expected in zip(poisoned_run(laid, before), definition(tensors, before), strict=True):
            assert_close(found, expected)


def test_large_exponents():
    time_decay, time_first, key, value = here(inputs(20))
    tensors = [time_decay + 3, time_first, 1e4 * key, value]
    assert_close(poisoned_run(tensors)[0], definition(tensors)[0], 1e-4)


def test_split_and_carry():
    time_decay, time_first, key, value = here(inputs(20))
    whole, state, pieces = poisoned_run([time_decay, time_first, key, value]), None, []
    for k, v in zip(key.split([1, 12, 7], 1), value.split([1, 12, 7], 1), strict=True):
        y, *state = poisoned_run([time_decay, time_first, k, v], state)
        pieces.append(y)
    for found, expected in zip((torch.cat(pieces, 1), *state), whole, strict=True):
        assert torch.equal(found, expected)


def test_a_nan_stays_at_and_after_its_token():
    for i in (2, 3):
        tensors = here(inputs(9))
        clean = poisoned_run(tensors)[0]
        tensors[i][0, 4, 5] = torch.nan
        y = poisoned_run(tensors)[0]
        assert y[0, 4:, 5].isnan().all()
        y[0, 4:, 5] = clean[0, 4:, 5]
        assert torch.equal(y, clean)


@on_gpu
def test_cuda_graph():
    tensors, state = here(inputs(1, 300)), here(some_state(300))
    run(tensors, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(tensors, state)
    for _ in range(3):
        tensors[2].copy_(torch.randn_like(tensors[2]))
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(found, run(tensors, state), strict=True))
