"""`hasten demo vision`: what fewer image tokens cost and bring, on the embedded model that answers questions about
digits."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import typer

import hasten
from hasten.bench.runtime import vision_token_quality as study
from hasten.bench.runtime.vision_token_quality import KEEPS, LAYER, QUESTION_SEED, Result
from hasten.cli import picture, picture_vision, tables
from hasten.models.digit_questions import digit_questions
from hasten.sparsity.vision_tokens import FastV, Schedule


def run(plot: str, json_file: Path | None, quick: bool) -> None:
    """Asks, prints and draws everything.

    Raises:
        ValueError, OSError: the picture or the JSON cannot be written; found out before anything is asked.
        ImportError: scikit-learn, which brings the digits, is not installed.
    """
    start = time.perf_counter()
    picture_file = picture.destination(plot, picture_vision.DEFAULT)
    if json_file:
        tables.check_writable(json_file)
    count, searched = (100, 60) if quick else (400, 200)
    model, processor = study.embedded()
    found = study.search(model, processor, searched, evaluations=8 if quick else 16)
    questions = study.asked(model, processor, digit_questions(count, QUESTION_SEED))
    compared = study.variants(model, questions, found, KEEPS[1:2] if quick else KEEPS)
    results = list(study.compare(model, questions, compared))
    show(results, count)
    g_search, p_sigmoid = found.values()
    typer.echo(
        f"G-Search: {g_search.evaluations} schedules tried on {searched} other questions, a sweep of its grid would "
        f"take {g_search.sweep}. P-Sigmoid: {p_sigmoid.evaluations} with those."
    )
    if picture_file:
        picture_vision.draw(picture_file, model, processor, digit_questions(3, QUESTION_SEED), drawn(found))
    picture.announce(picture_file, plot)
    taken = time.perf_counter() - start
    if json_file:
        records = [{name: value for name, value in asdict(result).items() if name != "correct"} for result in results]
        facts = {"questions": count, "searched_on": searched, "seconds": taken}
        schedules = {name: schedule.to_dict() for name, schedule in found.items()}
        tables.write_json(json_file, {"results": records, "searched": schedules, **facts})
    typer.echo(f"\nDone in {taken:.0f} s.")


def show(results: Sequence[Result], count: int) -> None:
    """Prints the table."""
    full = results[0]
    rows = []
    for result in results:
        rows.append(
            (
                result.name,
                f"{result.accuracy:.1%}",
                f"± {result.error:.1%}",
                f"{result.operations:.0%}",
                f"{result.prefill_seconds * 1e3:.1f}",
                tables.ratio(full.prefill_seconds / result.prefill_seconds) if result is not full else "-",
                f"{result.kv_bytes / 1e3:.0f}",
            )
        )
    columns = ("image tokens", "accuracy", "95 %", "operations", "ms", "to first token", "KV kB")
    tables.show(f"Fewer image tokens on the embedded model: {count} questions a row", columns, rows)
    typer.echo(
        f"50 %, 25 %, 10 %: of the image tokens, from layer {LAYER} on. Operations: of a prefill, those that image "
        "tokens cause, as a share of all that they cause.\nms: of a prefill of one question, with the vision tower. "
        "The model is tiny, and the Python around its layers takes most of the time: bench/results has one of 1.4 B."
    )


def drawn(found: Mapping[str, Schedule]) -> dict[str, hasten.VisionTokens]:
    """What the picture shows."""
    return {
        "last token, 25 %": hasten.VisionTokens(FastV(LAYER, 0.25)),
        "vision side, 25 %": hasten.VisionTokens(FastV(LAYER, 0.25), score="vision"),
        "random, 25 %": hasten.VisionTokens(FastV(LAYER, 0.25), score="random"),
        "G-Search, last layer": hasten.VisionTokens(found["G-Search"]),
    }
