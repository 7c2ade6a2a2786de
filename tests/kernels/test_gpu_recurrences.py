"""The Triton kernels of the recurrences, run: on a GPU (`pytest -m gpu`), or by Triton's interpreter
(test_triton_interpreted.py) with the products of matrix units.

Against the definitions in float64, outputs poisoned by NaN before the call; then the laws.
"""

from unittest.mock import patch

import pytest
import recurrence_cases as shared
import torch
from harness import DEVICE, INTERPRETED, TOLERANCES, TRITON_RUNS, assert_close, on_gpu, poisoned, short

pytest.importorskip("triton")
pytestmark = TRITON_RUNS

from hasten.kernels import backend  # noqa: E402 (after the skips)
from hasten.kernels.recurrence import triton as triton_recurrence  # noqa: E402

# Chunks are of 64 tokens in bfloat16, else of 32: several, the last ones not full.
SIZES = [(1, 24, 17), (70, 40, 33)] if INTERPRETED else [*shared.SIZES, (1000, 128, 128), (4097, 64, 128)]
CASES = [(*size, dtype) for size in SIZES for dtype in TOLERANCES if size[0] > 1 or dtype == torch.float32]
LONG = 70  # tokens, more than one chunk of any length
KINDS = ["head", "token", "component"]


@pytest.fixture(params=shared.OPERATORS)
def operator(request):
    return request.param


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch):
    if INTERPRETED:
        import matrix_units

        matrix_units.install(monkeypatch)


def here(values):
    return [None if x is None else x.to(DEVICE) for x in values]


def decays(kind, T, K=24, B=1):
    return here([shared.log_decay(kind, B, T, K)])[0]


def poisoned_run(function, *arguments, **settings):
    """The result of Triton's kernels, where all that was allocated was full of NaN before."""
    with poisoned(), backend.use("triton"):
        return function(*arguments, **settings)


def assert_all_close(found, expected, dtype=torch.float32):
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, TOLERANCES[dtype])


@pytest.mark.parametrize("kind", shared.DECAYS)
@pytest.mark.parametrize(("T", "K", "V", "dtype"), CASES, ids=short)
def test_is_the_definition(operator, T, K, V, kind, dtype):
    B = 2 if T < LONG else 1
    tensors, decay = here(shared.inputs(operator, T, K, V, dtype, B)), decays(kind, T, K, B)
    state = torch.randn(B, shared.HV, K, V).to(DEVICE)
    found = poisoned_run(shared.run, operator, tensors, decay, state)
    assert_all_close(found, shared.definition(operator, tensors, decay, state), dtype)


@pytest.mark.parametrize(("operator", "kind"), [("linear_attention", "component"), ("delta_rule", "token")])
def test_wide_heads(operator, kind):
    tensors, decay = here(shared.inputs(operator, 5, 512, 3, B=1)), decays(kind, 5, 512)
    state = torch.randn(1, shared.HV, 512, 3).to(DEVICE)
    assert_all_close(
        poisoned_run(shared.run, operator, tensors, decay, state), shared.definition(operator, tensors, decay, state)
    )


def test_heads_too_wide(operator):
    with pytest.raises(ValueError, match=f"K of at most {triton_recurrence.MAX_K} on a GPU, got K = 513"):
        poisoned_run(shared.run, operator, here(shared.inputs(operator, 3, 513, 16)))


@pytest.mark.parametrize("layout", shared.STATES)
@pytest.mark.parametrize("kind", shared.DECAYS)
def test_step_is_the_definition(operator, kind, layout):
    for T, K, V in ((1, 24, 17), (3, 40, 33)):
        tensors, decay = here(shared.inputs(operator, T, K, V)), decays(kind, T, K, B=2)
        state = torch.randn(2, shared.HV, K, V).to(DEVICE)
        o, final = shared.definition(operator, tensors, decay, state)
        mine = shared.STATES[layout](state)
        assert_close(poisoned_run(shared.step, operator, tensors, mine, decay), o)
        assert_close(mine, final)


