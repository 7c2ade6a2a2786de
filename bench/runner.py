"""Runs benchmark cases: medians over interleaved calls with cold weights,
against baselines and the memory's bandwidth."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch

from hasten.kernels import backend, cpu

COLD_BYTES = {"cpu": 600 << 20, "cuda": 1 << 30}  # weights to rotate through: more than any last-level cache
OURS = "hasten"
PATIENCE, FEWEST = 15.0, 3


@dataclass(frozen=True)
class Case:
    """One operator on one problem.

    make() builds it and returns what can be run: under OURS and under each baseline's name, calls that do the same on
    different copies of the weights. bytes is what one call has to move, operations what it has to compute (2 for a
    multiplication and an addition).
    """

    op: str
    case: str
    dtype: torch.dtype
    device: str
    bytes: int
    make: Callable[[], dict[str, list[Callable[[], torch.Tensor]]]]
    operations: int = 0


def copies(weight: torch.Tensor, copy: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> list[torch.Tensor]:
    """As many copies of weight as make it cold."""
    return [copy(weight) for _ in range(1 + COLD_BYTES[weight.device.type] // weight.nbytes)]


def run(cases: Iterable[Case], seconds: float = 2.0, rounds: int = 25) -> list[dict]:
    """One record per case and baseline, after measuring each case for at least `rounds` rounds and
    about `seconds` seconds.

    A case that takes longer than PATIENCE seconds has FEWEST rounds.

    op, case, dtype, device, backend, machine; baseline; seconds and baseline_seconds of one call; ratio =
    baseline_seconds /
    seconds (above 1: hasten is faster); share_of_limit = the time that the machine's limits allow over the time taken.
    Limits are the bandwidth that torch reads at and, for a case with operations, the rate of torch's matrix product in
    the case's dtype, both in the same rounds.
    """
    return [record for case in cases for record in _run_case(case, seconds, rounds)]


def machine(device: str) -> str:
    """What the figures of a record are of: the GPU, or the CPU, its threads and the instruction set of the kernels."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    kernels = "no compiled kernels" if cpu.reason() else cpu.isa()
    return f"{cpu.processor()}, {torch.get_num_threads()} threads, {kernels}"


def bandwidth(device: str, turn: int) -> float:
    """Bytes per second that torch reads at just now, cold: the fastest of the probes, once each.
    Count `turn` up from call to call."""
    probes = list(_bandwidth_probes(device).values())
    measure = _measure_cuda if torch.device(device).type == "cuda" else _measure_cpu
    return PROBE_BYTES / min(measure(probes, turn))


@torch.no_grad()
def _run_case(case: Case, seconds: float, rounds: int) -> list[dict]:
    contenders = case.make()
    probes = _bandwidth_probes(case.device)
    if case.operations:
        probes = probes | _rate_probe(case.device, case.dtype)
    measure = _measure_cuda if torch.device(case.device).type == "cuda" else _measure_cpu
    for turn in range(2):
        measure([*contenders.values(), *probes.values()], turn)  # warm up

    times = []
    begin = time.perf_counter()
    while len(times) < rounds or time.perf_counter() - begin < seconds:
        if len(times) >= FEWEST and time.perf_counter() - begin > PATIENCE:
            break
        times.append(measure([*contenders.values(), *probes.values()], len(times)))
    medians = dict(zip([*contenders, *probes], map(median, zip(*times, strict=True)), strict=True))

    limit = case.bytes / max(PROBE_BYTES / medians[name] for name in probes if name != RATE)
    if case.operations:
        limit = max(limit, case.operations / PROBE_OPERATIONS * medians[RATE])
    ours = medians[OURS]
    return [
        {
            "op": case.op,
            "case": case.case,
            "dtype": str(case.dtype).removeprefix("torch."),
            "device": case.device,
            "backend": backend.choose(torch.empty(0, dtype=case.dtype, device=case.device)),
            "machine": machine(case.device),
            "baseline": baseline,
            "seconds": ours,
            "baseline_seconds": medians[baseline],
            "ratio": medians[baseline] / ours,
            "share_of_limit": limit / ours,
        }
        for baseline in contenders
        if baseline != OURS
    ]


def _measure_cpu(contenders, turn: int) -> list[float]:
    """Seconds of one call of each contender, on weights that are cold, after a call on others that is not measured.

    That call makes the rest warm (threads, code, page tables), whoever ran before.
    """
    times = []
    for place, calls in enumerate(contenders):
        calls[_cold(turn, place, len(calls)) - 1]()
        call = calls[_cold(turn, place, len(calls))]
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def _measure_cuda(contenders, turn: int) -> list[float]:
    """The same by the GPU's clock; it sleeps first, so that launching a call is over before the call starts."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in contenders]
    torch.cuda._sleep(2_000_000)
    for place, (calls, (begin, end)) in enumerate(zip(contenders, events, strict=True)):
        call = calls[_cold(turn, place, len(calls))]
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


def _cold(turn: int, place: int, count: int) -> int:
    """The copy to use, two further every turn; contenders that share copies are kept apart by a third
    of the rotation."""
    return (2 * turn + place * count // 3) % count


PROBE_BYTES = 64 << 20
PROBE_SIZE, RATE = 2048, "probe matrix product"
PROBE_OPERATIONS = 2 * PROBE_SIZE**3


@cache
def _bandwidth_probes(device: str) -> dict[str, list[Callable]]:
    """Reductions that torch does at the bandwidth of the memory, each over PROBE_BYTES of more than COLD_BYTES."""
    count = 1 + COLD_BYTES[torch.device(device).type] // PROBE_BYTES
    blocks = torch.ones(count, PROBE_BYTES // 4, device=device)
    return {
        "probe sum": [lambda b=b: b.view(torch.float64).sum() for b in blocks],
        "probe all": [lambda b=b: b.view(torch.uint8).all() for b in blocks],
        "probe dot": [lambda b=b: torch.dot(*b.chunk(2)) for b in blocks],
    }


@cache
def _rate_probe(device: str, dtype: torch.dtype) -> dict[str, list[Callable]]:
    """A product of square matrices by torch."""
    a, b = torch.randn(2, PROBE_SIZE, PROBE_SIZE, dtype=dtype, device=device)
    return {RATE: [lambda: a @ b]}
