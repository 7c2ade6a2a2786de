"""linear_attention and delta_rule on CPUs where floating-point numbers are hard: decays that are extreme or hardly any,
what is not finite, and what is nearly zero."""

import math
from functools import cache

import pytest
import torch
from harness import assert_close
from recurrence_cases import DECAYS, HV, OPERATORS, H, definition, double, inputs, log_decay, run, step


@pytest.fixture(params=OPERATORS)
def operator(request):
    return request.param


@pytest.mark.parametrize("kind", ["token", "component"])
def test_extreme_decays(isa, operator, kind):
    T = 200
    tensors = inputs(operator, T)
    for values in ([-50.0, 0.0], [-50.0, -0.01, -torch.inf], [0.0], [-50.0], [-1e-6, -104.0]):
        decay = log_decay(kind, 2, T, 24)
        decay = torch.tensor(values)[torch.randint(len(values), decay.shape)]
        state = torch.randn(2, HV, 24, 17)
        for found, expected in zip(
            run(operator, tensors, decay, state), definition(operator, tensors, decay, state), strict=True
        ):
            assert_close(found, expected)


@pytest.mark.parametrize("kind", ["head", "component"])
def test_hardly_any_decay_over_8192_tokens(isa, operator, kind):
    T = 8192
    tensors = inputs(operator, T, 16, 8, torch.bfloat16, B=1)
    tensors[1] = tensors[1].abs() / 4  # keys that agree: the state grows
    decay = torch.full_like(log_decay(kind, 1, T, 16), -1e-5)
    for found, expected in zip(run(operator, tensors, decay), definition(operator, tensors, decay), strict=True):
        assert_close(found, expected, 1e-2)


SLOPE, LONG = 6.7e-6, 32768  # of MiniMax' last layer


@cache
def long_text(operator):
    """Inputs whose keys agree, so that the state grows, and the final state of a constant decay in float64."""
    torch.manual_seed(0)
    tensors = inputs(operator, LONG, 8, 4, B=1)
    tensors[1] = tensors[1].abs()
    _, k, v, *_ = double(tensors)
    k = k.repeat_interleave(HV // H, 2)
    if operator == "linear_attention":
        age = torch.exp(-SLOPE * torch.arange(LONG - 1, -1, -1, dtype=torch.float64))
        return tensors, torch.einsum("t,bthk,bthv->bhkv", age, k, v)
    tensors[3] *= 1e-5  # tokens that write little: the state goes on growing
    k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    S = torch.zeros(1, HV, 8, 4, dtype=torch.float64)
    for t in range(LONG):
        S = S * math.exp(-SLOPE)
        u = tensors[3][:, t, :, None].double() * (v[:, t] - (k[:, t, :, :, None] * S).sum(-2))
        S = S + k[:, t, :, :, None] * u[:, :, None]
    return tensors, S


@pytest.mark.parametrize("kind", ["head", "token", "component"])
def test_slow_decays_do_not_drift_over_32768_tokens(isa, operator, kind):
    """A factor that is rounded once and multiplied by so often would be off by 4e-4."""
    tensors, expected = long_text(operator)
    decay = torch.full_like(log_decay(kind, 1, LONG, 8), -SLOPE)
    _, final = run(operator, tensors, decay)
    assert_close(final, expected, 1e-5)
    state = torch.zeros_like(final)
    step(operator, tensors, state, decay)
    assert_close(state, expected, 1e-5)


def test_a_nan_stays_in_its_sequence(isa, operator):
    tensors, decay = inputs(operator, 70), log_decay("token", 2, 70, 24)
    clean, clean_state = run(operator, tensors, decay)
    for i in range(3):
        spoilt = [x.clone() for x in tensors]
        spoilt[i][0, 30] = torch.nan
        o, state = run(operator, spoilt, decay)
        assert torch.equal(o[1], clean[1]) and torch.equal(state[1], clean_state[1])
        assert o[0, 30].isnan().all()
        packed = torch.tensor([0, 10, 40, 70])
        o, state = run(operator, [x[:1] for x in spoilt], decay[:1], cu_seqlens=packed)
        assert o[0, :10].isfinite().all() and o[0, 40:].isfinite().all() and state[[0, 2]].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", DECAYS)
def test_what_is_not_finite_stays_at_its_token_and_after(isa, dtype, operator, kind, value):
    tensors, decay = inputs(operator, 150, dtype=dtype), log_decay(kind, 2, 150, 24)
    clean, _ = run(operator, tensors, decay)
    for i in range(len(tensors)):
        spoilt = [x.clone() for x in tensors]
        spoilt[i][0, 77] = value
        o, state = run(operator, spoilt, decay)
        assert_close(o[0, :77], clean[0, :77].double(), 2e-2 if dtype == torch.bfloat16 else 2e-3)
        assert not o[0, 77].isfinite().all()
        assert state[0].isfinite().all() == (i == 0), "only q is not in the state"


@pytest.mark.parametrize("kind", ["head", "token", "component"])
def test_a_decay_that_is_no_number_spoils_nothing_before_it(isa, dtype, operator, kind):
    tensors, decay = inputs(operator, 40, dtype=dtype), log_decay(kind, 2, 40, 24)
    where = (1,) if kind == "head" else (0, 20, 1)
    decay[where] = torch.nan
    o, state = run(operator, tensors, decay)
    expected, final = definition(operator, tensors, decay)
    assert torch.equal(o.isfinite(), expected.isfinite()) and torch.equal(state.isfinite(), final.isfinite())


def test_keys_that_overflow_spoil_nothing_before_them(isa, dtype):
    if dtype == torch.float16:
        pytest.skip("float16 has no such numbers")
    tensors = inputs("delta_rule", 40, dtype=dtype)
    tensors[1] /= 8
    tensors[1][:, 20] *= 1e25
    o, _ = run("delta_rule", tensors, l2_norm=False)
    expected, _ = definition("delta_rule", [x[:, :20] for x in tensors], l2_norm=False)
    assert_close(o[:, :20], expected, 2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_column_that_is_not_finite_leaves_the_others(isa, dtype, operator):
    tensors, decay = inputs(operator, 70, dtype=dtype), log_decay("token", 2, 70, 24)
    tensors[2][0, 30, 1, 5] = torch.nan
    o, state = run(operator, tensors, decay)
    expected, final = definition(operator, tensors, decay)
    assert torch.equal(o.isnan(), expected.isnan()) and torch.equal(state.isnan(), final.isnan())
    assert_close(o.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("lowest", [-1.4, -2.0, -20.0])
def test_numbers_below_the_normal_ones_are_flushed_in_kernels_alone(isa, operator, lowest):
    """A state under a decay soon holds many of them, and each costs a CPU over a hundred cycles."""
    tiny = torch.tensor([1e-39])
    decay = torch.full_like(log_decay("token", 2, 150, 24), lowest)
    _, final = run(operator, inputs(operator, 150), decay)
    assert not ((final != 0) & (final.abs() < torch.finfo(torch.float32).tiny)).any()
    assert (tiny * 0.5).item() != 0, "torch's own numbers are left as they are"