@pytest.mark.parametrize("kind", ["token", "component"])
def test_parts_of_a_projection_are_read_where_they_lie(operator, kind):
    """Prefill and step: q, k, v and gates that are views, and gates of another dtype."""
    T, K, V = 5, 12, 7
    fused = torch.randn(2, T, 2 * shared.H * K + shared.HV * V + 3).to(DEVICE)
    q, k, v, _ = fused.split([shared.H * K, shared.H * K, shared.HV * V, 3], -1)
    tensors = [q.unflatten(-1, (shared.H, K)), k.unflatten(-1, (shared.H, K)), v.unflatten(-1, (shared.HV, V))]
    if operator == "delta_rule":
        tensors.append(torch.rand(2, T, 2 * shared.HV).to(DEVICE)[..., shared.HV :].double())
    decay = decays(kind, T, K, B=2).half()
    copied = [x.contiguous().to(torch.float32) for x in tensors]
    state = torch.randn(2, shared.HV, K, V).to(DEVICE)
    found = poisoned_run(shared.run, operator, tensors, decay, state)
    for x, y in zip(found, poisoned_run(shared.run, operator, copied, decay.float(), state), strict=True):
        assert torch.equal(x, y)
    mine, copy = state.clone(), state.clone()
    o = poisoned_run(shared.step, operator, tensors, mine, decay)
    assert torch.equal(o, poisoned_run(shared.step, operator, copied, copy, decay.float())) and torch.equal(mine, copy)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_linear_attention(kind):
    """beta_t k_t v_t^T is k_t (beta_t v_t)^T; and outputs in float32 of inputs that are halves."""
    tensors, decay = here(shared.inputs("linear_attention", 33, dtype=torch.float16, B=1)), decays(kind, 33)
    beta = torch.rand(1, 33, shared.HV).to(DEVICE)
    state = torch.randn(1, shared.HV, 24, 17).to(DEVICE)
    q, k, v = shared.double(tensors)
    expected = shared.definition("linear_attention", [q, k, beta[..., None] * v], decay, state)
    with poisoned():
        given = (*tensors, beta, decay, 0.3, state, False, None)
        o, final = triton_recurrence.launch(*given, delta=False, out_dtype=torch.float32)
        assert o.dtype == torch.float32
        assert_all_close((o, final), expected, torch.float16)
        given = (*tensors, beta, state, decay, 0.3, False)
        o = triton_recurrence.step(*given, delta=False, out_dtype=torch.float32)
    assert o.dtype == torch.float32
    assert_all_close((o, state), expected, torch.float16)


def test_normalized():
    tensors, state = here(shared.inputs("linear_attention", 5)), torch.rand(2, shared.HV, 24, 18).to(DEVICE)
    tensors = [x.abs() for x in tensors]
    settings = {"decay": None, "state": state, "normalize": True}
    assert_all_close(
        poisoned_run(shared.run, "linear_attention", tensors, **settings),
        shared.definition("linear_attention", tensors, **settings),
    )


@pytest.mark.parametrize("kind", ["token", "component"])
def test_extreme_decays(operator, kind):
    tensors, shape = here(shared.inputs(operator, 40, B=1)), shared.log_decay(kind, 1, 40, 24).shape
    for values in ([-50.0, 0.0], [-50.0, -0.01, -torch.inf], [-1e-6, -104.0]):
        decay = torch.tensor(values)[torch.randint(len(values), shape)].to(DEVICE)
        assert_all_close(
            poisoned_run(shared.run, operator, tensors, decay), shared.definition(operator, tensors, decay)
        )


@pytest.mark.parametrize("kind", ["head", "component"])
def test_what_a_chunk_forgets(kind):
    """Slow decays: exp of their sum would be rounded in float32, in the same direction in every chunk."""
    T = 64 if INTERPRETED else 32768
    q, k, v = here(shared.inputs("linear_attention", T, 16, 16, B=1))
    decay = -1e-6 - 6e-6 * decays(kind, T, 16).abs() / 5
    state = 1e6 * torch.randn(1, shared.HV, 16, 16).to(DEVICE)
    with poisoned(), backend.use("triton"):
        _, final = shared.run("linear_attention", (q, 0 * k, v), decay, state)
    sums = T * decay if kind == "head" else decay.sum(1)[0]
    factor = sums.double().expm1().reshape(1, shared.HV, -1, 1)
    error = ((final - state).double() - factor * state).norm() / (factor * state).norm()
    assert error < (1e-3 if INTERPRETED else 1e-2)  # a float32 keeps so much of what is lost


def test_packed_sequences_are_separate(operator):
    bounds = [0, 1, 34, 40]
    tensors, decay = here(shared.inputs(operator, 40, B=1)), decays("token", 40)
    states = torch.randn(3, shared.HV, 24, 17).to(DEVICE)
    packed, finals = poisoned_run(
        shared.run, operator, tensors, decay, states, cu_seqlens=torch.tensor(bounds, device=DEVICE)
    )
    for n in range(3):
        own = slice(bounds[n], bounds[n + 1])
        o, final = poisoned_run(shared.run, operator, [x[:, own] for x in tensors], decay[:, own], states[n : n + 1])
        assert torch.equal(packed[:, own], o) and torch.equal(finals[n : n + 1], final)


