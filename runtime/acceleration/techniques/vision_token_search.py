"""The search for how few image tokens each decoder layer of a model needs."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.checksums import sampled
from hasten.acceleration.edits import Edit, Freeze, apply_all, undo_all
from hasten.acceleration.found_schedule import FoundSchedule
from hasten.acceleration.preflight import refuse_unready
from hasten.acceleration.techniques.vision_tokens import VisionTokens, layer_shapes
from hasten.acceleration.undisturbed import undisturbed
from hasten.model_facts import device_of, progress
from hasten.sparsity.vision_tokens import PSigmoid, Stages, g_search, p_sigmoid_search, prefill_cost

Sample = Mapping[str, Any]
Shares = tuple[float, ...]
ANSWER, MEDIA = "answer", ("images", "videos")
METHODS = ("auto", "gp", "sobol")
FULL = Stages({1: 1.0})


def exact_match(text: str, sample: Sample) -> float:
    """1 where the text that the model wrote is the sample's answer but for space around it, else 0."""
    return float(text.strip() == str(sample[ANSWER]).strip())


def search_vision_tokens(
    model: nn.Module,
    processor,
    samples: Iterable[Sample],
    metric: Callable[[str, Sample], float] = exact_match,
    *,
    tolerance: float | None = None,
    budget: float | None = None,
    score: str = "last_token",
    mode: str = "drop",
    when: str = "prompt",
    levels: int | Sequence[float] = 8,
    stages: Sequence[int] | None = None,
    evaluations: int = 24,
    method: Literal["auto", "gp", "sobol"] = "auto",
    max_new_tokens: int = 16,
    batch_size: int = 16,
    seed: int = 0,
    resume: str | Path | None = None,
) -> FoundSchedule:
    """Searches a schedule for `VisionTokens`: by G-Search the fewest image tokens within a tolerance, and, within a
    budget, by P-Sigmoid from what G-Search found (both: arXiv 2412.00556, reconstructed from its abstract). The model
    answers all samples under each schedule that is tried; it is left as it was.

    Args:
        model: a multimodal model that `VisionTokens` takes, in eval mode, not accelerated.
        processor: the model's, which is given the `images`, `videos` and `text` of samples.
        samples: a hundred or more questions like those to come, as mappings: what the processor takes, one text each,
            and whatever the metric reads, such as "answer".
        metric: of the text that the model wrote and the sample, greater is better; its mean over samples counts.
        tolerance: by how much the mean may fall below that with all image tokens, at least 0. None is 0.01 where there
            is no budget, and the standard error of the mean for the G-Search that a budget starts from.
        budget: the operations of a prefill that image tokens may cause, as a share of all that they cause, in (0, 1).
        score, mode, when: as of `VisionTokens`.
        levels: the shares that G-Search tries, as `hasten.sparsity.vision_tokens.g_search` takes them.
        stages: the layers before which G-Search may drop tokens; by default all after the first.
        evaluations: how many sigmoids to try within a budget.
        method: of choosing them: "gp", a Gaussian process with expected improvement (scikit-learn, the extra
            `[search]`), "sobol", or "auto", the former where it is installed.
        max_new_tokens, batch_size: of each answer, and how many are written at once.
        seed: of random scores and of the sigmoids.
        resume: a JSON file that every evaluation is added to; a search that was interrupted goes on from there. The
            metric must have a name then, by which another one is told from it.

    Raises:
        ValueError: no samples, samples without an image, a tolerance, budget or the like that cannot be met, a metric
            that is not finite, or a `resume` file of another search; the message names the value.
        FileNotFoundError: the folder of `resume` does not exist.
        UnsupportedModelError, StateError: as `hasten.accelerate`.
    """
    samples = list(samples)
    _check(samples, metric, tolerance, budget, evaluations, batch_size, max_new_tokens, method, resume)
    refuse_unready(model)
    technique, anatomy = VisionTokens(FULL, score=score, mode=mode, when=when, seed=seed), Anatomy(model)
    first = max(1, anatomy.images.deep_stack)
    dataclasses.replace(technique, schedule=Stages({first: 0.5})).targets(anatomy)  # refuses what no schedule can do
    questions = Questions(model, processor, samples, batch_size, max_new_tokens)
    search = _Search(technique, questions, metric, anatomy, first)
    places = list(range(first, search.layers)) if stages is None else list(stages)
    search.check(levels, places, budget)
    known = _Known(resume, search.fingerprint() if resume is not None else "")
    before = len(known.values)
    with progress(None, "searching", unit="schedule") as bar:

        def evaluated(shares: Shares, value: float) -> None:
            known.add(shares, value)
            bar.update()
            bar.set_postfix_str(f"metric {value:.3f} at {search.cost(shares):.0%} of the operations")

        full = known.values.get((1.0,) * search.layers) if tolerance is not None or budget is None else None
        if full is None:
            full = search.evaluate((1.0,) * search.layers)
            evaluated((1.0,) * search.layers, full)
        if tolerance is None:
            tolerance = 0.01 if budget is None else search.standard_error
        found = g_search(
            search.evaluate,
            search.layers,
            tolerance=tolerance,
            levels=levels,
            start=first,
            stages=places,
            full=full,
            known=known.values,
            on_evaluation=evaluated,
        )
        shares, value, name = found.shares, found.metric, "g_search"
        if budget is not None:
            fitted = p_sigmoid_search(
                search.evaluate,
                search.layers,
                budget,
                evaluations=evaluations,
                seed=seed,
                first=found.schedule,
                start=first,
                cost=search.cost,
                method=method,
                known=known.values,
                on_evaluation=evaluated,
            )
            shares, value, name = fitted.shares, fitted.metric, "p_sigmoid"
            if search.cost(found.shares) <= budget and found.metric >= fitted.metric:
                shares, value, name = found.shares, found.metric, "g_search"
    return FoundSchedule(
        tuple(_falls(shares).items()) or ((first, 1.0),),
        search.layers,
        name,
        value,
        full,
        search.cost(shares),
        questions.image_tokens,
        len(known.values) - before,
        found.sweep,
    )


