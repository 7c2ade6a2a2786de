"""`hasten demo guidance`: what guides for diffusion cost and what they draw, on the embedded digit model."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import typer

import hasten
from hasten.cli import picture, picture_guidance, tables
from hasten.cli.picture_guidance import Result
from hasten.guidance.diffusion.adaptive import AdaptiveGuidance
from hasten.guidance.diffusion.apg import AdaptiveProjectedGuidance
from hasten.guidance.diffusion.cfg_plus_plus import CFGPlusPlus
from hasten.guidance.diffusion.classifier_free import ClassifierFreeGuidance, Cutoff
from hasten.guidance.diffusion.guide import Guide
from hasten.guidance.diffusion.intervals import SigmaInterval
from hasten.model_facts import progress
from hasten.models.digit_diffusion.classifier import contrast, saturation
from hasten.models.digit_diffusion.drawing import draw

SCALES = (3.0, 5.0, 10.0)
PICTURE_SCALE = 10.0
STEPS = 50
CONDITIONAL, FULL = "conditional only", "CFG"
# The interval is SDXL's (arXiv 2404.07724) and the bound on APG's norm SDXL's 15, which grows as the square root of the
# number of elements, for 64 elements in place of 65,536. CFG++ has a strength in place of a scale; its authors pair
# strength 1 with scale 12.5.
METHODS: dict[str, Callable[[float], Guide]] = {
    CONDITIONAL: lambda scale: ClassifierFreeGuidance(1.0),
    FULL: ClassifierFreeGuidance,
    "interval": lambda scale: ClassifierFreeGuidance(scale, interval=SigmaInterval(0.28, 5.42)),
    "cutoff": lambda scale: Cutoff(scale, STEPS // 2),
    "adaptive (AG)": lambda scale: AdaptiveGuidance(scale, 0.99, space="x0", batch="rows"),
    "APG": lambda scale: AdaptiveProjectedGuidance(scale, eta=0.0, momentum=-0.5, max_norm=15 * (64 / 65536) ** 0.5),
    "CFG++": lambda scale: CFGPlusPlus(scale / 12.5),
}


def run(plot: str, json_file: Path | None, quick: bool) -> None:
    """Draws and prints everything.

    Raises:
        ValueError, OSError: the picture or the JSON cannot be written; found out before anything is drawn.
    """
    start = time.perf_counter()
    picture_file = picture.destination(plot, picture_guidance.DEFAULT)
    if json_file:
        tables.check_writable(json_file)
    count = 20 if quick else 100
    results = compare(SCALES[::2] if quick else SCALES, count)
    _show(results, count)
    if picture_file:
        picture_guidance.draw(picture_file, [result for result in results if result.scale in (1, PICTURE_SCALE)])
    picture.announce(picture_file, plot)
    seconds = time.perf_counter() - start
    if json_file:
        records = [{name: value for name, value in asdict(result).items() if name != "samples"} for result in results]
        facts = {"steps": STEPS, "samples": count, "seconds": seconds}
        tables.write_json(json_file, {"guidance": records, **facts})
    typer.echo(f"\nDone in {seconds:.0f} s.")


def compare(scales: Sequence[float], count: int) -> list[Result]:
    """Every method at every scale, the conditional prediction alone once (at scale 1), on the same `count` digits and
    noises.
    """
    folder = hasten.embedded_model("digit-diffusion")
    model, classifier = hasten.DigitDiffusion.load(folder), hasten.DigitClassifier.load(folder)
    labels, seeds = torch.arange(count) % 10, range(count)
    # So that the first method is not the one that warms up.
    draw(model, labels, ClassifierFreeGuidance(1.0), seeds, steps=2)
    runs = [(CONDITIONAL, 1.0)] + [(name, scale) for scale in scales for name in METHODS if name != CONDITIONAL]
    full, results = {}, []
    for name, scale in progress(runs, "drawing digits", unit="run"):
        guide = METHODS[name](scale)
        drawing = draw(model, labels, guide, seeds, STEPS)
        samples = drawing.samples
        full = {scale: samples} if name == FULL else full
        result = Result(
            method=name,
            scale=scale,
            guide=repr(guide),
            evaluations=drawing.rows / count,
            seconds=drawing.seconds,
            accuracy=float(classifier.correct(samples, labels).float().mean()),
            saturation=float(saturation(samples).mean()),
            contrast=float(contrast(samples).mean()),
            distance=float((samples - full[scale]).square().mean((1, 2, 3)).sqrt().mean()) if scale in full else None,
            samples=samples,
        )
        results.append(result)
    return results


def _show(results: Sequence[Result], count: int) -> None:
    rows = []
    for result in results:
        cost = f"{result.evaluations:.1f}", f"{result.seconds:.2f}"
        quality = f"{result.accuracy:.1%}", f"{result.saturation:.1%}", f"{result.contrast:.3f}"
        distance = "-" if result.distance is None else f"{result.distance:.3f}"
        rows.append((f"{result.scale:g}", result.method, *cost, *quality, distance))
    columns = ("scale", "method", "evaluations", "seconds", "accuracy", "saturation", "contrast", "from CFG")
    title = f"Guidance on the embedded digit model: {count} digits per row, {STEPS} steps of DDIM"
    tables.show(title, columns, rows, labels=2)
    typer.echo(
        "Evaluations: rows that the model computed, per digit. "
        "Accuracy: a classifier sees the digit that was asked for.\n"
        "Saturation: pixels that a picture would clip. Contrast: mean |x0|. From CFG: distance to CFG at that scale.\n"
        "CFG++ has a strength in place of a scale: scale / 12.5."
    )
