"""The Triton kernels of causal_conv1d, run: on a GPU (`pytest -m gpu`), or by Triton's interpreter
(test_triton_interpreted.py).

Every launcher against the reference in float64, outputs poisoned by NaN before the call; then the laws.
"""

import pytest
import torch
from harness import DEVICE, TOLERANCES, TRITON_RUNS, assert_close, on_gpu, poisoned, short

pytest.importorskip("triton")
pytestmark = TRITON_RUNS

from hasten.kernels import backend  # noqa: E402 (after the skips)
from hasten.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update, reference  # noqa: E402
from hasten.kernels.causal_conv1d import triton as conv  # noqa: E402

SIZES = [(1, 1, 1, 1), (2, 33, 1, 4), (1, 130, 15, 4), (2, 17, 140, 3), (1, 5, 33, 8), (3, 129, 17, 2)]  # B, D, T, W
GPU_SIZES = [(1, 8192, 4096, 4), (8, 2048, 777, 4), (64, 4096, 1, 4), (1, 12288, 16384, 4)]
LAYOUTS = {
    "channels last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens last": lambda x: x,
    "slice": lambda x: torch.cat([x, x], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, : x.shape[1]],
    "every other": lambda x: x.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2],
}


def make(B, D, T, W, dtype=torch.float32, N=None):
    """x, weight, bias, initial_state."""
    torch.manual_seed(B * 1000003 + D * 1009 + T * 11 + W)
    shapes = (B, D, T), (D, W), (D,), (N or B, D, W - 1)
    return [torch.randn(shape).to(DEVICE, dtype) for shape in shapes]


def run_poisoned(call, *arguments):
    """The result, where all that was allocated was full of NaN before."""
    with poisoned():
        y = call(*arguments)
    assert y.dtype == arguments[0].dtype
    return y


def expect(x, weight, bias, silu, initial, bounds=None):
    wide = [t if t is None else t.double() for t in (x, weight, bias, initial)]
    return reference.causal_conv1d(*wide[:3], silu, wide[3], bounds)[0]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=short)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=short)
def test_matches_reference(size, layout, dtype):
    x, weight, bias, initial = make(*size, dtype)
    x = LAYOUTS[layout](x)
    for arguments in ((bias, True, initial), (None, False, None), (bias, False, None)):
        assert_close(run_poisoned(conv.launch, x, weight, *arguments, None), expect(x, weight, *arguments))


@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=short)
@pytest.mark.parametrize("size", GPU_SIZES, ids=short)
def test_matches_reference_at_full_size(size, dtype):
    x, weight, bias, initial = make(*size, dtype)
    for layout in ("channels last", "tokens last"):
        y = run_poisoned(conv.launch, LAYOUTS[layout](x), weight, bias, True, initial, None)
        assert_close(y, expect(x, weight, bias, True, initial))


@pytest.mark.parametrize("layout", ["channels last", "tokens last"])
def test_layout_of_the_output(layout):
    x, weight, *_ = make(2, 33, 20, 4)
    x = LAYOUTS[layout](x)
    with backend.use("triton"):
        y = causal_conv1d(x, weight)
    assert y.stride() == x.stride()


@pytest.mark.parametrize("layout", ["channels last", "tokens last"])
def test_packed_sequences_are_separate(layout):
    x, weight, bias, initial = make(1, 33, 300, 4, N=5)
    x, bounds = LAYOUTS[layout](x), [0, 1, 3, 131, 147, 300]
    y = run_poisoned(conv.launch, x, weight, bias, True, initial, bounds)
    for n in range(5):
        own = x[..., bounds[n] : bounds[n + 1]]
        alone = conv.launch(own, weight, bias, True, initial[n : n + 1], None)
        assert torch.equal(y[..., bounds[n] : bounds[n + 1]], alone)


def test_split_and_carry():
    x, weight, bias, _ = make(2, 33, 100, 4)
    state, pieces = None, []
    with backend.use("triton"):
        for part in x.split([1, 2, 60, 37], -1):
            y, state = causal_conv1d(part, weight, bias, activation="silu", initial_state=state, return_state=True)
            pieces.append(y)
        assert torch.equal(torch.cat(pieces, -1), causal_conv1d(x, weight, bias, activation="silu"))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=short)
