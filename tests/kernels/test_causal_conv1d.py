"""causal_conv1d on CPUs: every instruction set against the float64 definition, laws, errors, torch.compile."""

import pytest
import torch
from harness import assert_close

from hasten.kernels import backend
from hasten.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update

LAYOUTS = {
    "channels last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens last": lambda x: x,
    "slice": lambda x: torch.cat([x, x], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, : x.shape[1]],
}


def inputs(T, D=33, W=4, dtype=torch.float32, B=2):
    x, weight, bias = torch.randn(B, D, T).to(dtype), torch.randn(D, W).to(dtype), torch.randn(D).to(dtype)
    return x, weight, bias, torch.randn(B, D, W - 1).to(dtype)


def definition(x, weight, bias=None, initial_state=None, **settings):
    x, weight, bias, state = (t if t is None else t.double() for t in (x, weight, bias, initial_state))
    with backend.use("reference"):
        return causal_conv1d(x, weight, bias, initial_state=state, return_state=True, **settings)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("T", "D", "W"), [(1, 1, 1), (1, 33, 4), (2, 600, 4), (64, 17, 3), (130, 33, 8), (200, 600, 4)]
)
def test_is_the_definition(isa, dtype, layout, T, D, W, poisoned):
    x, weight, bias, before = inputs(T, D, W, dtype)
    x = LAYOUTS[layout](x)
    for settings in ({}, {"activation": "silu"}):
        y, state = causal_conv1d(x, weight, bias, initial_state=before, return_state=True, **settings)
        expected, expected_state = definition(x, weight, bias, before, **settings)
        assert_close(y, expected)
        assert torch.equal(state.double(), expected_state)
        assert y.stride() == torch.empty_like(x).stride() or 1 in x.shape
    assert_close(causal_conv1d(x, weight), definition(x, weight)[0])


@pytest.mark.parametrize("S", [3, 4, 6])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_update_is_the_definition(isa, dtype, T, S):
    x, weight, bias, _ = inputs(T, dtype=dtype)
    state = torch.randn(2, 33, S).to(dtype)
    before = state.clone()
    y = causal_conv1d_update(x, state, weight, bias, activation="swish")
    assert_close(y, definition(x, weight, bias, before[..., -3:], activation="silu")[0])
    assert torch.equal(state, torch.cat([before, x], -1)[..., T:])


def test_update_of_a_strided_state():
    x, weight, bias, _ = inputs(1)
    state = torch.randn(2, 4, 33).transpose(1, 2)
    before = state.clone()
    assert_close(causal_conv1d_update(x, state, weight, bias), definition(x, weight, bias, before[..., -3:])[0])
    assert torch.equal(state, torch.cat([before, x], -1)[..., 1:])


def test_split_and_carry(isa):
    x, weight, bias, _ = inputs(100)
    state, pieces = None, []
    for part in x.split([1, 2, 60, 37], -1):
        y, state = causal_conv1d(part, weight, bias, initial_state=state, return_state=True)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, -1), causal_conv1d(x, weight, bias))


def test_packed_sequences_are_separate(isa):
    x, weight, bias, _ = inputs(150, B=1)
    bounds, before = [0, 1, 3, 70, 150], torch.randn(4, 33, 3)
    packed, states = causal_conv1d(
        x, weight, bias, initial_state=before, return_state=True, cu_seqlens=torch.tensor(bounds)
    )
    for n in range(4):
        own = x[..., bounds[n] : bounds[n + 1]]
        y, state = causal_conv1d(own, weight, bias, initial_state=before[n : n + 1], return_state=True)
        assert torch.equal(packed[..., bounds[n] : bounds[n + 1]], y) and torch.equal(states[n : n + 1], state)


def test_a_nan_reaches_its_window_only(isa):
    x, weight, bias, _ = inputs(50)
    clean = causal_conv1d(x, weight, bias, activation="silu")
    x[0, 5, 20] = torch.nan
    y = causal_conv1d(x, weight, bias, activation="silu")
    assert y[0, 5, 20:24].isnan().all()
    y[0, 5, 20:24] = clean[0, 5, 20:24]
    assert torch.equal(y, clean)


def test_silu_of_large_values(isa):
    x = torch.tensor([-1e30, -200.0, -88.0, -1.0, 0.0, 1.0, 88.0, 200.0, 1e30]).view(1, 1, -1)
    torch.testing.assert_close(causal_conv1d(x, torch.ones(1, 1), activation="silu"), torch.nn.functional.silu(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda x, w, b, s: ((x[0], w), {}), r"x: expected shape \[B, D, T\]"),
        (lambda x, w, b, s: ((x[..., :0], w), {}), "x: expected shape"),
        (
            lambda x, w, b, s: ((x, w[1:]), {}),
            r"weight: expected shape \[33, W\] with W from 1 to 8, got shape \[32, 4\]",
        ),
        (lambda x, w, b, s: ((x, w.repeat(1, 3)), {}), "W from 1 to 8"),
        (lambda x, w, b, s: ((x, w, b[1:]), {}), r"bias: expected shape \[33\]"),
        (lambda x, w, b, s: ((x, w, b), {"activation": "gelu"}), "activation: .* got 'gelu'"),
        (lambda x, w, b, s: ((x, w), {"initial_state": s[..., 1:]}), r"initial_state: expected shape \[2, 33, 3\]"),
        (lambda x, w, b, s: ((x, w), {"cu_seqlens": torch.tensor([0, 9])}), "cu_seqlens: expected B = 1"),
    ],
)
def test_bad_input(arguments, message):
    positional, named = arguments(*inputs(9))
    with pytest.raises(ValueError, match=message):
        causal_conv1d(*positional, **named)


