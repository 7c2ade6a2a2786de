"""The kernels on aarch64, by an emulator: both instruction sets against the float64 definition through the public
operators, how halves are rounded, and the floating-point control of every thread."""

import fcntl
import os

import aarch64
import pytest
import selective_scan_cases
import torch
import wkv_cases
from harness import assert_close
from recurrence_cases import DECAYS, HV, OPERATORS, STATES, definition, double, inputs, log_decay, run, step

from hasten.kernels import backend, cpu, storage
from hasten.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update
from hasten.kernels.column_sparse_linear import column_sparse_linear
from hasten.kernels.expert_linear import expert_linear
from hasten.kernels.linear import linear
from hasten.kernels.row_sparse_linear import row_sparse_linear
from hasten.kernels.suffix_array import suffix_array
from hasten.kernels.tile_product import cpu as tile_product
from hasten.kernels.token_scores import token_scores
from hasten.kernels.transpose import transpose

pytestmark = pytest.mark.skipif(aarch64.missing() is not None, reason=str(aarch64.missing()))
CONTROLS = {"as it starts": 0, "flushed": 1 << 24, "one NaN": 1 << 25, "rounded to zero": 3 << 22}


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of the library, which the processes of a session share."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "aarch64"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "driver").exists():
            aarch64.build(folder)
    return folder


@pytest.fixture(params=aarch64.PROCESSORS)
def machine(request, built, monkeypatch):
    """The public operators run on it."""
    machine = aarch64.Machine(built, request.param)
    machine.patch(monkeypatch)
    yield machine
    assert machine.calls


def test_setup_and_emulator_have_the_same_instruction_sets():
    assert list(aarch64.instruction_sets()) == list(aarch64.PROCESSORS)
    assert set(aarch64.PROCESSORS) < set(cpu.ISAS)


def test_what_a_processor_supports(machine):
    assert machine.run("hasten_supported_neon") == (1, [])
    assert machine.run("hasten_supported_neon_bf16") == (machine.isa == "neon_bf16", [])


# Recurrences


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_recurrences(machine, dtype, operator, kind, poisoned):
    T, K, V = 135, 40, 33
    tensors, decay, state = inputs(operator, T, K, V, dtype), log_decay(kind, 2, T, K), torch.randn(2, HV, K, V)
    o, final = run(operator, tensors, decay, state)
    expected_o, expected_final = definition(operator, tensors, decay, state)
    assert_close(o, expected_o)
    assert_close(final, expected_final, tolerance_of_states(machine, dtype))


def tolerance_of_states(machine, dtype) -> float | None:
    """They are float32, but bf16 products round what was computed and is multiplied again."""
    return 1e-2 if (machine.isa, dtype) == ("neon_bf16", torch.bfloat16) else None


