"""selective_scan on CPUs: every instruction set against the float64 definition, laws, errors, torch.compile."""

import pytest
import torch
from harness import assert_close
from selective_scan_cases import LAYOUTS, OPTIONS, changed, definition, inputs, part, run, step

from hasten.kernels import backend
from hasten.kernels.recurrence.selective_scan import selective_scan, selective_scan_step

SIZES = [(1, 1, 1), (1, 70, 16), (7, 5, 3), (32, 64, 16), (33, 33, 8), (70, 40, 17), (40, 17, 64), (20, 33, 129)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("T", "D", "N"), SIZES)
def test_is_the_definition(isa, dtype, layout, T, D, N, poisoned):
    arguments, state = changed(inputs(T, D, N, dtype), LAYOUTS[layout]), torch.randn(2, D, N)
    y, final = run(arguments, state)
    expected, expected_final = definition(arguments, state)
    assert y.dtype == dtype and y.is_contiguous()
    assert_close(y, expected)
    assert_close(final, expected_final)


@pytest.mark.parametrize("options", OPTIONS)
def test_optional_inputs(isa, options, poisoned):
    for T in (1, 50):
        arguments = inputs(T, options=options)
        for found, expected in zip(run(arguments), definition(arguments), strict=True):
            assert_close(found, expected)


