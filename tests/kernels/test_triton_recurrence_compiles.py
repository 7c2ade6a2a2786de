"""The Triton kernels of the recurrences compile for every target as their launchers call them; for heads of 128 without
spills on cuda 90, with few barriers there, and in as many programs as fill a GPU.

Ahead of time: this needs no GPU.
"""

import pytest
import torch
from ahead_of_time import POINTERS, TARGETS, barriers, check_fits, check_no_spills, compile_call
from harness import short

from hasten.kernels.recurrence.triton import launches

KERNELS = ("weights_kernel", "pairs_kernel", "corrections_kernel", "states_kernel", "outputs_kernel", "step_kernel")
KINDS = {"token": launches.SCALAR, "component": launches.VECTOR}
H, HV, T = 4, 8, 8192


class Recorder:
    """Stands for a kernel, and keeps what it would be launched with."""

    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.calls.append((self.kernel, grid, arguments, options))


@pytest.fixture
def record(monkeypatch):
    """The calls of kernels that a launcher makes on the target, for heads of one size."""

    def recorded(target, dtype, size, kind, delta, packed=False):
        calls, device = [], torch.device("meta")
        with monkeypatch.context() as patch:
            for name in KERNELS:
                patch.setattr(launches, name, Recorder(getattr(launches, name), calls))
            patch.setattr(launches, "device_of", lambda _: launches.Device(hip=target == "gfx942"))
            q, v = (torch.empty(1, T, heads, size, dtype=dtype, device=device) for heads in (H, HV))
            decay = torch.empty(1, T, HV, *[size] * (kind == "component"), device=device)
            beta, state = torch.empty(1, T, HV, device=device), torch.empty(1, HV, size, size, device=device)
            bounds = torch.empty(2, dtype=torch.int64, device=device) if packed else None
            launches.launch(q, q, v, beta, decay, 1.0, state, delta, bounds, delta=delta)
            launches.step(q, q, v, beta, state, decay, 1.0, delta, delta=delta)
        return calls

    return recorded


@pytest.mark.parametrize("dtype", POINTERS, ids=short)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(record, target, dtype, tmp_path):
    for kind in KINDS:
        for delta in (False, True):
            for kernel, _, arguments, options in record(target, dtype, 128, kind, delta, target != "cuda90"):
                made = compile_call(kernel, arguments, options, target, tmp_path)
                check_fits(made, target)
                if target == "cuda90":
                    check_no_spills(made)


@pytest.mark.parametrize("size", [24, launches.MAX_K])
@pytest.mark.parametrize("target", ["cuda80", "gfx942"])
def test_odd_and_wide_heads_compile(record, target, size, tmp_path):
    """Where shared memory is smallest."""
    dtype = torch.bfloat16 if size == 24 else torch.float32
    for kernel, _, arguments, options in record(target, dtype, size, "component", True):
        check_fits(compile_call(kernel, arguments, options, target, tmp_path), target)


# How often the loops of a kernel run for a chunk of 64 tokens and heads of 128, in the order of the machine code.
TRIPS = {
    "pairs_kernel": (4, 4, 4, 6),  # blocks of K three times, in the last the halvings of a chunk
    "corrections_kernel": {"token": (2, 5, 2, 2), "component": (5, 2, 2)},  # blocks of K, doublings, blocks of V and K
    "states_kernel": (1,),  # the chunks
    "outputs_kernel": (2,),  # blocks of K
}
# Of the kernels before these, which took 16 tokens at a time: 170 and 568 barriers, each counted once.
BARRIERS = {"token": 170 * 64 // 16, "component": 568 * 64 // 16}


@pytest.mark.parametrize("kind", KINDS)
def test_barriers_of_the_delta_rule(record, kind, tmp_path):
    """Per 64 tokens a quarter of before at most, though what a loop repeats is counted as often as it runs."""
    total = 0
    for kernel, _, arguments, options in record("cuda90", torch.bfloat16, 128, kind, True):
        name = kernel.fn.__name__
        if name != "step_kernel":
            trips = TRIPS[name][kind] if isinstance(TRIPS[name], dict) else TRIPS[name]
            total += barriers(compile_call(kernel, arguments, options, "cuda90", tmp_path).code, trips)
    print(f"{kind}: {total} barriers per 64 tokens")
    assert 0 < total <= BARRIERS[kind] / 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delta", [False, True])
def test_programs_fill_a_gpu(kind, delta):
    """At 8192 tokens and 8 heads: four for each of 132 multiprocessors, but for the scan, which is one after another."""
    given = (1, T, HV, 128, 128, torch.bfloat16, KINDS[kind], delta, False, launches.Device())
    grids = launches.grids(*given)
    scan = grids.pop("states")
    assert all(grid.programs >= 4 * 132 for grid in grids.values())
    assert scan.programs == (64 if delta else 128)


def test_programs_are_on_the_axis_that_is_long_enough(record):
    for delta in (False, True):
        for kind in KINDS:
            for _, grid, _, _ in record("cuda90", torch.bfloat16, 128, kind, delta):
                assert len(grid) == 1
    many = launches.grids(512, T, 32, 128, 128, torch.bfloat16, launches.SCALAR, True, False, launches.Device())
    assert many["outputs"].programs > 65_535


def test_warps_where_products_race():
    """On compute capability 10 before Triton 3.8."""
    assert launches.max_warps(True, "3.7.1") == 2
    assert launches.max_warps(True, "3.8.0") == launches.max_warps(False, "3.6.0") == 8
    device = launches.Device(max_warps=2)
    for kind in KINDS.values():
        grids = launches.grids(1, T, HV, 128, 128, torch.bfloat16, kind, True, False, device)
        assert all(grid.num_warps <= 2 for grid in grids.values())