@pytest.mark.parametrize("kind", ["head", "component"])
def test_packed_sequences_of_any_length(operator, kind):
    """Around the length of a chunk."""
    bounds = torch.tensor([0, 1, 32, 64, 97, 99], dtype=torch.int32).to(DEVICE)
    tensors, decay = here(shared.inputs(operator, 99, 5, 3, B=1)), decays(kind, 99, 5)
    settings = {"cu_seqlens": bounds, **({"reverse": True} if operator == "linear_attention" else {})}
    assert_all_close(
        poisoned_run(shared.run, operator, tensors, decay, **settings),
        shared.definition(operator, tensors, decay, **settings),
    )


def test_many_packed_sequences():
    """More than a program looks up at a time."""
    tensors = here([*torch.randn(2, 1, 70, 1, 5), torch.randn(1, 70, 1, 3)])
    settings = {"cu_seqlens": torch.tensor([*range(66), 70], device=DEVICE)}
    assert_all_close(
        poisoned_run(shared.run, "linear_attention", tensors, **settings),
        shared.definition("linear_attention", tensors, **settings),
    )


@pytest.mark.parametrize("bounds", [[0, 5, 3, 40], [1, 5, 40], [0, 41], [0, -5, 40], [0, 10**6, 40], [0, 0]])
def test_bounds_that_do_not_rise_make_nan(operator, bounds):
    """On a GPU nobody looks at them before the kernels do."""
    tensors, states = here(shared.inputs(operator, 40, B=1)), torch.zeros(len(bounds) - 1, shared.HV, 24, 17)
    with patch("hasten.kernels.sequence.boundaries"):
        o, final = poisoned_run(
            shared.run, operator, tensors, None, states.to(DEVICE), cu_seqlens=torch.tensor(bounds, device=DEVICE)
        )
    assert o.isnan().all() and final.isnan().all()


def test_a_nan_stays_in_its_row(operator):
    tensors = here(shared.inputs(operator, 20))
    clean = poisoned_run(shared.run, operator, tensors)
    tensors[2][0, 10] = torch.nan
    o, state = poisoned_run(shared.run, operator, tensors)
    assert torch.equal(o[1], clean[0][1]) and torch.equal(state[1], clean[1][1]) and o[0, 10].isnan().all()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("kind", ["none", "component"])
def test_what_is_not_finite_does_not_reach_earlier_tokens(operator, kind):
    tensors, decay = here(shared.inputs(operator, 20, B=1)), decays(kind, 20)
    clean = poisoned_run(shared.run, operator, tensors, decay)[0]
    for i, value in enumerate((torch.nan, torch.inf, torch.nan)[: len(tensors) - 1], 1):
        spoilt = [x.clone() for x in tensors]
        spoilt[i][0, 10, 0] = value  # of one head
        o, state = poisoned_run(shared.run, operator, spoilt, decay)
        assert torch.equal(o[0, :10], clean[0, :10]) and torch.equal(o[0, :, 2:], clean[0, :, 2:])
        assert not o[0, 10, 0].isfinite().any() and not state[0, 0].isfinite().all()


def test_a_positive_decay_makes_nan(operator):
    """On a GPU nobody looks at the values of a decay before the kernel does."""
    for kind in KINDS:
        tensors, decay = here(shared.inputs(operator, 20, B=1)), decays(kind, 20)
        decay[...] = 0.5
        with patch("hasten.kernels.sequence.check_signs"):
            o, state = poisoned_run(shared.run, operator, tensors, decay)
        assert o.isnan().all() and state.isnan().all()


def test_what_tensor_cores_cut_off(operator):
    """Values that agree in sign, of which most is corrected: errors that agree too would add up."""
    for dtype in (torch.float16, torch.bfloat16):
        q, k, v, *betas = shared.inputs(operator, 160, 64, 16, dtype, B=1)
        tensors = here([q, k + 1, v + 1, *(torch.full_like(beta, 1.9) for beta in betas)])
        assert_all_close(poisoned_run(shared.run, operator, tensors), shared.definition(operator, tensors), dtype)


@on_gpu
@pytest.mark.parametrize("packed", [False, True])
def test_is_captured(operator, packed):
    """In a CUDA graph, which a call that waits for the device breaks."""
    tensors, decay = here(shared.inputs(operator, 200, B=1)), decays("token", 200)
    settings = {"cu_seqlens": torch.tensor([0, 7, 200], device=DEVICE)} if packed else {}
    with backend.use("triton"):
        expected = shared.run(operator, tensors, decay, **settings)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = shared.run(operator, tensors, decay, **settings)
        graph.replay()
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
