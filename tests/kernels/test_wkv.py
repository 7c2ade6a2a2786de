"""wkv on CPUs: every instruction set against the float64 definition, laws, errors, torch.compile."""

import pytest
import torch
from harness import assert_close
from wkv_cases import LAYOUTS, definition, inputs, run, some_state

from hasten.kernels import backend
from hasten.kernels.recurrence.wkv import wkv


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("T", "D"), [(1, 1), (1, 70), (2, 64), (50, 33), (40, 200)])
def test_is_the_definition(isa, dtype, layout, T, D, poisoned):
    tensors = inputs(T, D, dtype)
    laid = [*tensors[:2], *map(LAYOUTS[layout], tensors[2:])]
    for state in (None, some_state(D)):
        found, expected = run(laid, state), definition(tensors, state)
        assert found[0].dtype == dtype and found[0].is_contiguous()
        for x, y in zip(found, expected, strict=True):
            assert_close(x, y)


def test_is_a_weighted_mean():
    """The weights of all tokens, written out."""
    time_decay, time_first, key, value = (x.double() for x in inputs(20))
    steps = torch.arange(20)
    age = (steps[:, None] - 1 - steps)[..., None]  # [t, i, 1]
    exponents = key[:, None] - age * time_decay.exp()  # [B, t, i, D]
    exponents = torch.where(age < 0, (key + time_first)[:, None].expand_as(exponents), exponents)
    exponents = exponents.masked_fill(age < -1, -torch.inf)
    expected = (exponents.softmax(2) * value[:, None]).sum(2)
    torch.testing.assert_close(wkv(time_decay, time_first, key, value), expected)
    assert_close(wkv(*(x.float() for x in (time_decay, time_first, key, value))), expected)


def test_large_exponents(isa):
    for spread in (80.0, 1e4):
        time_decay, time_first, key, value = inputs(60)
        tensors = [time_decay + 3, time_first, spread * key, value]
        found, expected = run(tensors), definition(tensors)
        assert_close(found[0], expected[0], 1e-4)  # the rounding of keys that large
        assert all(x.isfinite().all() for x in found)


def test_keys_that_are_shifted_weigh_the_same(isa):
    time_decay, time_first, key, value = inputs(30)
    shifted = wkv(time_decay, time_first, key + 8, value)
    assert_close(shifted, wkv(time_decay, time_first, key, value))
    ones = wkv(time_decay, time_first, key, torch.ones_like(value))
    torch.testing.assert_close(ones, torch.ones_like(value))


def test_split_and_carry_and_steps(isa):
    time_decay, time_first, key, value = inputs(20, 70)
    whole = run([time_decay, time_first, key, value])
    for lengths in ([1, 12, 7], [1] * 20):
        state, pieces = None, []
        for k, v in zip(key.split(lengths, 1), value.split(lengths, 1), strict=True):
            y, *state = run([time_decay, time_first, k, v], state)
            pieces.append(y)
        for found, expected in zip((torch.cat(pieces, 1), *state), whole, strict=True):
            assert torch.equal(found, expected)


def test_bits_do_not_depend_on_threads(isa, threads):
    tensors, state = inputs(300, 150), some_state(150)
    torch.set_num_threads(1)
    first = run(tensors, state)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert all(torch.equal(x, y) for x, y in zip(first, run(tensors, state), strict=True))


@pytest.mark.parametrize("i", [2, 3], ids=["key", "value"])
def test_a_nan_stays_at_and_after_its_token(isa, i):
    tensors, state = inputs(30), some_state()
    clean = run(tensors, state)
    tensors[i][0, 10, 5] = torch.nan
    found = run(tensors, state)
    reached = torch.zeros(2, 30, 33, dtype=torch.bool)
    reached[0, 10:, 5] = True
    assert torch.equal(found[0].isnan(), reached) and torch.equal(found[0][~reached], clean[0][~reached])
    for x, y in zip(found[1:], clean[1:], strict=True):
        assert torch.equal(x[~reached[:, -1]], y[~reached[:, -1]])


def test_inputs_are_left_alone(isa):
    tensors, state = inputs(30), some_state()
    before = [x.clone() for x in (*tensors, *state)]
    run(tensors, state)
    assert all(torch.equal(x, y) for x, y in zip(before, (*tensors, *state), strict=True))


def test_without_a_state():
    tensors = inputs(5)
    assert torch.equal(wkv(*tensors), run(tensors)[0])


STATE = [torch.zeros(2, 33)] * 3
BAD = {
    "dimensions": ({"key": torch.zeros(9, 33)}, r"key: expected shape \[B, T, D\], .* got shape \[9, 33\]"),
    "no tokens": ({"key": torch.zeros(2, 0, 33)}, r"key: expected shape \[B, T, D\], each of at least 1"),
    "length": ({"value": torch.zeros(2, 8, 33)}, r"value: expected shape \[2, 9, 33\], got shape \[2, 8, 33\]"),
    "dtype": ({"value": torch.zeros(2, 9, 33).half()}, "value: expected torch.float32, the dtype of key", TypeError),
    "decay": ({"time_decay": torch.zeros(1)}, r"time_decay: expected shape \[33\], got shape \[1\]"),
    "first": ({"time_first": torch.zeros(33).int()}, "time_first: expected a floating dtype", TypeError),
    "two": ({"state": STATE[:2]}, r"state: expected three tensors \(numerator, denominator, maximum\)", TypeError),
    "no tensor": ({"state": [*STATE[:2], 0]}, "maximum: expected a tensor, got 0", TypeError),
    "rows": ({"state": [*STATE[:2], torch.zeros(1, 33)]}, r"maximum: expected shape \[2, 33\], got shape \[1, 33\]"),
    "halves": ({"state": [STATE[0].half(), *STATE[1:]]}, "numerator: expected torch.float32, got", TypeError),
    "device": ({"state": [STATE[0], torch.zeros(2, 33, device="meta"), STATE[2]]}, "denominator: expected on cpu"),
}


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, choice):
    changes, message, *error = BAD[case]
    good = dict(zip(("time_decay", "time_first", "key", "value"), inputs(9), strict=True))
    with backend.use(choice), pytest.raises(*error or [ValueError], match=message):
        wkv(**good | changes)


def test_gradients_of_the_definition():
    tensors = [x.double().requires_grad_() for x in (*inputs(4, 3), *some_state(3))]
    with backend.use("reference"):
        assert torch.autograd.gradcheck(lambda *x: run(x[:4], x[4:]), tensors)


@pytest.mark.parametrize("compiler", ["aot_eager"])
def test_compiles(compiler, can_compile):
    tensors, state = inputs(20), some_state()
    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(tensors, state), run(tensors, state))


def test_is_a_well_made_torch_operator():
    for state in (some_state(), (None, None, None)):
        torch.library.opcheck(torch.ops.hasten.wkv.default, (*inputs(20), *state))
