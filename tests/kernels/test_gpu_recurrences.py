"""The Triton kernels of the recurrences, run: on a GPU (`pytest -m gpu`), or by Triton's interpreter
(test_triton_interpreted.py).

Against the definitions in float64, outputs poisoned by NaN before the call; then the laws.
"""

from unittest.mock import patch

import numpy as np
import pytest
import recurrence_cases as shared
import torch
from harness import DEVICE, INTERPRETED, TOLERANCES, TRITON_RUNS, assert_close, poisoned, short

pytest.importorskip("triton")
pytestmark = TRITON_RUNS

from hasten.kernels import backend  # noqa: E402 (after the skips)
from hasten.kernels.recurrence import triton as triton_recurrence  # noqa: E402

# The interpreter takes chunks of 16 tokens and 16 columns of V: several of both, the last ones not full.
SIZES = [(1, 24, 17), (33, 40, 16), (50, 16, 33)] if INTERPRETED else [*shared.SIZES, (1000, 128, 128), (4097, 64, 128)]
SHORT = 20 if INTERPRETED else 40  # tokens, more than one chunk
DTYPES = [torch.float32] if INTERPRETED else list(TOLERANCES)


@pytest.fixture(params=shared.OPERATORS)
def operator(request):
    return request.param


def here(values):
    return [None if x is None else x.to(DEVICE) for x in values]


def poisoned_run(function, *arguments, **settings):
    """The result of Triton's kernels, where all that was allocated was full of NaN before."""
    with poisoned(), backend.use("triton"):
        return function(*arguments, **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", shared.DECAYS)
@pytest.mark.parametrize(("T", "K", "V"), SIZES)
def test_is_the_definition(operator, T, K, V, kind, dtype):
    tensors, decay = here(shared.inputs(operator, T, K, V, dtype)), here([shared.log_decay(kind, 2, T, K)])[0]
    state = torch.randn(2, shared.HV, K, V).to(DEVICE)
    found = poisoned_run(shared.run, operator, tensors, decay, state)
    for x, y in zip(found, shared.definition(operator, tensors, decay, state), strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("layout", shared.STATES)
@pytest.mark.parametrize("kind", shared.DECAYS)
def test_step_is_the_definition(operator, kind, layout):
    for T, K, V in ((1, 24, 17), (3, 40, 33)):
        tensors, decay = here(shared.inputs(operator, T, K, V)), here([shared.log_decay(kind, 2, T, K)])[0]
        state = torch.randn(2, shared.HV, K, V).to(DEVICE)
        o, final = shared.definition(operator, tensors, decay, state)
        mine = shared.STATES[layout](state)
        assert_close(poisoned_run(shared.step, operator, tensors, mine, decay), o)
        assert_close(mine, final)


@pytest.mark.parametrize("kind", ["token", "component"])
def test_extreme_decays(operator, kind):
    tensors, shape = here(shared.inputs(operator, SHORT, B=1)), shared.log_decay(kind, 1, SHORT, 24).shape
    for values in ([-50.0, 0.0], [-50.0, -0.01, -torch.inf], [-1e-6, -104.0]):
        decay = torch.tensor(values)[torch.randint(len(values), shape)].to(DEVICE)
        for x, y in zip(
            poisoned_run(shared.run, operator, tensors, decay), shared.definition(operator, tensors, decay), strict=True
        ):
            assert_close(x, y)


def test_packed_sequences_are_separate(operator):
    bounds = [0, 1, 34, 40]
    tensors, decay = here(shared.inputs(operator, 40, B=1)), here([shared.log_decay("token", 1, 40, 24)])[0]
    states = torch.randn(3, shared.HV, 24, 17).to(DEVICE)
    packed, finals = poisoned_run(
        shared.run, operator, tensors, decay, states, cu_seqlens=torch.tensor(bounds, device=DEVICE)
    )
    for n in range(3):
        own = slice(bounds[n], bounds[n + 1])
        o, final = poisoned_run(shared.run, operator, [x[:, own] for x in tensors], decay[:, own], states[n : n + 1])
        assert torch.equal(packed[:, own], o) and torch.equal(finals[n : n + 1], final)


def test_a_nan_stays_in_its_row(operator):
    tensors = here(shared.inputs(operator, SHORT))
    clean = poisoned_run(shared.run, operator, tensors)
    tensors[2][0, 10] = torch.nan
    o, state = poisoned_run(shared.run, operator, tensors)
    assert torch.equal(o[1], clean[0][1]) and torch.equal(state[1], clean[1][1]) and o[0, 10].isnan().all()


def test_a_positive_decay_makes_nan(operator):
    """On a GPU nobody looks at the values of a decay before the kernel does."""
    for kind in ("head", "token", "component"):
        tensors, decay = here(shared.inputs(operator, SHORT, B=1)), here([shared.log_decay(kind, 1, SHORT, 24)])[0]
        decay[...] = 0.5
        with patch("hasten.kernels.sequence.check_signs"):
            o, state = poisoned_run(shared.run, operator, tensors, decay)
        assert o.isnan().all() and state.isnan().all()


@pytest.fixture
def cut_off(monkeypatch):
    """The interpreter multiplies in float32; tensor cores ignore the last 13 bits of an operand in tf32."""
    if INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        exact = InterpreterBuilder.create_dot

        def cut(x):
            data = (np.ascontiguousarray(x.data).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
            return TensorHandle(data, x.dtype)

        def create_dot(self, x, y, acc, precision, *rest):
            if precision.name == "TF32" and x.data.dtype == np.float32:
                x, y = cut(x), cut(y)
            return exact(self, x, y, acc, precision, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def test_what_tensor_cores_cut_off(operator, cut_off):
    """Values that agree in sign, of which most is corrected: errors that agree too would add up."""
    q, k, v, *betas = shared.inputs(operator, 256, 64, 16, torch.float16, B=1)
    tensors = here([q, k + 1, v + 1, *(torch.full_like(beta, 1.9) for beta in betas)])
    found = poisoned_run(shared.run, operator, tensors)
    for x, y in zip(found, shared.definition(operator, tensors), strict=True):
        assert_close(x.half(), y)


def test_heads_too_wide(operator):
    with pytest.raises(ValueError, match=f"K of at most {triton_recurrence.MAX_K} on a GPU, got K = 257"):
        poisoned_run(shared.run, operator, here(shared.inputs(operator, 3, 257, 16)))
