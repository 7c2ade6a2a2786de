"""What fewer image tokens cost in accuracy: every score, merging and searched schedules on the embedded model that
answers questions about digits, over a thousand questions or more that no search has seen.

`hasten demo vision` shows the same rows on fewer questions. Differences between rows are taken question by question.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration

import hasten
from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.measure import seconds
from hasten.acceleration.techniques.vision_token_search import Questions, exact_match, tried
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
# Schedules of one parameter that fit the budget in eight layers; a pyramid of equal parts would leave two layers whole,
# which cost all of it.
PYRAMIDS = ((1, 3, 5), (1, 2, 4, 6))
QUESTIONS, SEARCHED, EVALUATIONS = 1500, 400, 24
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
    model: nn.Module, questions: Questions, found: Mapping[str, Schedule], keeps: Iterable[float]
) -> dict[str, hasten.VisionTokens | None]:
    """What is compared, by its name."""
    compared: dict[str, hasten.VisionTokens | None] = {"all image tokens": None}
    for keep in keeps:
        for name, settings in SCORES.items():
            compared[f"{keep:.0%}, {name}"] = hasten.VisionTokens(FastV(LAYER, keep), **settings)
    compared |= {
        f"fixed ratio, {BUDGET:.0%} of operations": hasten.VisionTokens(within(questions, model, partial(FastV, 1))),
        f"P-Sigmoid, {BUDGET:.0%} of operations": hasten.VisionTokens(found["P-Sigmoid"]),
        "G-Search, no loss": hasten.VisionTokens(found["G-Search"]),
    }
    for parts in PYRAMIDS:
        pyramid = within(questions, model, lambda share, parts=parts: Pyramid(share, parts))
        compared[f"pyramid from {parts}, {BUDGET:.0%} of operations"] = hasten.VisionTokens(pyramid)
    compared["G-Search, random"] = hasten.VisionTokens(found["G-Search"], score="random")
    return compared


def within(
    questions: Questions, model: nn.Module, schedule_of: Callable[[float], Schedule], budget: float = BUDGET
) -> Schedule:
    """The schedule of the largest share whose image tokens cause no more than BUDGET of all operations, by bisection.

    Raises:
        ValueError: no share is that cheap.
    """
    anatomy = Anatomy(model)
    layers, low, high = len(anatomy.images.layers), 1e-3, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        cost = questions.cost(schedule_of(middle).shares(layers), anatomy)
        low, high = (middle, high) if cost <= BUDGET else (low, middle)
    if questions.cost(schedule_of(low).shares(layers), anatomy) > BUDGET:
        raise ValueError(f"{schedule_of(low)} costs more than {BUDGET:.0%} of the operations")
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


def difference(one: Result, other: Result) -> dict[str, float]:
    """The mean of one's accuracy minus the other's, and half of its 95 % interval, question by question."""
    each = [a - b for a, b in zip(one.correct, other.correct, strict=True)]
    error = CONFIDENCE * statistics.stdev(each) / math.sqrt(len(each))
    return {"difference": statistics.fmean(each), "error": error}


def study(questions: int, searched: int, evaluations: int) -> dict:
    """The record: results, the schedules that were found, and the differences that matter."""
    model, processor = embedded()
    found = search(model, processor, searched, evaluations)
    given = asked(model, processor, digit_questions(questions, QUESTION_SEED))
    results = {result.name: result for result in compare(model, given, variants(model, given, found, KEEPS))}
    full = next(iter(results.values()))
    sigmoid, random = results[f"P-Sigmoid, {BUDGET:.0%} of operations"], results["G-Search, random"]
    same_cost = [name for name in results if name.endswith("% of operations") and results[name] is not sigmoid]
    pairs = [(sigmoid, results[name]) for name in same_cost]
    pairs += [(results["G-Search, no loss"], full), (results["G-Search, no loss"], random)]
    pairs += [
        (results[f"{keep:.0%}, {name}"], results[f"{keep:.0%}, random"])
        for keep in KEEPS
        for name in ("last token", "text raters", "vision side", "merging")
    ]
    return {
        "questions": questions,
        "searched_on": searched,
        "threads": torch.get_num_threads(),
        "searched": {name: schedule.to_dict() for name, schedule in found.items()},
        "results": [{k: v for k, v in asdict(result).items() if k != "correct"} for result in results.values()],
        "differences": [{"of": one.name, "from": other.name} | difference(one, other) for one, other in pairs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--searched", type=int, default=SEARCHED)
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS)
    parser.add_argument("--json", type=Path, help="write the record there")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    record = study(arguments.questions, arguments.searched, arguments.evaluations)
    for each in record["results"]:
        print(
            f"{each['name']:36} {each['accuracy']:6.1%} ± {each['error']:.1%} {each['operations']:4.0%} of operations "
            f"{each['prefill_seconds'] * 1e3:6.1f} ms {each['kv_bytes'] / 1e3:5.0f} kB"
        )
    for each in record["differences"]:
        print(f"{each['of']:36} minus {each['from']:36} {each['difference']:+6.1%} ± {each['error']:.1%}")
    for name, schedule in record["searched"].items():
        print(f"{name}: {schedule}")
    if arguments.json:
        record["seconds"] = time.perf_counter() - begin
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
