"""What fewer image tokens cost in accuracy: every score, merging and searched schedules on the embedded model that
answers questions about digits, over a thousand questions or more that no search has seen.

The rows of `hasten demo vision`, on more questions; differences between rows are taken question by question.
"""

import argparse
import json
import math
import platform
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch

from hasten.cli import demo_vision, tables
from hasten.cli.demo_vision import BUDGET, CONFIDENCE, Result
from hasten.models.digit_questions import digit_questions

QUESTIONS, SEARCHED, EVALUATIONS, SEED = 1500, 400, 24, 11


def difference(one: Result, other: Result) -> dict[str, float]:
    """The mean of one's accuracy minus the other's, and half of its 95 % interval, question by question."""
    each = [a - b for a, b in zip(one.correct, other.correct, strict=True)]
    error = CONFIDENCE * statistics.stdev(each) / math.sqrt(len(each))
    return {"difference": statistics.fmean(each), "error": error}


def compare(questions: int, searched: int, evaluations: int) -> dict:
    """The results, the schedules that were found, and the differences that matter."""
    model, processor = demo_vision.embedded()
    found = demo_vision.search(model, processor, searched, evaluations)
    asked = demo_vision.asked(model, processor, digit_questions(questions, SEED))
    compared = demo_vision.variants(model, asked, found, quick=False)
    results = {result.name: result for result in demo_vision.compare(model, asked, compared)}
    demo_vision.show(list(results.values()), questions)
    full = next(iter(results.values()))
    sigmoid, random = results[f"P-Sigmoid, {BUDGET:.0%} of operations"], results["G-Search, random"]
    pairs = [(sigmoid, results[f"{name}, {BUDGET:.0%} of operations"]) for name in ("fixed ratio", "pyramid")]
    pairs += [(results["G-Search, no loss"], full), (results["G-Search, no loss"], random)]
    pairs += [
        (results[f"{keep:.0%}, {name}"], results[f"{keep:.0%}, random"])
        for keep in demo_vision.KEEPS
        for name in ("last token", "text raters", "vision side", "merging")
    ]
    differences = [{"of": one.name, "from": other.name} | difference(one, other) for one, other in pairs]
    return {
        "questions": questions,
        "searched_on": searched,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "searched": {name: schedule.to_dict() for name, schedule in found.items()},
        "results": [{k: v for k, v in asdict(result).items() if k != "correct"} for result in results.values()],
        "differences": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--searched", type=int, default=SEARCHED)
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS)
    parser.add_argument("--json", type=Path, help="write the record there")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    record = compare(arguments.questions, arguments.searched, arguments.evaluations)
    rows = [
        (each["of"], each["from"], f"{each['difference']:+.1%}", f"± {each['error']:.1%}")
        for each in record["differences"]
    ]
    tables.show("Accuracy, question by question", ("of", "minus", "difference", "95 %"), rows, labels=2)
    for name, schedule in record["searched"].items():
        print(f"{name}: {schedule}")
    if arguments.json:
        record["seconds"] = time.perf_counter() - begin
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