@pytest.mark.parametrize("layout", ["tokens last", "channels last"])
@pytest.mark.parametrize(("S", "T", "W"), [(3, 1, 4), (4, 1, 4), (6, 2, 4), (4, 9, 4), (1, 1, 1), (7, 3, 8)])
def test_update_matches_reference(S, T, W, layout, dtype):
    x, weight, bias, _ = make(2, 133, T, W, dtype)
    x, state = LAYOUTS[layout](x), LAYOUTS[layout](torch.randn(2, 133, S).to(DEVICE, dtype))
    before = state.clone()
    y = run_poisoned(conv.update, x, state, weight, bias, True)
    assert y.is_contiguous()
    assert_close(y, expect(x, weight, bias, True, before[..., S - (W - 1) :]))
    assert torch.equal(state, torch.cat([before, x], -1)[..., T:])


def test_updates_are_the_whole():
    x, weight, bias, _ = make(2, 130, 12, 4)
    state = torch.zeros(2, 130, 4, device=DEVICE)
    with backend.use("triton"):
        steps = [causal_conv1d_update(part, state, weight, bias, activation="silu") for part in x.split(1, -1)]
        whole = causal_conv1d(x, weight, bias, activation="silu")
    torch.testing.assert_close(torch.cat(steps, -1), whole)


@pytest.mark.parametrize("layout", ["channels last", "tokens last"])
def test_a_nan_reaches_its_window_only(layout):
    x, weight, bias, _ = make(2, 33, 50, 4)
    clean = conv.launch(LAYOUTS[layout](x), weight, bias, True, None, None)
    x[0, 5, 20] = torch.nan
    y = conv.launch(LAYOUTS[layout](x), weight, bias, True, None, None)
    assert y[0, 5, 20:24].isnan().all()
    y[0, 5, 20:24] = clean[0, 5, 20:24]
    assert torch.equal(y, clean)


def test_silu_of_large_values():
    x = torch.tensor([-1e30, -200.0, -88.0, -1.0, 0.0, 1.0, 88.0, 200.0, 1e30], device=DEVICE).view(1, 1, -1)
    y = conv.launch(x, torch.ones(1, 1, device=DEVICE), None, True, None, None)
    torch.testing.assert_close(y, torch.nn.functional.silu(x))


def test_weight_of_another_dtype():
    x, weight, bias, _ = make(1, 33, 20, 4, torch.float16)
    y = conv.launch(x, weight.float(), bias.float(), False, None, None)
    assert_close(y, expect(x, weight, bias, False, None))


@on_gpu
@pytest.mark.parametrize("layout", ["channels last", "tokens last"])
def test_cuda_graph(layout):
    x, weight, bias, _ = make(2, 300, 100, 4, torch.bfloat16)
    x, state = LAYOUTS[layout](x), torch.zeros(2, 300, 4, dtype=torch.bfloat16, device=DEVICE)
    conv.launch(x, weight, bias, True, None, None)
    conv.update(x[..., :1], state.clone(), weight, bias, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = conv.launch(x, weight, bias, True, None, None)
        step = conv.update(x[..., :1], state, weight, bias, True)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        before = state.clone()
        graph.replay()
        assert torch.equal(y, conv.launch(x, weight, bias, True, None, None))
        assert torch.equal(step, conv.update(x[..., :1], before, weight, bias, True)) and torch.equal(state, before)


@on_gpu
def test_no_compilation_per_length(monkeypatch):
    from triton import knobs

    arguments = make(1, 256, 64, 4, torch.bfloat16)
    launch = lambda x: conv.launch(LAYOUTS["channels last"](x), *arguments[1:3], True, None, None)  # noqa: E731
    launch(arguments[0])
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **said: compiled.append(said["repr"]))  # None: go on
    for T in (63, 65, 1000, 1024):
        launch(torch.randn(1, 256, T, dtype=torch.bfloat16, device=DEVICE))
    assert not compiled
