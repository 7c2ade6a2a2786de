"""`hasten demo vision`: what fewer image tokens cost and bring, on the embedded model that answers questions about
digits."""

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import typer
from torch import nn
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration

import hasten
from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.measure import seconds
from hasten.acceleration.vision_token_search import Questions, exact_match, tried
from hasten.cli import picture, picture_vision, tables
from hasten.model_facts import progress
from hasten.models.digit_questions import Sample, digit_questions
from hasten.sparsity.vision_tokens import FastV, Pyramid, Schedule, Stages

MODEL = "digits-llava"
KEEPS = (0.5, 0.25, 0.1)
LAYER = 2  # before which tokens are dropped in the rows that compare scores
BUDGET = 0.25  # of the operations that image tokens cause, in the rows that compare schedules
SCORES = {
    "last token": {},
    "text raters": {"score": "text_raters"},
    "vision side": {"score": "vision"},
    "random": {"score": "random"},
    "merging": {"mode": "merge"},
}
SEARCH_SEED, QUESTION_SEED = 1, 2
CONFIDENCE = 1.96
BATCH, ANSWER_TOKENS, PREFILLS = 50, 4, 9


@dataclass(frozen=True, slots=True)
class Result:
    """A schedule on some questions.

    Attributes:
        name: in words. technique: as it was given to the model; empty for none.
        accuracy: the share of questions that were answered right; `error` is half of its 95 % interval.
        operations: of a prefill that image tokens cause, as a share of all that they cause.
        prefill_seconds: of one prompt, with the vision tower. kv_bytes: of its cache in the decoder.
        correct: for each question, 1 or 0.
    """

    name: str
    technique: str
    accuracy: float
    error: float
    operations: float
    prefill_seconds: float
    kv_bytes: int
    correct: tuple[float, ...]


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
    model, processor = embedded()
    found = search(model, processor, searched, evaluations=8 if quick else 16)
    questions = asked(model, processor, digit_questions(count, QUESTION_SEED))
    results = list(compare(model, questions, variants(model, questions, found, quick)))
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


def embedded() -> tuple[nn.Module, object]:
    """The embedded model and its processor."""
    folder = hasten.embedded_model(MODEL)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def asked(model: nn.Module, processor, samples: Iterable[Sample]) -> Questions:
    """Questions as the model reads them."""
    given = [{"images": s.image, "text": s.prompt, "answer": s.answer, "kind": s.kind} for s in samples]
    return Questions(model, processor, given, BATCH, ANSWER_TOKENS)


def search(model: nn.Module, processor, count: int, evaluations: int) -> dict[str, hasten.FoundSchedule]:
    """G-Search, with a tolerance of one question in a hundred, and P-Sigmoid within BUDGET, on questions that nothing
    else is measured on."""
    samples = [{"images": s.image, "text": s.prompt, "answer": s.answer} for s in digit_questions(count, SEARCH_SEED)]
    settings = {"max_new_tokens": ANSWER_TOKENS, "batch_size": BATCH}
    return {
        "G-Search": hasten.search_vision_tokens(model, processor, samples, tolerance=0.01, **settings),
        "P-Sigmoid": hasten.search_vision_tokens(
            model, processor, samples, budget=BUDGET, evaluations=evaluations, **settings
        ),
    }


def variants(
    model: nn.Module, questions: Questions, found: Mapping[str, Schedule], quick: bool
) -> dict[str, hasten.VisionTokens | None]:
    """What is compared, by its name."""
    compared: dict[str, hasten.VisionTokens | None] = {"all image tokens": None}
    for keep in KEEPS[1:2] if quick else KEEPS:
        for name, settings in SCORES.items():
            compared[f"{keep:.0%}, {name}"] = hasten.VisionTokens(FastV(LAYER, keep), **settings)
    fixed = within(questions, model, lambda share: FastV(1, share))
    pyramid = within(questions, model, lambda share: Pyramid(share))
    compared |= {
        f"fixed ratio, {BUDGET:.0%} of operations": hasten.VisionTokens(fixed),
        f"pyramid, {BUDGET:.0%} of operations": hasten.VisionTokens(pyramid),
        f"P-Sigmoid, {BUDGET:.0%} of operations": hasten.VisionTokens(found["P-Sigmoid"]),
        "G-Search, no loss": hasten.VisionTokens(found["G-Search"]),
    }
    compared["G-Search, random"] = hasten.VisionTokens(found["G-Search"], score="random")
    return compared


def within(questions: Questions, model: nn.Module, schedule_of, budget: float = BUDGET) -> Schedule:
    """The schedule of the largest share whose image tokens cause no more than `budget` of all operations, by
    bisection."""
    anatomy = Anatomy(model)
    layers, low, high = len(anatomy.images.layers), 1e-3, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        cost = questions.cost(schedule_of(middle).shares(layers), anatomy)
        low, high = (middle, high) if cost <= budget else (low, middle)
    return schedule_of(low)


def compare(
    model: nn.Module, questions: Questions, compared: Mapping[str, hasten.VisionTokens | None]
) -> Iterable[Result]:
    """A `Result` for each."""
    anatomy = Anatomy(model)
    layers = len(anatomy.images.layers)
    for name, technique in progress(compared.items(), "asking", unit="schedule", total=len(compared)):
        schedule = Stages({1: 1.0}) if technique is None else technique.schedule
        with tried(model, technique):
            correct = questions.metrics(exact_match)
            taken, kv_bytes = first_token(model, questions)
        mean = statistics.fmean(correct)
        yield Result(
            name,
            "" if technique is None else repr(technique),
            mean,
            CONFIDENCE * math.sqrt(mean * (1 - mean) / len(correct)),
            questions.cost(schedule.shares(layers), anatomy),
            taken,
            kv_bytes,
            tuple(correct),
        )


@torch.no_grad()
def first_token(model: nn.Module, questions: Questions) -> tuple[float, int]:
    """The median seconds of a prefill of one question, and the bytes of its cache."""
    inputs = {name: value[:1] for name, value in questions.batches[0][1].items()}
    taken = []
    for _ in range(PREFILLS):
        cache = DynamicCache(config=model.config.text_config)
        taken.append(
            seconds(lambda cache=cache: model(**inputs, past_key_values=cache, logits_to_keep=1), torch.device("cpu"))
        )
    return statistics.median(taken), sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


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