def test_dtypes_may_differ(isa):
    arguments = inputs(40, dtype=torch.bfloat16)
    arguments |= {"dt": arguments["dt"].float(), "B": arguments["B"].half(), "z": arguments["z"].double()}
    arguments |= {"D": arguments["D"].bfloat16(), "A": arguments["A"].double(), "dt_bias": arguments["dt_bias"].half()}
    for found, expected in zip(run(arguments), definition(arguments), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("layout", ["contiguous", "rows apart", "channels last"])
@pytest.mark.parametrize("N", [1, 8, 16, 32, 33])
def test_step_is_the_definition(isa, dtype, layout, N, poisoned):
    for T in (1, 3):
        arguments, state = inputs(T, 70, N, dtype), torch.randn(2, 70, N)
        mine = {
            "contiguous": state.clone(),
            "rows apart": torch.stack([state, state], 1)[:, 0],
            "channels last": state.transpose(1, 2).contiguous().transpose(1, 2),
        }[layout]
        y, final = definition(arguments, state)
        assert_close(step(arguments, mine), y)
        assert_close(mine, final)


def test_is_a_sum_over_all_tokens_before():
    """y_t = sum_j<=t C_t exp(A (dt_j+1 + ... + dt_t)) B_j dt_j x_j, written out."""
    T = 20
    x, dt, A, B, C = (x.double() for x in inputs(T, options="none").values())
    total = dt.cumsum(1)
    since = (total[:, :, None] - total[:, None])[..., None] * A  # [B, t, j, D, N]
    since = since.masked_fill(~torch.ones(T, T).tril().bool()[:, :, None, None], -torch.inf)
    expected = torch.einsum("btn,btjdn,bjn,bjd->btd", C, since.exp(), B, dt * x)
    torch.testing.assert_close(selective_scan(x, dt, A, B, C), expected)
    assert_close(selective_scan(*(x.float() for x in (x, dt, A, B, C))), expected)


@pytest.mark.parametrize("N", [16, 3])
def test_extreme_decays(isa, N):
    for values in ([-50.0, 0.0], [-50.0, -0.01, -1e4], [-1e4], [0.0], [-1e-6, -104.0], [-87.0, -88.0, -89.0]):
        for T in (1, 100):
            arguments = inputs(T, 40, N, options="none")
            arguments["A"] = torch.tensor(values)[torch.randint(len(values), (40, N))]
            arguments["dt"] = torch.ones_like(arguments["dt"])
            state = 1e6 * torch.randn(2, 40, N)
            for found, expected in zip(run(arguments, state), definition(arguments, state), strict=True):
                assert_close(found, expected)


def test_slow_decays_do_not_drift_over_32768_tokens(isa):
    T, D, N, slope = 32768, 8, 16, 6.7e-6
    x, B, C = torch.randn(1, T, D), torch.randn(1, T, N), torch.randn(1, T, N)
    state, A = torch.randn(1, D, N), torch.full((D, N), -slope)
    y, final = selective_scan(x, torch.ones(1, T, D), A, B, C, initial_state=state, return_state=True)
    rate = A[0, 0].double()
    since = (rate * torch.arange(T - 1, -1, -1)).exp()
    expected = torch.einsum("t,btd,btn->bdn", since, x.double(), B.double()) + state.double() * (rate * T).exp()
    assert_close(final, expected, 1e-5)
    assert_close(y[:, -1], torch.einsum("bdn,bn->bd", expected, C[:, -1].double()), 1e-5)


def test_decay_is_precise(isa):
    """A state of ones after one token: exp(dt A), to 3e-7 where it is near 1, and never off by more than the rounding
    of dt A."""
    exponent = torch.cat([-torch.logspace(-30, 0, 500), -torch.linspace(1, 85, 1100)])
    D = exponent.numel()
    for N in (1, 16):
        state = torch.ones(1, D, N)
        zero = torch.zeros(1, 1, D)
        selective_scan_step(zero, zero + 1, exponent[:, None].repeat(1, N), zero[..., :N], zero[..., :N], state)
        expected = exponent.double().exp()
        error = ((state[0].T.double() - expected) / expected).abs()
        assert (error <= 3e-7 + 1.5e-7 * exponent.abs()).all()


def test_softplus_is_precise(isa):
    dt = torch.cat([torch.linspace(-80, 40, 3001), torch.linspace(-1, 1, 1001), torch.tensor([1e4, 1e30])])
    ones = torch.ones(1, 1, 1)
    x = torch.ones(1, 1, dt.numel())
    y = selective_scan(x, dt.view(1, 1, -1), torch.zeros(dt.numel(), 1), ones, ones, dt_softplus=True).flatten()
    expected = torch.logaddexp(dt.double(), torch.zeros(1, dtype=torch.float64))
    expected = torch.where(dt < -10, dt.double().exp().log1p(), expected)
    assert ((y.double() - expected) / expected).abs().max() < 6e-7


def test_split_and_carry(isa):
    arguments = inputs(150, 40)
    whole, final = run(arguments)
    state, pieces = None, []
    for own in (slice(0, 1), slice(1, 70), slice(70, 71), slice(71, 150)):
        y, state = run(part(arguments, own), state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


def test_steps_are_the_whole(isa):
    arguments = inputs(12, 40)
    whole, final = run(arguments)
    state = torch.zeros(2, 40, 16)
    pieces = [step(part(arguments, slice(t, t + 1)), state) for t in range(12)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_packed_sequences_are_separate(isa, integers):
    bounds = [0, 1, 3, 70, 150]
    arguments, states = inputs(150, 70, B=1), torch.randn(4, 70, 16)
    packed, finals = run(arguments, states, cu_seqlens=torch.tensor(bounds, dtype=integers))
    for n in range(4):
        own = slice(bounds[n], bounds[n + 1])
        y, final = run(part(arguments, own), states[n : n + 1])
        assert torch.equal(packed[:, own], y) and torch.equal(finals[n : n + 1], final)


def test_bits_do_not_depend_on_threads_or_strides(isa, threads):
    for T in (1, 90):
        arguments = inputs(T, 300)
        torch.set_num_threads(1)
        first = run(arguments)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for layout in LAYOUTS.values():
                again = run(changed(arguments, layout))
                assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["x", "dt", "z", "B", "C", "A", "D", "dt_bias"])
def test_a_nan_stays_where_it_belongs(isa, name, spoilt):
    T, D, t, d = 50, 40, 20, 5
    arguments = inputs(T, D)
    clean, clean_state = run(arguments)
    arguments[name] = arguments[name].clone()
    arguments[name][(d, 3) if name == "A" else d if name in ("D", "dt_bias") else (0, t, d)] = (
        -spoilt if name == "A" else spoilt
    )
    y, state = run(arguments)
    reached = torch.zeros(2, T, D, dtype=torch.bool)
    rows, tokens, channels = {
        "x": (0, slice(t, None), d),
        "dt": (0, slice(t, None), d),
        "z": (0, t, d),
        "B": (0, slice(t, None), slice(None)),
        "C": (0, t, slice(None)),
    }.get(name, (slice(None), slice(None), d))
    reached[rows, tokens, channels] = True
    assert torch.equal(y[~reached], clean[~reached])
    if spoilt != spoilt or name != "A":  # a decay of -inf is a decay
        assert not y[0, t, d].isfinite()
    if name in ("z", "C", "D"):
        assert torch.equal(state, clean_state)
    else:
        untouched = ~reached[:, -1]
        assert torch.equal(state[untouched], clean_state[untouched])


def test_inputs_are_left_alone(isa):
    for T in (1, 40):
        arguments, state = inputs(T), torch.randn(2, 33, 16)
        before = {name: x.clone() for name, x in arguments.items() if torch.is_tensor(x)} | {"state": state.clone()}
        run(arguments, state)
        after = arguments | {"state": state}
        assert all(torch.equal(x, after[name]) for name, x in before.items())


BAD = {
    "dimensions": ({"x": torch.zeros(9, 33)}, r"x: expected shape \[B, T, D\], .* got shape \[9, 33\]"),
    "no tokens": ({"x": torch.zeros(2, 0, 33)}, r"x: expected shape \[B, T, D\], each of at least 1"),
    "rows of A": ({"A": torch.zeros(32, 16)}, r"A: expected shape \[33, N\] .* got shape \[32, 16\]"),
    "no components": ({"A": torch.zeros(33, 0)}, "A: expected shape"),
    "length of dt": ({"dt": torch.zeros(2, 8, 33)}, r"dt: expected shape \[2, 9, 33\], got shape \[2, 8, 33\]"),
    "components of B": ({"B": torch.zeros(2, 9, 17)}, r"B: expected shape \[2, 9, 16\], got shape \[2, 9, 17\]"),
    "rows of C": ({"C": torch.zeros(1, 9, 16)}, r"C: expected shape \[2, 9, 16\]"),
    "D per component": ({"D": torch.zeros(33, 16)}, r"D: expected shape \[33\], got shape \[33, 16\]"),
    "z of one row": ({"z": torch.zeros(1, 9, 33)}, r"z: expected shape \[2, 9, 33\]"),
    "dt_bias": ({"dt_bias": torch.zeros(1)}, r"dt_bias: expected shape \[33\]"),
    "state": ({"initial_state": torch.zeros(2, 16, 33)}, r"initial_state: expected shape \[2, 33, 16\]"),
    "state's dtype": ({"initial_state": torch.zeros(2, 33, 16).half()}, "initial_state: expected torch.float32, got torch.float16", TypeError),
    "integers": ({"x": torch.zeros(2, 9, 33).int()}, "x: expected a floating dtype", TypeError),
    "integer steps": ({"dt": torch.zeros(2, 9, 33).int()}, "dt: expected a floating dtype", TypeError),
    "device": ({"B": torch.zeros(2, 9, 16, device="meta")}, "B: expected on cpu"),
    "growth": ({"A": torch.full((33, 16), 0.5)}, r"dt A: expected at most 0, for the state grows otherwise; got \d"),
    "packed rows": ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens: expected B = 1"),
    "packed floats": ({"cu_seqlens": torch.tensor([0.0, 9])}, "cu_seqlens: expected torch.int32 or torch.int64", TypeError),
}  # fmt: skip


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, choice):
    changes, message, *error = BAD[case]
    with backend.use(choice), pytest.raises(*error or [ValueError], match=message):
        selective_scan(**inputs(9) | changes)


@pytest.mark.parametrize("bounds", [[0, 5], [1, 9], [0, 5, 5, 9]])
def test_bad_bounds(bounds):
    with pytest.raises(ValueError, match=rf"cu_seqlens: expected to rise from 0 to T = 9, got \{bounds}"):
        selective_scan(**inputs(9, B=1), cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("T", [1, 9])
def test_what_grows_is_refused_and_changes_nothing(isa, T):
    good = inputs(T, options="none")
    negative = {"dt": -good["dt"]}
    one = {"A": good["A"].clone()}
    one["A"][32, 15] = 1e-30
    hidden = {"A": one["A"].clone(), "dt": torch.full_like(good["dt"], torch.nan)}
    hidden["dt"][1, -1, 32] = 1.0
    for changes in (negative, one, hidden, {"A": one["A"], "dt_softplus": True}):
        state = torch.randn(2, 33, 16)
        before = state.clone()
        with pytest.raises(ValueError, match="dt A: expected at most 0, for the state grows otherwise; got "):
            step(good | changes, state)
        assert torch.equal(state, before)
        with pytest.raises(ValueError, match="dt A: expected at most 0"):
            run(good | changes)


def test_a_negative_step_of_a_positive_rate_does_not_grow(isa):
    arguments = inputs(9, options="none")
    arguments |= {"A": -arguments["A"], "dt": -arguments["dt"]}
    for found, expected in zip(run(arguments), definition(arguments), strict=True):
        assert_close(found, expected)


def test_bad_state_of_a_step():
    with pytest.raises(ValueError, match="state: expected memory of its own"):
        step(inputs(1), torch.zeros(1, 33, 16).expand(2, 33, 16))
    with pytest.raises(ValueError, match=r"state: expected shape \[2, 33, 16\], got shape \[2, 16, 33\]"):
        step(inputs(1), torch.zeros(2, 16, 33))


def test_gradients_of_the_definition():
    arguments = {name: x.double() if torch.is_tensor(x) else x for name, x in inputs(4, 3, 2).items()}
    arguments["initial_state"] = torch.randn(2, 3, 2).double()
    names = [name for name, x in arguments.items() if torch.is_tensor(x)]
    tensors = [arguments[name].requires_grad_() for name in names]

    def call(*tensors):
        named = dict(zip(names, tensors, strict=True))
        return selective_scan(**named, dt_softplus=True, return_state=True)

    with backend.use("reference"):
        assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("compiler", ["aot_eager"])
def test_compiles(compiler, can_compile):
    arguments, state = inputs(20), torch.randn(2, 33, 16)

    def both(state, arguments):
        y, final = run(arguments, state)
        return step(part(arguments, slice(0, 1)), state) + y[:, :1], final

    own, compiled_own = state.clone(), state.clone()
    compiled = torch.compile(both, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(compiled_own, arguments), both(own, arguments))
    torch.testing.assert_close(compiled_own, own)


def test_is_a_well_made_torch_operator():
    a, state = inputs(20, dtype=torch.bfloat16), torch.randn(2, 33, 16)
    five, more = [a[name] for name in ("x", "dt", "A", "B", "C")], [a["D"], a["z"], a["dt_bias"], True]
    torch.library.opcheck(torch.ops.hasten.selective_scan.default, (*five, *more, state, None))
    torch.library.opcheck(torch.ops.hasten.selective_scan_step.default, (*five, state, *more))
