"""linear_attention and delta_rule on CPUs: every form and instruction set against the float64 definition, laws, errors,
torch.compile."""

import pytest
import torch
from harness import assert_close
from recurrence_cases import DECAYS, HV, OPERATORS, SIZES, STATES, H, definition, inputs, log_decay, run, step

from hasten.kernels import backend
from hasten.kernels.recurrence.delta_rule import chunked as delta_chunked
from hasten.kernels.recurrence.delta_rule import delta_rule
from hasten.kernels.recurrence.linear_attention import chunked as linear_chunked
from hasten.kernels.recurrence.linear_attention import linear_attention, linear_attention_step


@pytest.fixture(params=OPERATORS)
def operator(request):
    return request.param


def state_tolerance(isa, dtype, operator):
    """Of a state in float32: where products are of bfloat16, its tokens' keys or values were rounded once, and for the
    delta rule all that was read of it before."""
    if dtype != torch.bfloat16 or isa not in ("amx", "avx512bf16", "neon_bf16"):
        return None
    return 1e-2 if operator == "delta_rule" else 2e-3


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize(("T", "K", "V"), SIZES)
def test_is_the_definition(isa, dtype, operator, T, K, V, kind, poisoned):
    tensors, decay = inputs(operator, T, K, V, dtype), log_decay(kind, 2, T, K)
    state = torch.randn(2, HV, K, V)
    o, final = run(operator, tensors, decay, state)
    expected_o, expected_final = definition(operator, tensors, decay, state)
    assert_close(o, expected_o)
    assert_close(final, expected_final, state_tolerance(isa, dtype, operator))


@pytest.mark.parametrize("layout", STATES)
@pytest.mark.parametrize("kind", DECAYS)
def test_step_is_the_definition(isa, dtype, operator, kind, layout, poisoned):
    for T, K, V in ((1, 24, 17), (3, 64, 129), (1, 40, 64)):
        tensors, decay = inputs(operator, T, K, V, dtype), log_decay(kind, 2, T, K)
        state = torch.randn(2, HV, K, V)
        o, final = definition(operator, tensors, decay, state)
        mine = STATES[layout](state)
        assert_close(step(operator, tensors, mine, decay), o)
        assert_close(mine, final)


