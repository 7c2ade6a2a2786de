"""How long `hasten.accelerate`, `calibrate` and `revert` take on a random-weight Llama of 1.1 B parameters."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

import hasten
from hasten.acceleration.measure import seconds
from hasten.bench.runtime.decode import CALIBRATION_TOKENS, llama_1b

ROUNDS = 2  # the first also learns which kernels pay on this machine, where that is not in the cache file yet


def compare(rounds: int = ROUNDS) -> list[dict]:
    """Records {"case", "seconds": one for each round}, in the order in which they were taken."""
    model = llama_1b().requires_grad_(True)  # as from_pretrained returns it
    ids = torch.randint(32000, (1, CALIBRATION_TOKENS), generator=torch.Generator().manual_seed(1))
    statistics: list[hasten.Statistics] = []
    dense, wina = hasten.DenseDecode(), hasten.Wina(0.5)
    steps: dict[str, Callable[[], object]] = {}
    for name, plan in (("DenseDecode()", dense), ("Wina(0.5)", wina)):
        if plan is wina:
            steps[f"calibrate for Wina, {CALIBRATION_TOKENS} tokens"] = lambda: statistics.append(
                hasten.calibrate(model, wina, ids)
            )
        for measured in (False, True):
            steps[f"{name}, {'measured' if measured else 'measure_speed=False'}"] = lambda plan=plan, on=measured: (
                hasten.accelerate(model, plan, calibration=statistics[-1] if plan is wina else None, measure_speed=on)
            )
            steps[f"revert {name}" + measured * ", again"] = lambda: hasten.revert(model)
    steps[f"Wina(0.5), by default: calibrated on {CALIBRATION_TOKENS} tokens, speed and drift"] = lambda: (
        hasten.accelerate(model, wina, calibration=ids)
    )
    steps["revert Wina(0.5), at last"] = lambda: hasten.revert(model)
    records = {case: {"case": case, "seconds": []} for case in steps}
    for _ in range(rounds):
        for case, step in steps.items():
            records[case]["seconds"].append(seconds(step, torch.device("cpu")))
    return list(records.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="write the records there")
    arguments = parser.parse_args()
    results = compare(arguments.rounds)
    for record in results:
        print(f"{record['case']:75}" + "".join(f"{value:8.2f} s" for value in record["seconds"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