class Questions:
    """Samples as a model reads them, in batches, and what it answers.

    Args:
        model: a multimodal model.
        processor: its processor.
        samples: as for `search_vision_tokens`.
        batch_size, max_new_tokens: of the answers.

    Attributes:
        image_tokens, text_tokens: of a sample, the mean.

    Raises:
        ValueError: a sample without an image.
    """

    def __init__(self, model: nn.Module, processor, samples: Sequence[Sample], batch_size: int, max_new_tokens: int):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.batches: list[tuple[Sequence[Sample], Mapping[str, torch.Tensor]]] = []
        ids, image_tokens, tokens = torch.tensor(Anatomy(model).images.ids), 0, 0
        for first in range(0, len(samples), batch_size):
            batch = samples[first : first + batch_size]
            inputs = _processed(processor, batch)
            images = torch.isin(inputs["input_ids"], ids).sum(1)
            if not bool((images > 0).all()):
                wrong = first + int((images == 0).nonzero()[0])
                raise ValueError(f"samples[{wrong}] has no image token in its prompt: {sorted(samples[wrong])}")
            image_tokens += int(images.sum())
            tokens += int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
            self.batches.append((batch, inputs))
        self.image_tokens, self.text_tokens = image_tokens / len(samples), (tokens - image_tokens) / len(samples)

    @torch.no_grad()
    def metrics(self, metric: Callable[[str, Sample], float]) -> list[float]:
        """The metric of every sample, from greedy answers.

        Raises:
            ValueError: a metric that is not finite.
        """
        values, device = [], device_of(self.model)
        with undisturbed(self.model):
            for batch, inputs in self.batches:
                inputs = {name: value.to(device) for name, value in inputs.items()}
                written = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
                texts = self.processor.batch_decode(
                    written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
                )
                for text, sample in zip(texts, batch, strict=True):
                    value = float(metric(text, sample))
                    if not math.isfinite(value):
                        raise ValueError(f"the metric of {text!r} is {value}: it must be finite")
                    values.append(value)
        return values

    def cost(self, shares: Shares, anatomy: Anatomy) -> float:
        """The operations of a prefill that image tokens cause, as a share of all that they cause."""
        text, image, shapes = round(self.text_tokens), round(self.image_tokens), layer_shapes(anatomy)
        part, whole = (
            prefill_cost(each, text, image, shapes).image_operations for each in (shares, (1.0,) * len(shapes))
        )
        return part / whole


@contextlib.contextmanager
def tried(model: nn.Module, technique: VisionTokens | None) -> Iterator[None]:
    """A block in which the model runs as `accelerate` would leave it, with nothing checked or measured; as it is where
    there is no technique."""
    done: list[Edit] = []
    try:
        if technique is not None:
            anatomy = Anatomy(model)
            apply_all(model, [Freeze(), *technique.edits(anatomy, technique.settle(anatomy, None))], done)
        yield
    finally:
        undo_all(model, done)


