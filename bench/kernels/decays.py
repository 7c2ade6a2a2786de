"""How much longer recurrences take under any decay than under -0.5 a token, in each instruction set of this CPU.

A state under a decay soon holds numbers below the smallest normal one, which cost a CPU over a hundred cycles each
where they are not flushed to zero.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

from hasten.kernels import cpu
from hasten.kernels.recurrence.delta_rule import delta_rule, delta_rule_step
from hasten.kernels.recurrence.linear_attention import linear_attention, linear_attention_step
from hasten.kernels.recurrence.selective_scan import selective_scan, selective_scan_step
from hasten.model_facts import progress

from ..runner import machine

logger = logging.getLogger("hasten.bench")

REFERENCE = -0.5
DECAYS = (0.0, -1e-3, -0.1, -1.0, -1.36, -1.4, -2.0, -5.0, -20.0, -50.0)
T, HEADS, SIZE, STEPS = 1024, 4, 128, 64
CHANNELS, COMPONENTS = 1024, 16  # of the selective scan
ROUNDS = 11


def cases() -> dict[str, Callable[[float], Callable[[], object]]]:
    """By name what makes, for a decay, a call that may be repeated."""
    found = {}
    for rule, kind, dtype in product(("linear attention", "delta rule"), SHAPES, (torch.bfloat16, torch.float32)):
        name = f"{rule}, {kind} decay, {str(dtype).removeprefix('torch.')}"
        found[f"{name}, prefill"] = partial(_prefill, rule, kind, dtype)
        found[f"{name}, step"] = partial(_steps, rule, kind, dtype)
    return found | {"selective scan, prefill": _scan, "selective scan, step": _scan_steps}


SHAPES = {
    "constant": lambda T: (HEADS,),
    "scalar": lambda T: (1, T, HEADS),
    "vector": lambda T: (1, T, HEADS, SIZE),
}


def _inputs(rule: str, T: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    qkv = list(torch.randn(3, 1, T, HEADS, SIZE).to(dtype))
    return [*qkv, torch.rand(1, T, HEADS)] if rule == "delta rule" else qkv


def _prefill(rule: str, kind: str, dtype: torch.dtype, g: float) -> Callable[[], object]:
    function = partial(delta_rule, l2_norm=True) if rule == "delta rule" else linear_attention
    return partial(function, *_inputs(rule, T, dtype), decay=torch.full(SHAPES[kind](T), g))


def _steps(rule: str, kind: str, dtype: torch.dtype, g: float) -> Callable[[], object]:
    """Tokens one by one, on a state that the first call left as the decay makes it."""
    tensors, state = _inputs(rule, 1, dtype), torch.randn(1, HEADS, SIZE, SIZE)
    tensors[1] = tensors[1] * 1e-4  # hardly anything is added, so that the state goes on shrinking
    function = partial(delta_rule_step, l2_norm=True) if rule == "delta rule" else linear_attention_step
    step = partial(function, *tensors, state, decay=torch.full(SHAPES[kind](1), g))
    return lambda: [step() for _ in range(STEPS)]


def _scan_inputs(T: int, g: float) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    B, C = torch.randn(2, 1, T, COMPONENTS)
    return [torch.randn(1, T, CHANNELS), torch.ones(1, T, CHANNELS), torch.full((CHANNELS, COMPONENTS), g), B, C]


def _scan(g: float) -> Callable[[], object]:
    return partial(selective_scan, *_scan_inputs(T, g))


def _scan_steps(g: float) -> Callable[[], object]:
    tensors, state = _scan_inputs(1, g), torch.randn(1, CHANNELS, COMPONENTS)
    tensors[3] = tensors[3] * 1e-4
    step = partial(selective_scan_step, *tensors, state)
    return lambda: [step() for _ in range(STEPS)]


@torch.no_grad()
def compare(name: str, make: Callable[[float], Callable[[], object]], isa: str) -> dict:
    """The ratio of each decay's time to that of the reference, medians of calls in turn."""
    with patch.object(cpu, "isa", lambda: isa):
        calls = [make(g) for g in (REFERENCE, *DECAYS)]
        times = [[_seconds(call) for call in calls] for _ in range(1 + ROUNDS)][1:]
    reference, *others = (median(column) for column in zip(*times, strict=True))
    by_decay = {str(g): other / reference for g, other in zip(DECAYS, others, strict=True)}
    return {"case": name, "instruction_set": isa, "ratios": by_decay, "worst": max(by_decay.values())}


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", help="parts of the names of the cases to run; all if there is none")
    parser.add_argument("--json", type=Path, help="write the records there")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    chosen = {
        n: make for n, make in cases().items() if not arguments.patterns or any(p in n for p in arguments.patterns)
    }
    records = []
    for isa, name in progress(list(product(cpu.isas(), chosen)), "decays", unit="case"):
        records.append(compare(name, chosen[name], isa))
        worst = max(records[-1]["ratios"], key=records[-1]["ratios"].get)
        logger.info("%-10s %-52s worst %.2fx (decay %s)", isa, name, records[-1]["worst"], worst)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine("cpu"), "records": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