def test_bad_state():
    x, weight, bias, _ = inputs(1)
    with pytest.raises(ValueError, match=r"state: expected shape \[2, 33, S\] with S of at least 3"):
        causal_conv1d_update(x, torch.zeros(2, 33, 2), weight, bias)


def test_gradients_of_the_definition():
    x, weight, bias, before = (t.double().requires_grad_() for t in inputs(5, 3))
    with backend.use("reference"):
        assert torch.autograd.gradcheck(
            lambda x, w, b, s: causal_conv1d(x, w, b, activation="silu", initial_state=s), (x, weight, bias, before)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_a_well_made_torch_operator(layout, dtype):
    x, weight, bias, before = inputs(20, dtype=dtype)
    x = LAYOUTS[layout](x)
    torch.library.opcheck(torch.ops.hasten.causal_conv1d.default, (x, weight, bias, True, before, None))
    state = torch.randn(2, 33, 4, dtype=dtype)
    torch.library.opcheck(torch.ops.hasten.causal_conv1d_update.default, (x, state, weight, bias, True))


@pytest.mark.parametrize("compiler", ["aot_eager"])
def test_compiles(compiler, can_compile):
    x, weight, bias, before = inputs(20)

    def both(x, state):
        return causal_conv1d(x, weight, bias, initial_state=before) + causal_conv1d_update(x, state, weight, bias)

    compiled = torch.compile(both, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(x, torch.ones(2, 33, 4)), both(x, torch.ones(2, 33, 4)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_split_and_carried_in_every_layout(isa, dtype, layout):
    x, weight, bias, _ = inputs(150, B=1, dtype=dtype)
    bounds, before = [0, 1, 3, 70, 150], torch.randn(4, 33, 3).to(dtype)
    packed = causal_conv1d(LAYOUTS[layout](x), weight, bias, initial_state=before, cu_seqlens=torch.tensor(bounds))
    for n in range(4):
        own, state, pieces = x[..., bounds[n] : bounds[n + 1]], before[n : n + 1], []
        assert_close(packed[..., bounds[n] : bounds[n + 1]], definition(own, weight, bias, state)[0])
        for part in own.split(37, -1):
            y, state = causal_conv1d(LAYOUTS[layout](part), weight, bias, initial_state=state, return_state=True)
            pieces.append(y)
        assert torch.equal(torch.cat(pieces, -1), packed[..., bounds[n] : bounds[n + 1]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_threads(isa, dtype, layout, threads):
    x, weight, bias, before = inputs(300, D=515, dtype=dtype)
    x = LAYOUTS[layout](x)
    torch.set_num_threads(1)
    first = causal_conv1d(x, weight, bias, activation="silu", initial_state=before)
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(causal_conv1d(x, weight, bias, activation="silu", initial_state=before), first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_stays_in_its_channel_in_every_layout(isa, layout):
    x, weight, bias, _ = inputs(50)
    x[0, 5, 20] = torch.nan
    y = causal_conv1d(LAYOUTS[layout](x), weight, bias, activation="silu")
    assert y.isnan().nonzero().tolist() == [[0, 5, t] for t in range(20, 24)]


def test_updates_are_the_whole(isa):
    x, weight, bias, _ = inputs(12)
    state = torch.zeros(2, 33, 4)
    steps = [causal_conv1d_update(part, state, weight, bias, activation="silu") for part in x.split(1, -1)]
    torch.testing.assert_close(torch.cat(steps, -1), causal_conv1d(x, weight, bias, activation="silu"))


def test_silu_is_precise_over_the_normal_floats(isa):
    x = torch.cat([torch.linspace(-86, 88, 100_003), torch.logspace(-37, 1, 1001), -torch.logspace(-37, 1, 1001)])
    y = causal_conv1d(x.view(1, 1, -1), torch.ones(1, 1), activation="silu").flatten()
    expected = x.double() / (1 + (-x.double()).exp())
    assert ((y.double() - expected) / expected).abs().max() < 4e-7  # of exp 2e-7, and a sum, a quotient


def test_silu_of_infinity_and_nan(isa):
    x = torch.tensor([torch.inf, torch.nan, -torch.inf]).view(1, 1, -1)
    y = causal_conv1d(x, torch.ones(1, 1), activation="silu").flatten()
    assert y[0] == torch.inf and y[1].isnan()  # and of -inf, as in torch, NaN or 0