class _Search:
    """What evaluates schedules."""

    def __init__(
        self,
        technique: VisionTokens,
        questions: Questions,
        metric: Callable[[str, Sample], float],
        anatomy: Anatomy,
        first: int,
    ):
        self.technique, self.questions, self.metric, self.anatomy = technique, questions, metric, anatomy
        self.layers, self.first = len(anatomy.images.layers), first
        self.standard_error = 0.0  # of the mean metric with all image tokens

    def fingerprint(self) -> str:
        """Of all that evaluations depend on."""
        digest = hashlib.sha256()
        for batch, inputs in self.questions.batches:
            for name in sorted(inputs):
                if isinstance(inputs[name], torch.Tensor):
                    digest.update(inputs[name].detach().cpu().contiguous().numpy().tobytes())
            digest.update(repr([_words(sample) for sample in batch]).encode())
        technique, metric = self.technique, f"{self.metric.__module__}.{self.metric.__qualname__}"
        options = technique.score, technique.mode, technique.when, technique.seed, self.questions.max_new_tokens, metric
        return f"{sampled(self.questions.model)}-{digest.hexdigest()[:16]}-{options}"

    def check(self, levels: int | Sequence[float], stages: list[int], budget: float | None) -> None:
        """Raises ValueError for what the searches would refuse, before the model answers anything."""
        g_search(lambda shares: 1.0, self.layers, tolerance=0, levels=levels, start=self.first, stages=stages)
        if budget is not None:
            PSigmoid.within(budget, 10.0, 0.0, self.layers, first=self.first, cost=self.cost)

    def cost(self, shares: Shares) -> float:
        return self.questions.cost(shares, self.anatomy)

    def evaluate(self, shares: Shares) -> float:
        """The mean metric under these shares."""
        falls = _falls(shares)
        technique = dataclasses.replace(self.technique, schedule=Stages(falls)) if falls else None
        with tried(self.questions.model, technique):
            values = self.questions.metrics(self.metric)
        if not falls:
            self.standard_error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return statistics.fmean(values)


class _Known:
    """Evaluations that were made, in a file if there is one."""

    def __init__(self, path: str | Path | None, fingerprint: str):
        self.path, self.fingerprint = None if path is None else Path(path), fingerprint
        self.values: dict[Shares, float] = {}
        if self.path is not None and self.path.exists():
            try:
                saved = json.loads(self.path.read_text())
                evaluated = {tuple(map(float, shares)): float(value) for shares, value in saved["evaluations"]}
                of = saved["of"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"resume: {self.path} is no file of a search ({error}): remove it") from error
            if of != fingerprint:
                raise ValueError(
                    f"resume: {self.path} is of a search with another model, other samples or other options: name "
                    "another file, or remove it"
                )
            self.values = evaluated

    def add(self, shares: Shares, value: float) -> None:
        self.values[shares] = value
        if self.path is not None:
            new = self.path.with_name(f"{self.path.name}.new")
            text = json.dumps({"of": self.fingerprint, "evaluations": [[*item] for item in self.values.items()]})
            new.write_text(text)
            os.replace(new, self.path)


def _falls(shares: Shares) -> dict[int, float]:
    return {layer: shares[layer] for layer in range(1, len(shares)) if shares[layer] < shares[layer - 1]}


def _words(sample: Sample) -> list[tuple[str, Any]]:
    """What a sample holds besides pictures: a metric may read it."""
    return [(name, value) for name, value in sorted(sample.items()) if isinstance(value, str | int | float | bool)]


def _processed(processor, batch: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """What the processor returns for some samples, padded on the left."""
    given = {name: [sample[name] for sample in batch] for name in MEDIA if name in batch[0]}
    tokenizer = getattr(processor, "tokenizer", processor)
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        inputs = processor(text=[sample["text"] for sample in batch], return_tensors="pt", padding=True, **given)
    finally:
        tokenizer.padding_side = side
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def _check(samples, metric, tolerance, budget, evaluations, batch_size, max_new_tokens, method, resume) -> None:
    """Raises ValueError or FileNotFoundError for an argument of `search_vision_tokens` that cannot be meant."""
    if not samples:
        raise ValueError("samples is empty: give a hundred or more questions with their images")
    for number, sample in enumerate(samples):
        if not isinstance(sample, Mapping) or not isinstance(sample.get("text"), str):
            raise ValueError(f"samples[{number}] must be a mapping with a text, got {_shown(sample)}")
        if [name in sample for name in MEDIA] != [name in samples[0] for name in MEDIA]:
            raise ValueError(f"samples[{number}] must have what samples[0] has of {', '.join(MEDIA)}")
        if metric is exact_match and ANSWER not in sample:
            raise ValueError(f"samples[{number}] has no {ANSWER!r}, which exact_match reads: {_shown(sample)}")
    for name, value, most in (("tolerance", tolerance, math.inf), ("budget", budget, 1)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and (value >= 0 if most > 1 else 0 < value < 1) and math.isfinite(value)):
            raise ValueError(f"{name} must be {'at least 0' if most > 1 else 'in (0, 1)'}, got {value!r}")
    for name, value in (("evaluations", evaluations), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if resume is not None:
        if "<lambda>" in getattr(metric, "__qualname__", "<lambda>"):
            raise ValueError("resume needs a metric with a name, a function: another metric could not be told from it")
        if not Path(resume).resolve().parent.is_dir():
            raise FileNotFoundError(f"resume: there is no folder {Path(resume).resolve().parent}")


def _shown(sample: object) -> str:
    return str(sorted(sample)) if isinstance(sample, Mapping) else type(sample).__name__