@pytest.mark.parametrize("kind", DECAYS)
def test_chunks_in_plain_torch(operator, kind):
    for T in (1, 65, 1100):
        tensors, decay = inputs(operator, T, dtype=torch.float64), log_decay(kind, 2, T, 24, dtype=torch.float64)
        state = torch.randn(2, HV, 24, 17, dtype=torch.float64)
        if operator == "delta_rule":
            found = delta_chunked.delta_rule(*tensors, decay, 0.3, state, True)
        else:
            found = linear_chunked.linear_attention(*tensors, decay, 0.3, state)
        torch.testing.assert_close(found, definition(operator, tensors, decay, state), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(run(operator, tensors, decay, state), found, rtol=0, atol=0)


def test_long(operator):
    tensors, decay = inputs(operator, 4097, 16, 8, B=1), log_decay("token", 1, 4097, 16)
    o, state = run(operator, tensors, decay)
    expected, final = definition(operator, tensors, decay)
    assert_close(o, expected)
    assert_close(state, final)


def test_linear_attention_is_a_masked_product():
    """Against the full matrix, written out."""
    T, K, V = 70, 9, 5
    q, k, v = (x.double() for x in inputs("linear_attention", T, K, V))
    decay = log_decay("component", 2, T, K).double()
    total = decay.cumsum(1)
    q, k = (x.repeat_interleave(2, 2) for x in (q, k))
    between = (total[:, :, None] - total[:, None]).masked_fill(
        ~torch.ones(T, T).tril().bool()[:, :, None, None], -torch.inf
    )
    scores = torch.einsum("bihk,bjhk,bijhk->bhij", q, k, between.exp())
    expected = torch.einsum("bhij,bjhv->bihv", scores, v)
    torch.testing.assert_close(linear_attention(q[:, :, ::2], k[:, :, ::2], v, decay=decay), expected)


def test_delta_rule_is_a_product_of_matrices():
    """S_t = (I - beta k k^T) Diag(a) S_{t-1} + beta k v^T, written out for one head."""
    T, K, V = 12, 5, 4
    q, k, v, beta = torch.randn(T, K), torch.randn(T, K), torch.randn(T, V), torch.rand(T)
    decay = -torch.rand(T, K)
    S, expected = torch.zeros(K, V), []
    for t in range(T):
        S = (torch.eye(K) - beta[t] * torch.outer(k[t], k[t])) @ (decay[t].exp()[:, None] * S) + beta[t] * torch.outer(
            k[t], v[t]
        )
        expected.append(S.t() @ q[t])
    own = [x[None, :, None].double() for x in (q, k, v)]
    o = delta_rule(*own, beta[None, :, None], decay=decay[None, :, None])
    torch.testing.assert_close(o[0, :, 0].float(), torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", DECAYS)
def test_split_and_carry(isa, operator, kind):
    T = 150
    tensors, decay = inputs(operator, T), log_decay(kind, 2, T, 24)

    def part(x, own):
        return x if x is None or x.dim() == 1 else x[:, own]

    whole, final = run(operator, tensors, decay)
    state, pieces = None, []
    for own in (slice(0, 1), slice(1, 70), slice(70, 150)):
        o, state = run(operator, [x[:, own] for x in tensors], part(decay, own), state)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", DECAYS)
def test_packed_sequences_are_separate(isa, operator, kind, integers):
    bounds = [0, 1, 65, 70, 150]
    tensors, decay = inputs(operator, 150, B=1), log_decay(kind, 1, 150, 24)
    states = torch.randn(4, HV, 24, 17)
    packed, finals = run(operator, tensors, decay, states, cu_seqlens=torch.tensor(bounds, dtype=integers))
    for n in range(4):
        own = slice(bounds[n], bounds[n + 1])
        alone = decay if decay is None or decay.dim() == 1 else decay[:, own]
        o, final = run(operator, [x[:, own] for x in tensors], alone, states[n : n + 1])
        assert torch.equal(packed[:, own], o) and torch.equal(finals[n : n + 1], final)


@pytest.mark.parametrize("kind", DECAYS)
def test_reverse_is_flipped(kind):
    tensors, decay, state = inputs("linear_attention", 70), log_decay(kind, 2, 70, 24), torch.randn(2, HV, 24, 17)
    flipped = decay if decay is None or decay.dim() == 1 else decay.flip(1)
    o, final = run("linear_attention", tensors, decay, state, reverse=True)
    expected, expected_final = run("linear_attention", [x.flip(1) for x in tensors], flipped, state)
    assert torch.equal(o, expected.flip(1)) and torch.equal(final, expected_final)
    packed = run(
        "linear_attention", [x[:1] for x in tensors], reverse=True, cu_seqlens=torch.tensor([0, 9, 70]), state=state
    )
    first = run("linear_attention", [x[:1, :9] for x in tensors], reverse=True, state=state[:1])
    assert torch.equal(packed[0][:, :9], first[0]) and torch.equal(packed[1][:1], first[1])


@pytest.mark.parametrize("kind", DECAYS)
def test_strengths_of_writing_are_factors_of_v(isa, dtype, kind):
    q, k, v = inputs("linear_attention", 70, dtype=dtype)
    beta, decay, state = torch.rand(2, 70, HV), log_decay(kind, 2, 70, 24), torch.randn(2, HV, 24, 17)
    o, final = run("linear_attention", (q, k, v), decay, state, beta=beta)
    expected = definition("linear_attention", (q, k, v.double() * beta[..., None].double()), decay, state)
    assert_close(o, expected[0])
    assert_close(final, expected[1], state_tolerance(isa, dtype, "linear_attention"))
    S = state.clone()
    linear_attention_step(q, k, v, S, beta=beta, decay=decay)
    assert_close(S, expected[1])
    packed = torch.tensor([0, 9, 70])
    o, _ = run(
        "linear_attention", [x[:1] for x in (q, k, v)], packed_decay(decay), None, beta=beta[:1], cu_seqlens=packed
    )
    alone, _ = run("linear_attention", [x[:1, 9:] for x in (q, k, v)], packed_decay(decay, 9), None, beta=beta[:1, 9:])
    assert torch.equal(o[:, 9:], alone)


def packed_decay(decay, begin=0):
    return decay if decay is None or decay.dim() == 1 else decay[:1, begin:]


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalised"])
def test_what_skips_the_state_is_added(isa, dtype, normalize):
    q, k, v = (x.abs() for x in inputs("linear_attention", 70, V=40, dtype=dtype))
    skip, decay, packed = torch.randn(HV), log_decay("token", 2, 70, 24), torch.tensor([0, 9, 70])
    settings = {"normalize": normalize, "skip": skip}
    o, state = run("linear_attention", (q, k, v), decay, **settings)
    expected, _ = definition("linear_attention", (q, k, v), decay, normalize=normalize)
    assert_close(o, expected + skip.double()[:, None] * v.double())
    with backend.use("reference"):
        assert_close(run("linear_attention", (q, k, v), decay, **settings)[0], expected + skip[:, None] * v.double())
    first = linear_attention_step(q, k, v, torch.zeros_like(state), decay=decay, scale=0.3, **settings)
    assert_close(first, o.double())
    alone = run("linear_attention", [x[:1, 9:] for x in (q, k, v)], decay[:1, 9:], **settings)[0]
    assert torch.equal(
        run("linear_attention", [x[:1] for x in (q, k, v)], decay[:1], cu_seqlens=packed, **settings)[0][:, 9:], alone
    )
    with pytest.raises(ValueError, match=r"skip: expected shape \[4\], got shape \[3\]"):
        linear_attention(q, k, v, skip=skip[:3])


@pytest.mark.parametrize("kind", DECAYS)
def test_outputs_of_halves_in_float32(isa, kind):
    for half in (torch.bfloat16, torch.float16):
        tensors, decay = inputs("linear_attention", 70, dtype=half), log_decay(kind, 2, 70, 24)
        o, state = run("linear_attention", tensors, decay, out_dtype=torch.float32)
        rounded, same = run("linear_attention", tensors, decay)
        assert o.dtype == torch.float32 and torch.equal(o.to(half), rounded) and torch.equal(state, same)
    with pytest.raises(
        TypeError, match=r"out_dtype: expected torch\.float16, torch\.float32 or None, got torch\.float64"
    ):
        run("linear_attention", tensors, out_dtype=torch.float64)


def test_normaliser(isa, dtype):
    q, k, v = (x.abs() for x in inputs("linear_attention", 100, dtype=dtype))
    decay, state = log_decay("token", 2, 100, 24), torch.rand(2, HV, 24, 18)
    o, final = run("linear_attention", (q, k, v), decay, state, normalize=True)
    expected, expected_final = definition("linear_attention", (q, k, v), decay, state, normalize=True)
    assert_close(o, expected)
    assert_close(final, expected_final, state_tolerance(isa, dtype, "linear_attention"))
    ones = linear_attention(q, k, torch.ones_like(v), normalize=True)
    torch.testing.assert_close(ones, torch.ones_like(v), rtol=1e-2, atol=1e-2)
    S = state.clone()
    first = linear_attention_step(q[:, :1], k[:, :1], v[:, :1], S, decay=decay[:, :1], scale=0.3, normalize=True)
    assert_close(first, expected[:, :1])


def test_bits_do_not_depend_on_threads_or_calls(isa, operator, threads):
    tensors, decay = inputs(operator, 150), log_decay("component", 2, 150, 24)
    torch.set_num_threads(1)
    first = run(operator, tensors, decay)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        again = run(operator, tensors, decay)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_strides(isa, dtype, operator):
    tensors, decay = inputs(operator, 70, 24, 24, dtype), log_decay("component", 2, 70, 24)
    expected = run(operator, tensors, decay)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    tokens_last = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in tensors]
    fused = torch.cat([x.flatten(2) for x in tensors[:3]], -1)
    slices = [x.unflatten(-1, (-1, 24)) for x in fused.split([H * 24, H * 24, HV * 24], -1)] + tensors[3:]
    for strided in (heads_first, tokens_last, slices):  # convolutions leave the second
        for other_decay in (decay, decay.transpose(1, 3).contiguous().transpose(1, 3)):
            found = run(operator, strided, other_decay)
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_inputs_are_left_alone(operator):
    tensors, decay, state = inputs(operator, 70), log_decay("component", 2, 70, 24), torch.randn(2, HV, 24, 17)
    before = [x.clone() for x in (*tensors, decay, state)]
    run(operator, tensors, decay, state)
    assert all(torch.equal(x, y) for x, y in zip(before, (*tensors, decay, state), strict=True))


def test_zero_vectors_have_no_direction():
    q, k, v, beta = inputs("delta_rule", 5)
    assert run("delta_rule", [torch.zeros_like(q), torch.zeros_like(k), v, beta])[0].eq(0).all()


BAD = {
    "length of k": (lambda q, k, v: ((q, k[:, 1:], v), {}), r"k: expected \[2, 9, 2, 24\], the shape of q"),
    "heads of v": (lambda q, k, v: ((q, k, v[:, :, :3]), {}), "v: expected a multiple of the 2 heads of q and k, got 3"),
    "length of v": (lambda q, k, v: ((q, k, v[:, 1:]), {}), "v: expected shape"),
    "no tokens": (lambda q, k, v: ((q[:, :0], k[:, :0], v[:, :0]), {}), "T = 0"),
    "K of 0": (lambda q, k, v: ((q[..., :0], k[..., :0], v), {}), "q: expected B, H and K"),
    "dimensions": (lambda q, k, v: ((q[0], k, v), {}), r"q: expected shape \[B, T, H, K\]"),
    "dtype of k": (lambda q, k, v: ((q, k.half(), v), {}), "k: expected torch.float32, the dtype of q, got torch.float16", TypeError),
    "integers": (lambda q, k, v: ((q.int(), k, v), {}), "q: expected a floating dtype", TypeError),
    "device": (lambda q, k, v: ((q, k, v.to("meta")), {}), "v: expected on cpu"),
    "positive decay": (lambda q, k, v: ((q, k, v), {"decay": torch.tensor([-1.0, 0, 0.5, 0])}), "decay: expected logarithms .* got 0.5"),
    "shape of decay": (lambda q, k, v: ((q, k, v), {"decay": torch.zeros(2)}), r"decay: expected shape \[4\]"),
    "state's shape": (lambda q, k, v: ((q, k, v), {"state": torch.zeros(2, 4, 17, 24)}), r"initial_state: expected shape \[2, 4, 24, 17\]"),
    "state's dtype": (lambda q, k, v: ((q, k, v), {"state": torch.zeros(2, 4, 24, 17).half()}), "initial_state: expected torch.float32", TypeError),
    "packed rows": (lambda q, k, v: ((q, k, v), {"cu_seqlens": torch.tensor([0, 9])}), "cu_seqlens: expected B = 1"),
    "packed short": (lambda q, k, v: ((q[:1], k[:1], v[:1]), {"cu_seqlens": torch.tensor([0, 5])}), r"cu_seqlens: .* T = 9, got \[0, 5\]"),
    "packed falling": (lambda q, k, v: ((q[:1], k[:1], v[:1]), {"cu_seqlens": torch.tensor([0, 5, 4, 9])}), "cu_seqlens: expected to rise"),
    "packed floats": (lambda q, k, v: ((q[:1], k[:1], v[:1]), {"cu_seqlens": torch.tensor([0.0, 9])}), "cu_seqlens: expected torch.int32 or torch.int64", TypeError),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(operator, case):
    *qkv, beta = [*inputs(operator, 9), None][:4]
    change, message, *error = BAD[case]
    tensors, settings = change(*qkv)
    if operator == "delta_rule":
        tensors = (*tensors, beta[: tensors[2].shape[0], : tensors[2].shape[1], : tensors[2].shape[2]])
    with pytest.raises(*error or [ValueError], match=message):
        run(operator, tensors, **settings)


def test_normaliser_in_float16_does_not_overflow():
    q, v = torch.full((1, 1024, 1, 64), 3.0).half(), torch.rand(1, 1024, 1, 8).half()
    o, state = linear_attention(q, q, v, normalize=True, return_state=True)
    expected = v.double().cumsum(1) / torch.arange(1, 1025)[:, None, None]
    torch.testing.assert_close(o.double(), expected, rtol=2e-3, atol=0)
    step = linear_attention_step(q[:, :1], q[:, :1], v[:, :1], state, normalize=True)
    torch.testing.assert_close(step.double(), expected[:, -1:], rtol=5e-3, atol=0)


def test_bad_state_of_a_step(operator):
    state = torch.zeros(1, HV, 24, 17).expand(2, HV, 24, 17)
    with pytest.raises(ValueError, match="state: expected memory of its own"):
        step(operator, inputs(operator, 1), state)


def test_a_nan_does_not_hide_a_positive_decay(operator):
    with pytest.raises(ValueError, match="decay: expected logarithms of at most 0, got 1"):
        run(operator, inputs(operator, 3), torch.tensor([torch.nan, 1.0, 0.0, 0.0]))


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_a_scale_that_is_no_finite_number(operator, choice):
    q, k, v, *beta = inputs(operator, 9, B=1)
    function = {"linear_attention": linear_attention, "delta_rule": delta_rule}[operator]
    with backend.use(choice):
        for settings, error, expected in (
            ({"scale": "1"}, TypeError, "scale: expected a number, got '1'"),
            ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        ):
            with pytest.raises(error, match=expected):
                function(q, k, v, *beta, **settings)


def test_strides_of_a_single_component(isa, dtype, operator):
    for sizes in ((1, 4), (4, 1)):
        tensors = inputs(operator, 40, *sizes, dtype)
        expected = run(operator, tensors)
        tensors[:3] = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors[:3]]
        assert all(torch.equal(x, y) for x, y in zip(run(operator, tensors), expected, strict=True))


def test_bad_beta():
    q, k, v, beta = inputs("delta_rule", 9)
    with pytest.raises(ValueError, match=r"beta: expected shape \[2, 9, 4\], got shape \[2, 9\]"):
        delta_rule(q, k, v, beta[..., 0])


def test_gradients_of_the_definition(operator):
    tensors = [x.double()[:1].requires_grad_() for x in inputs(operator, 3, 3, 2)]
    with backend.use("reference"):
        assert torch.autograd.gradcheck(lambda *x: run(operator, x), tensors)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles(compiler, can_compile, operator):
    tensors, state = inputs(operator, 20), torch.randn(2, HV, 24, 17)

    def both(state, *tensors):
        o, final = run(operator, tensors, state=state)
        return step(operator, [x[:, :1] for x in tensors], state) + o[:, :1], final

    own, compiled_own = state.clone(), state.clone()
    compiled = torch.compile(both, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(compiled_own, *tensors), both(own, *tensors))
    torch.testing.assert_close(compiled_own, own)


def test_is_a_well_made_torch_operator(operator):
    tensors, decay, state = inputs(operator, 20), log_decay("token", 2, 20, 24), torch.randn(2, HV, 24, 17)
    chunk_op, step_op = (getattr(torch.ops.hasten, operator + ending).default for ending in ("", "_step"))
    if operator == "delta_rule":
        torch.library.opcheck(chunk_op, (*tensors, decay, 1.0, state, True, None))
        torch.library.opcheck(step_op, (*tensors, state, decay, 1.0, True))
        return
    tensors.append(torch.rand(2, 20, HV))
    skip = torch.randn(HV)
    torch.library.opcheck(chunk_op, (*tensors, decay, 1.0, state, False, skip, False, None, torch.float32))
    torch.library.opcheck(step_op, (*tensors, state, decay, 1.0, False, skip))
