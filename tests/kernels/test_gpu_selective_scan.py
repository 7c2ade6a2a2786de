"""The Triton kernels of the selective scan, run: on a GPU (`pytest -m gpu`), or by Triton's interpreter
(test_triton_interpreted.py).

Against the definition in float64, outputs poisoned by NaN before the call; then the laws.
"""

import pytest
import torch
from harness import DEVICE, INTERPRETED, TOLERANCES, TRITON_RUNS, assert_close, on_gpu, poisoned, short
from selective_scan_cases import LAYOUTS, OPTIONS, changed, definition, inputs, part, run, step

pytest.importorskip("triton")
pytestmark = TRITON_RUNS

from hasten.kernels import backend  # noqa: E402 (after the skips)
from hasten.kernels.recurrence.selective_scan import triton as scan  # noqa: E402

SIZES = [(1, 5, 1), (7, 70, 16), (5, 33, 8), (4, 9, 17), (3, 5, 129)]  # T, D, N
if not INTERPRETED:
    SIZES += [(1000, 5120, 16), (1, 8192, 16), (130, 100, 256)]


def here(arguments):
    return {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in arguments.items()}


def poisoned_run(function, *arguments, **settings):
    """The result of Triton's kernels, where all that was allocated was full of NaN before."""
    with poisoned(), backend.use("triton"):
        return function(*arguments, **settings)


@pytest.fixture
def cut(monkeypatch):
    """Cuts every sequence into chunks of a few tokens."""
    monkeypatch.setattr(scan, "SHORTEST_CHUNK", 3)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=short)
@pytest.mark.parametrize(("T", "D", "N"), SIZES)
def test_is_the_definition(T, D, N, dtype):
    arguments, state = here(inputs(T, D, N, dtype)), torch.randn(2, D, N, device=DEVICE)
    for found, expected in zip(poisoned_run(run, arguments, state), definition(arguments, state), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_layouts_and_optional_inputs(layout, options):
    arguments = here(inputs(4, 40, options=options))
    found = poisoned_run(run, changed(arguments, LAYOUTS[layout]))
    for x, y in zip(found, definition(arguments), strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("T", [3, 7, 9, 13])
def test_chunks_are_the_definition(T, cut):
    arguments, state = here(inputs(T, 40)), torch.randn(2, 40, 16, device=DEVICE)
    for begin in (None, state):
        for found, expected in zip(poisoned_run(run, arguments, begin), definition(arguments, begin), strict=True):
            assert_close(found, expected)


@pytest.mark.parametrize("T", [1, 3])
def test_step_is_the_definition(T):
    arguments, state = here(inputs(T, 40, dtype=torch.float16)), torch.randn(2, 40, 16, device=DEVICE)
    y, final = definition(arguments, state)
    for mine in (state.clone(), torch.stack([state, state], 1)[:, 0], state.mT.contiguous().mT):
        assert_close(poisoned_run(step, arguments, mine), y)
        assert_close(mine, final)


def test_extreme_decays(cut):
    for values in ([-50.0, 0.0], [-50.0, -0.01, -1e4], [-87.0, -88.0, -89.0]):
        arguments = here(inputs(9, 40, options="none"))
        arguments["A"] = torch.tensor(values)[torch.randint(len(values), (40, 16))].to(DEVICE)
        arguments["dt"] = torch.ones_like(arguments["dt"])
        state = 1e6 * torch.randn(2, 40, 16, device=DEVICE)
        for found, expected in zip(poisoned_run(run, arguments, state), definition(arguments, state), strict=True):
            assert_close(found, expected)


def test_split_and_carry(cut):
    arguments = here(inputs(20, 40))
    whole, final = poisoned_run(run, arguments)
    state, pieces = None, []
    for own in (slice(0, 1), slice(1, 12), slice(12, 20)):
        y, state = poisoned_run(run, part(arguments, own), state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_packed_sequences_are_separate(integers):
    bounds = [0, 1, 3, 13]
    arguments, states = here(inputs(13, 40, B=1)), torch.randn(3, 40, 16, device=DEVICE)
    packed, finals = poisoned_run(
        run, arguments, states, cu_seqlens=torch.tensor(bounds, dtype=integers, device=DEVICE)
    )
    for n in range(3):
        own = slice(bounds[n], bounds[n + 1])
        y, final = poisoned_run(run, part(arguments, own), states[n : n + 1])
        assert torch.equal(packed[:, own], y) and torch.equal(finals[n : n + 1], final)


@pytest.mark.parametrize("name", ["x", "dt", "z", "B", "C"])
def test_a_nan_stays_where_it_belongs(name, cut):
    arguments = here(inputs(9, 40))
    clean, clean_state = poisoned_run(run, arguments)
    arguments[name] = arguments[name].clone()
    arguments[name][0, 4, 5] = torch.nan
    y, state = poisoned_run(run, arguments)
    reached = torch.zeros(2, 9, 40, dtype=torch.bool, device=DEVICE)
    tokens = 4 if name in ("z", "C") else slice(4, None)
    reached[0, tokens, slice(None) if name in ("B", "C") else 5] = True
    assert torch.equal(y.isnan(), reached) and torch.equal(y[~reached], clean[~reached])
    if name in ("z", "C"):
        assert torch.equal(state, clean_state)


@on_gpu
def test_a_growing_state_is_nan_on_a_gpu():
    arguments = here(inputs(9, 40, options="none"))
    arguments["A"][5] = 0.5
    y, state = run(arguments)
    assert y[..., 5].isnan().all() and y[..., :5].isfinite().all() and state[:, 6:].isfinite().all()


@on_gpu
def test_cuda_graph():
    arguments = here(inputs(600, 300, dtype=torch.bfloat16, B=1))
    bounds, state = torch.tensor([0, 200, 600], device=DEVICE), torch.zeros(1, 300, 16, device=DEVICE)
    one = part(arguments, slice(0, 1))
    run(arguments), run(arguments, cu_seqlens=bounds), step(one, state.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, packed, last = run(arguments)[0], run(arguments, cu_seqlens=bounds)[0], step(one, state)
    for _ in range(3):
        arguments["x"].copy_(torch.randn_like(arguments["x"]))
        before = state.clone()
        graph.replay()
        assert torch.equal(y, run(arguments)[0]) and torch.equal(packed, run(arguments, cu_seqlens=bounds)[0])
        assert torch.equal(last, step(one, before)) and torch.equal(state, before)


@on_gpu
def test_no_compilation_per_length(monkeypatch):
    from triton import knobs

    run(here(inputs(2000, 256, dtype=torch.bfloat16, B=1)))
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **said: compiled.append(said["repr"]))  # None: go on
    for T in (1999, 2001, 4000, 4096):
        run(here(inputs(T, 256, dtype=torch.bfloat16, B=1)))
    assert not compiled