@pytest.mark.parametrize("layout", STATES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_steps(machine, dtype, operator, layout, poisoned):
    T, K, V = 3, 24, 67
    tensors, decay, state = inputs(operator, T, K, V, dtype), log_decay("component", 2, T, K), torch.randn(2, HV, K, V)
    o, final = definition(operator, tensors, decay, state)
    mine = STATES[layout](state)
    assert_close(step(operator, tensors, mine, decay), o)
    assert_close(mine, final)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["token", "component"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_extreme_decays(machine, dtype, operator, kind):
    T, K, V = 100, 64, 32  # tiles without padding
    tensors = inputs(operator, T, K, V, dtype)
    for values in ([-50.0, -0.01, -torch.inf], [-1e-6, -104.0]):
        decay = log_decay(kind, 2, T, K)
        decay = torch.tensor(values)[torch.randint(len(values), decay.shape)]
        o, final = run(operator, tensors, decay)
        expected_o, expected_final = definition(operator, tensors, decay)
        assert_close(o, expected_o)
        assert_close(final, expected_final, tolerance_of_states(machine, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_not_finite_stays_at_and_after_its_token(machine, dtype, operator):
    tensors, decay = inputs(operator, 70, dtype=dtype), log_decay("token", 2, 70, 24)
    expected, _ = definition(operator, tensors, decay)
    for i, value in ((1, torch.nan), (2, torch.inf)):
        spoilt = [x.clone() for x in tensors]
        spoilt[i][0, 30] = value
        o, state = run(operator, spoilt, decay)
        assert_close(o[:, :30], expected[:, :30])
        assert_close(o[1], expected[1])
        assert not o[0, 30:].isfinite().any() and state[1].isfinite().all()


def test_normaliser_and_packed_sequences(machine, dtype):
    q, k, v = (x.abs() for x in inputs("linear_attention", 100, dtype=dtype, B=1))
    state, bounds = torch.rand(3, HV, 24, 18), torch.tensor([0, 1, 66, 100])
    settings = {"state": state, "normalize": True, "cu_seqlens": bounds}
    decay = log_decay("token", 1, 100, 24)
    o, final = run("linear_attention", (q, k, v), decay, **settings)
    expected, expected_final = definition("linear_attention", (q, k, v), decay, **settings)
    assert_close(o, expected)
    assert_close(final, expected_final, tolerance_of_states(machine, dtype))


def test_selective_scan(machine, dtype, poisoned):
    arguments, state = selective_scan_cases.inputs(50, 33, 17, dtype), torch.randn(2, 33, 17)
    y, final = selective_scan_cases.definition(arguments, state)
    found, found_final = selective_scan_cases.run(arguments, state)
    assert_close(found, y)
    assert_close(found_final, final)
    assert_close(selective_scan_cases.step(arguments, state), y)
    assert_close(state, final)


def test_wkv(machine, dtype, poisoned):
    tensors, state = wkv_cases.inputs(50, 33, dtype), wkv_cases.some_state(33)
    for found, expected in zip(wkv_cases.run(tensors, state), wkv_cases.definition(tensors, state), strict=True):
        assert_close(found, expected)


# The other operators


def test_tile_products(machine, poisoned):
    a, b = torch.randn(70, 40).bfloat16(), torch.randn(40, 33).bfloat16()
    assert_close(tile_product.launch(a, b), a.double() @ b.double())


def linear_inputs(B, N, K, dtype):
    return [x.to(dtype) for x in (torch.randn(B, K), torch.randn(N, K), torch.randn(N))]


@pytest.mark.parametrize(("B", "N", "K"), [(1, 37, 53), (2, 129, 300), (3, 31, 4), (8, 65, 131)])
def test_linear_layers(machine, dtype, B, N, K, poisoned):
    x, weight, bias = linear_inputs(B, N, K, dtype)
    columns, cutoff = storage.to_column_major(weight), torch.rand(K)
    gate, threshold = torch.randn(B, N).to(dtype), torch.tensor(0.7)
    cutoff[0], gate[0, 0] = -1, 2  # at least one column and one row is active
    wide_x, wide, wide_columns, wide_gate, wide_bias = double([x, weight, columns, gate, bias])
    assert_close(linear(x, weight, bias), linear(wide_x, wide, wide_bias))
    for own in (None, cutoff):
        expected = column_sparse_linear(wide_x, wide_columns, own, wide_bias)
        assert_close(column_sparse_linear(x, columns, own, bias), expected)
    expected = row_sparse_linear(wide_x, wide, wide_gate, threshold, wide_bias)
    assert_close(row_sparse_linear(x, weight, gate, threshold, bias), expected)


def test_experts(machine, dtype, poisoned):
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((5, 53), (4, 37, 53), (4, 37)))
    ids, cutoff = torch.randint(4, (5, 3)), torch.rand(4, 53)
    for own, settings in ((weight, {}), (storage.to_column_major(weight), {"cutoff": cutoff})):
        wide_x, wide, wide_bias = double([x, own, bias])
        expected = expert_linear(wide_x, wide, ids, bias=wide_bias, **settings)
        assert_close(expert_linear(x, own, ids, bias=bias, **settings), expected)


@pytest.mark.parametrize("layout", ["channels last", "tokens last"])
def test_convolutions(machine, dtype, layout, poisoned):
    x, weight, bias, before = (torch.randn(shape).to(dtype) for shape in ((2, 33, 70), (33, 4), (33,), (2, 33, 3)))
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "channels last" else x
    *wide, wide_before = double([x, weight, bias, before])
    expected = causal_conv1d(*wide, initial_state=wide_before, activation="silu")
    assert_close(causal_conv1d(x, weight, bias, initial_state=before, activation="silu"), expected)
    found = causal_conv1d_update(x[..., :2].contiguous(), before, weight, bias, activation="silu")
    assert_close(found, expected[..., :2])


def test_scores_of_tokens(machine, dtype, poisoned):
    query, key = torch.randn(2, 3, 6, 72).to(dtype), torch.randn(2, 2, 129, 72).to(dtype)
    allowed = torch.rand(2, 129) > 0.3
    for softcap in (None, 0.5):
        expected = token_scores(query.double(), key.double(), allowed, softcap=softcap)
        assert_close(token_scores(query, key, allowed, softcap=softcap), expected)


def test_what_only_moves(machine, dtype):
    x = torch.randn(3, 65, 37).to(dtype)
    assert torch.equal(transpose(x), x.mT)
    text = torch.randint(4, (300,), dtype=torch.uint8)
    with backend.use("reference"):
        expected = suffix_array(text)
    assert torch.equal(suffix_array(text), expected)


# Numbers


def every_half(dtype) -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x [D] times a factor, by a convolution of one token, and by one whose vectors are of tokens."""
    weight = torch.tensor([[factor]], dtype=x.dtype)
    by_token = causal_conv1d(x[None, :, None], weight.expand(len(x), 1))[0, :, 0]
    by_channel = causal_conv1d(x[None, None], weight)[0, 0]
    assert torch.equal(by_token.view(torch.int16), by_channel.view(torch.int16))
    return by_token


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, -0.7109375, 0.0001220703125, 3000.0])
def test_halves_are_rounded_to_nearest_even(machine, dtype, factor):
    """The products are exact in float32, and torch rounds them so."""
    x = every_half(dtype)
    exact = x.float() * torch.tensor(factor, dtype=dtype).float()
    smallest = torch.finfo(torch.float32).tiny
    expected = torch.where((x.float().abs() < smallest) | (exact.abs() < smallest), exact * 0, exact).to(dtype)
    found = scaled(x, factor)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("control", CONTROLS)
def test_control_is_restored_in_every_thread(machine, threads, control):
    """`Machine.run` looks at it."""
    machine.control = CONTROLS[control]
    torch.set_num_threads(2)
    x, weight, _ = linear_inputs(1, 256, 300, torch.float32)
    linear(x, weight)
    run("linear_attention", inputs("linear_attention", 3))


def test_numbers_below_the_smallest_normal_one_are_zero_in_every_thread(machine, threads):
    torch.set_num_threads(2)
    for x, weight in ((2.0**-100, 2.0**-35), (2.0**-130, 2.0**10)):
        assert not linear(torch.full((1, 300), x), torch.full((256, 300), weight)).any()


@pytest.mark.parametrize("operator", OPERATORS)
def test_bits_do_not_depend_on_threads(machine, threads, operator):
    tensors, decay = inputs(operator, 70, dtype=torch.bfloat16), log_decay("component", 2, 70, 24)
    torch.set_num_threads(1)
    first = run(operator, tensors, decay)
    torch.set_num_threads(2)
    assert all(torch.equal(x, y) for x, y in zip(first, run(operator, tensors, decay), strict=True))
